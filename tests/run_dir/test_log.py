"""The run log: nothing that was written is lost, and whatever a kill left behind can be read."""

import json
import math

import pytest

from ddp_lib.errors import UserError
from ddp_lib.run_dir.log import RunLog, read_events, read_run

COLUMNS = "rank start epoch step samples loss lr data_s compute_s step_s time".split()


def step_line(step, loss=1.0, time=100.0, **changes):
    line = dict(epoch=step // 4, step=step, samples=8, loss=loss, lr=0.1)
    return line | dict(data_s=0.01, compute_s=0.02, step_s=0.03, time=time) | changes


def write_start(folder, rank, steps, loss=1.0, time=100.0, world_size=2):
    with RunLog(folder, rank) as log:
        log.start(step=steps[0], world_size=world_size, time=time)
        for step in steps:
            log.write(**step_line(step, loss, time + step))


def test_a_table_of_all_ranks_in_order(tmp_path):
    for rank in (10, 2, 0):
        write_start(tmp_path, rank, range(6), world_size=11)
    table = read_run(tmp_path)
    assert list(table.columns) == COLUMNS
    assert list(table["rank"]) == [0] * 6 + [2] * 6 + [10] * 6
    assert list(table["step"]) == [*range(6)] * 3
    assert [str(table[name].dtype) for name in COLUMNS] == ["int32"] * 5 + ["float64"] * 6


def test_each_line_is_in_the_file_at_once(tmp_path):
    log = RunLog(tmp_path, 0)
    log.start(step=0)
    for step in range(3):
        log.write(**step_line(step))
        assert len(read_run(tmp_path)) == step + 1
    log.close()


@pytest.mark.parametrize("kept", [1, 30, -1, -2])
def test_a_half_line_is_passed_over_and_ended_by_the_next_start(tmp_path, kept):
    write_start(tmp_path, 0, range(4))
    path = tmp_path / "rank0.jsonl"
    whole = path.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    path.write_bytes(whole[: -len(last)] + last[:kept])
    left = [0, 1, 2, 3] if kept == -1 else [0, 1, 2]  # -1: only the line's end is missing
    assert list(read_run(tmp_path)["step"]) == left
    write_start(tmp_path, 0, range(3, 6), loss=2.0)
    table = read_run(tmp_path)
    assert list(table["step"]) == [0, 1, 2, 3, 4, 5]
    assert list(table["loss"]) == [1.0, 1.0, 1.0, 2.0, 2.0, 2.0]


@pytest.mark.parametrize("garbage", [b'{"step": 1, "lo', b"\0" * 64, b"\xff\xfe{", b"12", b"null", b""])
def test_garbage_in_the_middle_is_passed_over(tmp_path, garbage):
    write_start(tmp_path, 0, range(2))
    with open(tmp_path / "rank0.jsonl", "ab") as file:
        file.write(garbage + b"\n")
    write_start(tmp_path, 0, range(2, 4))
    assert list(read_run(tmp_path)["step"]) == [0, 1, 2, 3]
    assert list(read_events(tmp_path)["start"]) == [0, 1]


def test_starts_are_numbered_also_after_a_half_written_start(tmp_path):
    write_start(tmp_path, 0, range(2))
    with open(tmp_path / "rank0.jsonl", "ab") as file:
        file.write(b'{"event": "start", "sta')
    write_start(tmp_path, 0, range(2, 4))
    assert list(read_run(tmp_path)["start"]) == [0, 0, 1, 1]


def test_steps_done_again_count_once(tmp_path):
    for rank in range(2):
        write_start(tmp_path, rank, range(6), loss=1.0, time=100)
        write_start(tmp_path, rank, range(4, 8), loss=2.0, time=200)
        write_start(tmp_path, rank, range(5, 9), loss=3.0, time=300)
    table = read_run(tmp_path)
    assert list(table["step"]) == [*range(9)] * 2
    assert list(table["loss"]) == [1.0, 1.0, 1.0, 1.0, 2.0, 3.0, 3.0, 3.0, 3.0] * 2
    full = read_run(tmp_path, superseded=True)
    assert list(full.columns) == [*COLUMNS, "superseded"]
    assert len(full) == 2 * (6 + 4 + 4)
    assert list(full.loc[(full["rank"] == 1) & (full["step"] == 5), "superseded"]) == [
        True,
        True,
        False,
    ]
    assert full[~full["superseded"]].drop(columns="superseded").reset_index(drop=True).equals(table)


def test_a_run_resumed_on_fewer_ranks_forgets_the_steps_of_those_that_are_gone(tmp_path):
    for rank in range(4):
        write_start(tmp_path, rank, range(6), time=100, world_size=4)
    for rank in range(2):
        write_start(tmp_path, rank, range(4, 8), time=200, world_size=2)
    table = read_run(tmp_path)
    assert table.groupby("rank")["step"].max().to_dict() == {0: 7, 1: 7, 2: 3, 3: 3}
    for rank in range(4):  # and back on four
        write_start(tmp_path, rank, range(8, 10), time=300, world_size=4)
    table = read_run(tmp_path)
    assert list(table.loc[table["rank"] == 3, "step"]) == [0, 1, 2, 3, 8, 9]
    assert read_run(tmp_path, superseded=True)["superseded"].sum() == 2 * 4


def test_numbers_that_are_not_finite_come_back(tmp_path):
    with RunLog(tmp_path, 0) as log:
        for step, loss in enumerate([math.nan, math.inf, -math.inf]):
            log.write(**step_line(step, loss))
    losses = list(read_run(tmp_path)["loss"])
    assert math.isnan(losses[0]) and losses[1:] == [math.inf, -math.inf]


def test_events_are_a_table_of_their_own(tmp_path):
    with RunLog(tmp_path, 0) as log:
        log.start(step=0, rank=0, host="a")
        log.write(**step_line(0))
        log.write(event="epoch", epoch=0, step=1, test_accuracy=0.5)
        log.write(event="end", step=1, why="finished")
    write_start(tmp_path, 1, range(1))
    events = read_events(tmp_path)
    assert list(events.columns[:3]) == ["event", "rank", "start"]
    assert list(events["event"]) == ["start", "epoch", "end", "start"]
    assert list(events["rank"]) == [0, 0, 0, 1]
    assert events.loc[events["event"] == "epoch", "test_accuracy"].item() == 0.5
    first = json.loads((tmp_path / "rank0.jsonl").read_text().splitlines()[0])
    assert first["event"] == "start" and first["start"] == 0 and first["host"] == "a"


def test_a_log_without_steps_is_an_empty_table(tmp_path):
    with RunLog(tmp_path, 0) as log:
        log.start(step=0)
    table = read_run(tmp_path)
    assert len(table) == 0 and list(table.columns) == COLUMNS


@pytest.mark.parametrize("read", [read_run, read_events])
def test_a_folder_without_logs_is_named(tmp_path, read):
    (tmp_path / "rank.jsonl").touch()
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(UserError, match=str(folder)) as caught:
            read(folder)
        assert "\n" not in str(caught.value)


def test_a_value_that_json_cannot_write_leaves_no_half_line(tmp_path):
    with RunLog(tmp_path, 0) as log:
        with pytest.raises(TypeError):
            log.write(step=object())
        log.write(**step_line(0))
    assert len(read_run(tmp_path)) == 1
