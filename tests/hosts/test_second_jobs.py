"""A second job, or the same once more, at the port of one that runs; a machine that must not join a job."""

import re

import pytest

from ddp_lib.run_dir.log import read_events
from tests.lab.processes import wait_until
from tests.lab.training import Training, make_images

TIMEOUT_S = 120
ENDPOINT = "10.77.0.10:29500"
# Without torch, so that it starts at once.
WAITS = """
import os, sys, time
from pathlib import Path
here = Path(__file__).parent
(here / f"began{os.environ['RANK']}").touch()
while not (here / "end").exists():
    time.sleep(0.05)
print("restarts", os.environ["TORCHELASTIC_RESTART_COUNT"])
"""


def start(machine, nnodes: str, script: str = "own.py"):
    (machine.folder / script).write_text(WAITS)
    flags = [f"--nnodes={nnodes}", "--nproc-per-node=1", f"--rdzv-endpoint={ENDPOINT}", "--max-restarts=3"]
    return machine.start(["ddp-launch", "run", *flags, script])


def refusal(program) -> str:
    assert program.wait(TIMEOUT_S) in (2, 75), program.output
    assert "[rank" not in program.output and "Traceback" not in program.output, program.output
    return program.output.splitlines()[-1].removeprefix("ddp-launch: error: ")


# --nnodes of the first job, of which two machines have come.
@pytest.mark.parametrize("nnodes", ["2", "1:3"])
def test_whoever_comes_to_another_job_is_refused_and_the_job_notices_nothing(make_lab, nnodes):
    machines = make_lab(3).machines
    first = [start(machine, nnodes) for machine in machines[:2]]
    ranks = [machine.folder / f"began{rank}" for rank, machine in enumerate(machines[:2])]
    wait_until(lambda: all(path.exists() for path in ranks))
    for machine in machines[::2]:
        line = refusal(start(machine, "2", script="other.py"))
        owner = r"belongs to the job 'own.py', started at [\d:]+ on m0"
        assert re.match(f"--rdzv-endpoint {ENDPOINT} {owner}, and not to 'other.py': choose another", line)
    for number in (0, 1):
        line = refusal(start(machines[number], nnodes))
        assert line.startswith(f"m{number} (10.77.0.1{number}) is in the job 'own.py' already (by process ")
    if nnodes == "2":
        line = refusal(start(machines[2], nnodes))
        assert "has all its machines (2): m0 (10.77.0.10), m1 (10.77.0.11), since" in line
    for machine in machines:
        (machine.folder / "end").touch()
    for rank, program in enumerate(first):
        assert program.wait(TIMEOUT_S) == 0, program.output
        assert program.output.splitlines()[1:] == [f"[rank {rank}] restarts 0"]


def test_the_same_command_twice_on_a_machine_does_not_make_two_machines(make_lab):
    machines = make_lab(2).machines
    both = [start(machines[0], "2") for _ in range(2)]
    wait_until(lambda: any(program.ended for program in both))
    [refused] = [program for program in both if program.ended]
    [goes_on] = [program for program in both if program is not refused]
    assert "is in the job 'own.py' already" in refusal(refused)
    second = start(machines[1], "2")
    for machine in machines:
        (machine.folder / "end").touch()
    for program in (goes_on, second):
        assert program.wait(TIMEOUT_S) == 0, program.output


def test_a_wrong_machine_is_refused_alone_by_an_elastic_job(make_lab, tmp_path):
    lab = make_lab(2)
    images = make_images(tmp_path / "images")
    training = Training(lab, images, nnodes="1:2")
    m0, m1 = lab.machines
    [first] = training.start(m0)
    training.until_gate(size=1)
    another = Training(lab, make_images(tmp_path / "more" / "images"), nnodes="1:2")
    next((tmp_path / "more" / "images" / "train").glob("*/*")).unlink()
    [newcomer] = Training(lab, images, "--momentum", "0.8", nnodes="1:2").start(m1)
    line = refusal(newcomer)
    assert "the flags differ: --momentum 0.8 on m1, but none on m0: give every machine the same" in line
    [newcomer] = another.start(m1)
    assert "the data differs: its digest is" in refusal(newcomer)
    training.open(size=1)
    assert first.wait(TIMEOUT_S) == 0, first.output
    starts = read_events(training.disk(m0)).query("event == 'start'")
    assert list(starts["world_size"]) == [1]
