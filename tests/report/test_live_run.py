"""What watch says of a run: from logs that tests write, as if ranks wrote them."""

import json
import os

import pytest

from ddp_lib.errors import UserError
from ddp_lib.report import live_run
from ddp_lib.report.live_log import RECENT, RankLog
from ddp_lib.report.live_run import LiveRun
from ddp_lib.report.plots import draw_steps
from ddp_lib.run_dir.log import RunLog, read_run
from tests.lab.logs import step, write


def warnings(folder):
    run = LiveRun(folder)
    run.look()
    return [(w.kind, w.ranks) for w in run.warnings()]


CASES = {
    "nothing": (lambda rank, n: {}, []),
    "slow data": (
        lambda rank, n: {"data_s": 0.03, "compute_s": 0.021} if rank == 1 else {},
        [("slow", (1,))],
    ),
    "slow, its data not measured": (
        lambda rank, n: dict(data_s=float("nan"), compute_s=float("nan"), step_s=0.05 + 0.04 * (rank == 2)),
        [("slow", (2,))],
    ),
    "drift": (lambda rank, n: {"loss": 3.0 + n % 2 / 10} if rank == 2 else {}, [("drift", (2,))]),
    "not finite": (
        lambda rank, n: {"loss": float("nan")} if (rank, n) == (1, 30) else {},
        [("not finite", (1,))],
    ),
}


@pytest.mark.parametrize(("change", "expected"), CASES.values(), ids=CASES)
def test_what_a_person_should_look_at(tmp_path, change, expected):
    assert warnings(write(tmp_path, change=change)) == expected


@pytest.mark.parametrize(
    ("since_s", "change", "silent"),
    [
        (1, lambda rank, n: {}, False),
        (8, lambda rank, n: {}, True),
        (8, lambda rank, n: {"step_s": 0.6}, False),  # its usual step is longer
        (8, lambda rank, n: {"time": 100 + n + 6 * (n > 30)}, False),  # it has paused as long, to validate
    ],
)
def test_a_rank_is_silent_by_its_own_measure(tmp_path, since_s, change, silent):
    assert (("silent", (0, 1, 2)) in warnings(write(tmp_path, change=change, since_s=since_s))) == silent


def test_a_rank_that_has_said_its_end_is_not_silent(tmp_path):
    write(tmp_path)
    for rank in range(3):
        with RunLog(tmp_path, rank) as log:
            log.end(60, "finished")
        os.utime(tmp_path / f"rank{rank}.jsonl", (0, 0))
    assert warnings(tmp_path) == []


@pytest.mark.parametrize("where", ["log", "summary"])
def test_digests_that_differ(tmp_path, where):
    write(tmp_path)
    digests = ["a", "a", "b"]
    for rank, digest in enumerate(digests):
        with RunLog(tmp_path, rank) as log:
            log.digest(30, "a")
            log.digest(60, digest if where == "log" else "a")
            log.end(60, "finished")
    if where == "summary":
        (tmp_path / "summary.json").write_text(json.dumps({"weights_sha256": digests}))
    assert warnings(tmp_path) == [("digest", (2,))]


def test_bytes_may_come_in_any_pieces():
    text = "".join(json.dumps(step(n)) + "\n" for n in range(9)).encode()
    whole, pieces = RankLog(), RankLog()
    whole.feed(b'{"half\n[1]\n' + text + b'{"event": "later"}\n')
    for byte in text:
        pieces.feed(bytes([byte]))
    assert whole == pieces and whole.step == 8 and whole.loss == pytest.approx(1.96, abs=0.01)


def test_reads_only_what_is_new(tmp_path, monkeypatch):
    write(tmp_path, ranks=1)
    run, fed = LiveRun(tmp_path), []
    feed = RankLog.feed
    monkeypatch.setattr(RankLog, "feed", lambda log, data: (fed.append(len(data)), feed(log, data)))
    assert run.look() and not run.look()
    size = (tmp_path / "rank0.jsonl").stat().st_size
    with RunLog(tmp_path, 0) as log:
        log.write(**step(60))
    assert run.look() and run.step == 60
    assert fed == [size, (tmp_path / "rank0.jsonl").stat().st_size - size]


def test_of_a_long_run_the_first_look_reads_pieces(tmp_path, monkeypatch):
    """They say of it what the whole logs say, and what comes later is read as of any run."""
    monkeypatch.setattr(live_run, "_SAMPLE", 2**14)
    write(tmp_path, ranks=2, steps=3000, change=lambda rank, n: {"data_s": 0.03 * rank, "compute_s": 0.021})
    with RunLog(tmp_path, 0) as log:
        log.epoch(0, 3000, test_accuracy=0.5)
        for n in range(3000, 3500):
            log.write(**step(n))
    whole, part = LiveRun(tmp_path), LiveRun(tmp_path)
    whole.look()
    fed, feed = [], RankLog.feed
    monkeypatch.setattr(RankLog, "feed", lambda log, data: (fed.append(len(data)), feed(log, data)))
    monkeypatch.setattr(live_run, "_AT_FIRST", 2**17)
    for new in (0, 100):
        with RunLog(tmp_path, 0) as log:
            for n in range(3500, 3500 + new):
                log.write(**step(n))
        assert [whole.look(), part.look()] == [bool(new), True]
        assert part.logs[0].recent == whole.logs[0].recent and part.logs[0].events == whole.logs[0].events
        assert (part.step, part.waiting, part.test_accuracy) == (whole.step, whole.waiting, 0.5)
        assert [w.kind for w in part.warnings()] == [w.kind for w in whole.warnings()]
        assert part.logs[0].longest_pause_s < 2  # what was left out is no pause
    assert sum(fed) < 2**17 + 2 * 100 * 250


def test_a_run_begun_afresh_is_read_from_the_beginning(tmp_path):
    run = LiveRun(write(tmp_path))
    run.look()
    for rank in range(3):
        (tmp_path / f"rank{rank}.jsonl").rename(tmp_path / f"old{rank}")
    assert not run.look() and run.ranks == []
    write(tmp_path, ranks=2, steps=80)
    run.look()
    assert (run.ranks, run.step) == ([0, 1], 79)


def test_a_restart_forgets_the_steps_after_it(tmp_path):
    write(tmp_path, change=lambda rank, n: {"loss": float("inf")} if n == 50 else {})
    for rank in range(2):  # on fewer ranks
        with RunLog(tmp_path, rank) as log:
            log.start(step=40, world_size=2)
            log.write(**step(40))
    run = LiveRun(tmp_path)
    run.look()
    assert (run.ranks, run.missing, run.step, run.warnings()) == ([0, 1], 0, 40, [])
    assert list(run.table()[0].query("rank == 0")["step"]) == [*range(41)]


def test_a_long_run_keeps_its_sums(tmp_path):
    write(tmp_path, ranks=2, steps=1500)
    with RunLog(tmp_path, 1) as log:
        log.epoch(0, 1500, test_accuracy=0.5)
    run = LiveRun(tmp_path)
    run.look()
    table, events, width = run.table()
    assert width == 4 and len(table) == 2 * 375 and len(run.logs[0].recent) == RECENT
    whole = read_run(tmp_path)
    assert table["samples"].sum() == whole["samples"].sum()
    assert (table["samples"] * table["loss"]).sum() == pytest.approx((whole["samples"] * whole["loss"]).sum())
    assert run.test_accuracy == 0.5
    loss, *_ = draw_steps(table, events, "a title", width).axes
    assert loss.get_title() == "Loss of each rank, mean over 48 steps, means of 4 faint"


def test_a_log_that_cannot_be_read_is_one_line(tmp_path, monkeypatch):
    write(tmp_path, ranks=1)

    def refuse(path, *args):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(UserError, match=r"cannot read .*rank0.jsonl \(Permission denied\)"):
        LiveRun(tmp_path).look()
