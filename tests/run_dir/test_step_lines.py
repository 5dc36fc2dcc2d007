"""Many lines read at once are what json.loads makes of each, to the last bit, whatever the file holds."""

import json
import math
import os
import random
import signal
import struct
from concurrent.futures import ProcessPoolExecutor

import pandas as pd
import pytest

from ddp_lib.errors import TransientError
from ddp_lib.run_dir import log, step_lines
from ddp_lib.run_dir.log import read_events, read_run

RANDOM = random.Random(1)
FLOATS = [
    0.0,
    -0.0,
    1.0,
    -2.5,
    1e-5,
    5e-324,
    1e22,
    123.456,
    0.1 + 0.2,
    1e-4,
    9.999e-5,
    math.nan,
    math.inf,
    -math.inf,
]
FLOATS += [
    2.0**53 + 2,
    9007199254740993.0,
    1 / 3,
    2 / 3e5,
    1.7e9 + 1 / 3,
    12,
    10**9,
    0.30000000000000004,
    1e16,
]
FLOATS += [RANDOM.random() * 10.0 ** RANDOM.randrange(-8, 8) for _ in range(2000)]
FLOATS += struct.unpack("<500f", struct.pack("<500f", *(RANDOM.random() for _ in range(500))))


def step_line(step: int, **changes) -> dict:
    line = {"epoch": 0, "step": step, "samples": 8, "loss": 1.5, "lr": 0.1}
    return line | {"data_s": 0.01, "compute_s": 0.02, "step_s": 0.03, "time": 1.7e9 + step} | changes


def end_this_process(path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def by_json(path) -> pd.DataFrame:
    """The steps of a log in its order, read line by line."""
    rows, start = [], 0
    for text in path.read_bytes().split(b"\n"):
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and line.get("event") == "start":
            start = line.get("start", 0)
        if isinstance(line, dict) and "event" not in line and line.keys() >= step_line(0).keys():
            rows.append({**line, "start": start})
    return pd.DataFrame(rows, columns=list(step_lines.TYPES)).astype(step_lines.TYPES)


def same(path) -> None:
    pd.testing.assert_frame_equal(
        pd.DataFrame(step_lines.read_steps(path)[0]), by_json(path), check_exact=True
    )


@pytest.mark.parametrize("name", [name for name, kind in step_lines.TYPES.items() if kind == "float64"])
def test_every_float_comes_back_to_the_last_bit(tmp_path, name):
    lines = [json.dumps(step_line(step, **{name: value})) for step, value in enumerate(FLOATS)]
    path = tmp_path / "rank0.jsonl"
    path.write_text("\n".join(lines) + "\n")
    same(path)


ODD = [
    b"",
    b"{",
    b"null",
    b"12",
    b"\xff\xfe{",
    b"\0" * 64,
    b"," * 8,
    json.dumps(step_line(3)).encode()[:60],
    json.dumps(step_line(3)).encode()[:-1],
    json.dumps(step_line(3)).encode() + b"\r",
    json.dumps(step_line(3), separators=(",", ":")).encode(),
    json.dumps(dict(reversed(step_line(3).items()))).encode(),
    json.dumps({**step_line(3), "more": 1}).encode(),
    json.dumps({"step": 3, **step_line(3)}).encode(),
    json.dumps({**step_line(3), "event": "mine"}).encode(),
    json.dumps(step_line(10**9, epoch=-1, samples=10**8)).encode(),
    json.dumps(step_line(3)).replace("1.5", "1.5e0").encode(),
    json.dumps(step_line(3)).replace("1.5", "01.5").encode(),
    json.dumps(step_line(3)).replace("1.5", "1.").encode(),
    json.dumps(step_line(3)).replace("1.5", ".5").encode(),
    json.dumps(step_line(3)).replace("1.5", "1x5").encode(),
    json.dumps(step_line(3)).replace("1.5", "1." + "5" * 40).encode(),
    json.dumps(step_line(3)).replace("1.5", "1" * 30).encode(),
    json.dumps(step_line(3)).replace("1.5", "Na1").encode(),
    json.dumps(step_line(3)).replace('"step": 3', '"step": 03').encode(),
    json.dumps(step_line(3)).replace('"lr"', '"1r"').encode(),
    b'{"event": "start", "start": 1, "step": 3, "time": 1}',
    b'{"event": "epoch", "a": 1, "b": 2, "c": 3, "d": 4, "e": 5, "f": 6, "g": 7}',
]


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("end", [b"\n", b""])
@pytest.mark.parametrize("block", [2**20, 7])
def test_odd_lines_are_read_or_passed_over_as_by_json(tmp_path, monkeypatch, odd, end, block):
    monkeypatch.setattr(step_lines, "_BLOCK", block)
    lines = [json.dumps(step_line(step)).encode() for step in range(3)]
    path = tmp_path / "rank0.jsonl"
    path.write_bytes(b"\n".join([*lines, odd, *lines, odd]) + end)
    same(path)
    events = [json.loads(text) for text in path.read_bytes().split(b"\n") if b'"event"' in text]
    assert list(step_lines.read_events(path)) == events


def test_steps_out_of_order_and_of_several_ranks_come_in_order(tmp_path):
    for rank in (10, 2):
        lines = [step_line(step, loss=float(rank)) for step in (5, 3, 4, 4)]
        (tmp_path / f"rank{rank}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    table = read_run(tmp_path)
    assert table[["rank", "step"]].values.tolist() == [[rank, step] for rank in (2, 10) for step in (3, 4, 5)]
    assert read_run(tmp_path, superseded=True)["superseded"].tolist() == [False, True, False, False] * 2
    assert read_events(tmp_path).empty


@pytest.mark.process
def test_long_logs_are_read_by_several_processes_with_the_same_result(tmp_path, monkeypatch):
    for rank in range(3):
        lines = [step_line(step, loss=rank + 0.1) for step in range(50)]
        (tmp_path / f"rank{rank}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    alone = read_run(tmp_path)
    pools = []

    class Pool(ProcessPoolExecutor):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            pools.append(self)

    monkeypatch.setattr(log, "_LONG", 0)
    monkeypatch.setattr(log, "ProcessPoolExecutor", Pool)
    pd.testing.assert_frame_equal(read_run(tmp_path), alone)
    assert len(pools) == 1


@pytest.mark.process
def test_a_reading_process_that_is_ended_is_said_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "rank0.jsonl").write_text(json.dumps(step_line(0)))
    monkeypatch.setattr(log, "_LONG", 0)
    monkeypatch.setattr(step_lines, "read_steps", end_this_process)
    with pytest.raises(TransientError, match="ended, perhaps for want of memory: free some"):
        read_run(tmp_path)
