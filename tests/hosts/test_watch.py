"""The master's folder, while two machines that share no disk train: `watch` sees the other's rank there."""

import json
import signal
import statistics
import time

from ddp_lib.report.live_run import LiveRun
from tests.hosts.test_several_machines import ENDPOINT, TIMEOUT_S

SYNC_S = 1.0
# An epoch of 5,000 steps, at whose end the logs would be sent anyway.
FLAGS = f"--nnodes 2 --data shapes --global-batch-size 2 --log-sync-s {SYNC_S} --rdzv-endpoint {ENDPOINT}"


def test_the_other_machines_rank_is_seen_within_an_epoch(make_lab, train):
    master, other = make_lab(2).machines
    programs = [train(machine, *FLAGS.split()) for machine in (master, other)]
    run, late_s, seen, deadline = LiveRun(master.folder / "run"), [], 0, time.monotonic() + TIMEOUT_S
    while len(late_s) < 5:
        assert time.monotonic() < deadline, programs[0].output
        copy = master.folder / "run" / "rank1.jsonl"
        lines = copy.read_bytes().rpartition(b"\n")[0].splitlines()[seen:] if copy.exists() else []
        if lines:  # the first of those that have come together is the latest
            late_s.append(time.time() - json.loads(lines[0])["time"])
            seen += len(lines)
        time.sleep(0.02)
    run.look()
    assert run.ranks == [0, 1] and run.step > 0 and [e["event"] for e in run.logs[0].events] == ["start"]
    assert statistics.median(late_s) <= SYNC_S + 1, late_s
    watch = master.run(["ddp-launch", "watch", "--once", "run"])
    assert "rank=1 step=" in watch and "state=running warnings=-" in watch.splitlines()[1]
    for program in programs:
        program.signal(signal.SIGTERM)
    for program in programs:
        assert program.wait(TIMEOUT_S) == 143, program.output
    original = other.folder / "run" / "rank1.jsonl"
    assert copy.read_bytes() == original.read_bytes()
