"""examples/own_script on two machines without a shared disk."""

import os
import random
from pathlib import Path

from ddp_lib import read_run
from ddp_lib.run_dir.log import read_events
from tests.lab.own_script import STEPS, make_images, make_unbroken_run, pieces, steps_logged, weights_of
from tests.lab.processes import wait_until

TIMEOUT_S = 120


def test_after_a_power_cut_rank_0_moves_and_the_bits_are_those_of_an_unbroken_run(make_lab, once):
    machines, images = make_lab(2).machines, make_images(once)
    run_dirs = [machine.folder / "run" for machine in machines]

    def start(master):
        flags = ["--nnodes=2", "--nproc-per-node=1", f"--rdzv-endpoint={master.address}:29500"]
        command = ["ddp-launch", "run", *flags, *pieces(images, Path("run"))]
        # As many threads as the unbroken run's: they decide the order in which numbers are added.
        return [machine.start(command, OMP_NUM_THREADS="1") for machine in machines]

    seed = os.getpid()
    moment = random.Random(seed).randrange(1, STEPS - 1)
    start(machines[0])
    wait_until(lambda: steps_logged(run_dirs[1]) >= moment)
    for machine in machines:
        machine.end_all()
    programs = start(machines[1])
    unbroken = make_unbroken_run(once)
    for program, run_dir in zip(programs, run_dirs, strict=True):
        assert program.wait(TIMEOUT_S) == 0, program.output
        assert weights_of(run_dir) == weights_of(unbroken), f"killed as by seed {seed}"
    same = ["rank", "epoch", "step", "samples", "loss", "lr"]
    assert read_run(run_dirs[1])[same].equals(read_run(unbroken)[same])
    accuracy = [
        read_events(folder).query("event == 'epoch'").drop_duplicates("epoch")["test_accuracy"].tolist()
        for folder in (run_dirs[1], unbroken)
    ]
    assert accuracy[0] == accuracy[1] and len(accuracy[0]) == 2
