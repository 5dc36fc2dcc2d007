"""The master's folder, while two machines that share no disk train: `watch` sees the other's rank there."""

import signal
import time

from ddp_lib.report.live_run import LiveRun
from tests.hosts.test_several_machines import ENDPOINT, TIMEOUT_S

# An epoch of 5,000 steps, at whose end the logs would be sent anyway.
FLAGS = f"--nnodes 2 --data shapes --global-batch-size 2 --log-sync-s 1 --rdzv-endpoint {ENDPOINT}"


def test_the_other_machines_rank_is_seen_within_an_epoch(make_lab, train):
    master, other = make_lab(2).machines
    programs = [train(machine, *FLAGS.split()) for machine in (master, other)]
    run, copy = LiveRun(master.folder / "run"), master.folder / "run" / "rank1.jsonl"
    sizes, deadline = {0}, time.monotonic() + TIMEOUT_S
    while len(sizes) < 5:  # how late they come: benchmarks/watch.py
        assert time.monotonic() < deadline, programs[0].output
        sizes |= {copy.stat().st_size} if copy.exists() else set()
        time.sleep(0.02)
    run.look()
    assert run.ranks == [0, 1] and run.step > 0 and [e["event"] for e in run.logs[0].events] == ["start"]
    watch = master.run(["ddp-launch", "watch", "--once", "run"])
    line = watch.splitlines()[1]  # on a busy machine it may be slow, and so be told
    assert line.startswith("rank=1 step=") and "state=running" in line
    for program in programs:
        program.signal(signal.SIGTERM)
    for program in programs:
        assert program.wait(TIMEOUT_S) == 143, program.output
    original = other.folder / "run" / "rank1.jsonl"
    assert copy.read_bytes() == original.read_bytes()
