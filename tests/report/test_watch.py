"""Where a run is shown while it goes on, and when the watching ends."""

import re
import threading
import time

import pytest

from ddp_lib import watch
from ddp_lib.errors import UserError
from ddp_lib.launch import main as launch
from ddp_lib.report import watch as module
from ddp_lib.report.live_run import LiveRun
from tests.lab.logs import finish, write


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "LOOK_S", 0.01)


def test_it_ends_when_the_run_ends(tmp_path, capsys):
    write(tmp_path, ranks=2)
    later = threading.Timer(0.3, finish, [tmp_path])
    later.start()
    watch(tmp_path)
    assert not later.is_alive()
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{tmp_path.name}: 2 ranks, step 59, epoch 1, loss 1.")
    assert last == f"{tmp_path}: finished, 2 ranks, 60 steps"


def test_it_may_begin_before_the_run(tmp_path, capsys):
    folder = tmp_path / "later"

    def train():
        write(folder, ranks=2)
        finish(folder, why="signal 15")

    later = threading.Timer(0.2, train)
    later.start()
    watch(folder)
    assert "waiting for the first step" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["no folder", "no log", "a file"])
def test_what_is_no_run_is_one_line(tmp_path, kind):
    folder = tmp_path / "run"
    if kind == "no log":
        folder.mkdir()
    elif kind == "a file":
        folder.write_text("")
    with pytest.raises(UserError, match="name the folder of a run"):
        watch(folder, wait_s=60 if kind == "a file" else 0.1)
    with pytest.raises(UserError, match="name the folder of a run"):
        module.watch_once(folder)
    with pytest.raises(UserError, match="wait_s is 0"):
        watch(folder, wait_s=0)


@pytest.mark.parametrize(("job", "since_s"), [("", 2), ("signed 0", 11)])
def test_a_run_that_has_died_is_watched_no_longer(tmp_path, capsys, job, since_s):
    write(tmp_path, ranks=2, since_s=since_s)
    if job:
        (tmp_path / ".job").write_text(job)
    watch(tmp_path, wait_s=1)
    assert re.search(
        rf"no line for {10 if job else 1} s, 2 ranks, 60 steps: it failed", capsys.readouterr().out
    )


def test_an_interrupt_ends_it_and_leaves_the_folder_as_it_is(tmp_path, capsys, monkeypatch):
    write(tmp_path, ranks=2)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupt)
    watch(tmp_path)
    assert "no longer watched; the run is not touched" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_lines_fit_and_name_the_ranks_to_look_at(tmp_path):
    write(
        tmp_path, ranks=30, change=lambda rank, n: {"data_s": 0.04, "compute_s": 0.01} if rank == 28 else {}
    )
    run = LiveRun(tmp_path)
    run.look()
    lines = module.table(run, 4)
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines[2:6]] == ["0", "1", "2", "28"]
    assert lines[5].endswith("!") and lines[6] == "     and 26 more ranks"
    assert lines[7].startswith("! rank 28 is slow")


def test_curves_have_one_scale_and_mark_what_is_not_finite(tmp_path):
    losses = {0: [8.0] * 40 + [0.0] * 20, 1: [4.0] * 57 + [float("nan")] * 3}
    run = LiveRun(write(tmp_path, ranks=2, change=lambda rank, n: {"loss": losses[rank][n]}))
    run.look()
    rows = module.table(run, 2, "_-=")[2:4]
    assert [row.split()[5] for row in rows] == ["=" * 13 + "-" + "_" * 6, "-" * 19 + "!"]
    assert max(map(len, rows)) <= 80


def test_a_warning_is_said_once_where_lines_are_appended(tmp_path, capsys):
    write(tmp_path, ranks=2, change=lambda rank, n: {"loss": float("nan")} if rank else {})
    run = LiveRun(tmp_path)
    run.look()
    lines = module._Lines(run)
    for _ in range(3):
        lines.show(False)
    assert capsys.readouterr().out.count("! the loss of rank 1 is not finite at step 0") == 1


def test_once_prints_one_line_per_rank(tmp_path, capsys):
    write(tmp_path, ranks=2, change=lambda rank, n: {"loss": 9.0 + n % 2} if rank else {}, since_s=30)
    assert launch.main(["watch", "--once", str(tmp_path)]) == 0
    lines = [dict(pair.split("=") for pair in line.split()) for line in capsys.readouterr().out.splitlines()]
    assert [line["rank"] for line in lines] == ["0", "1"]
    assert lines[0]["step"] == "59" and lines[0]["state"] == "running" and lines[0]["images/s"] == "196"
    assert lines[1]["loss"] == "9.5" and lines[1]["warnings"] == "silent,drift"


@pytest.mark.process
def test_a_cell_keeps_the_last_picture_and_what_nbval_may_compare(tmp_path):
    """nbval sees the first version of each output, and a notebook keeps the last: the texts are the same."""
    import nbformat
    from nbclient import NotebookClient

    write(tmp_path / "run", ranks=2)
    cell = nbformat.v4.new_code_cell("from ddp_lib import watch\nwatch('run')")
    notebook = nbformat.v4.new_notebook(cells=[cell])
    client = NotebookClient(notebook, timeout=120)
    seen, process = [], client.process_message

    def record(message, *args):
        seen.append((message["msg_type"], message["content"].get("data", {})))
        if "step 59" in str(message["content"]) and not (tmp_path / "end").exists():
            (tmp_path / "end").touch()
            threading.Timer(1, finish, [tmp_path / "run"]).start()
        return process(message, *args)

    client.process_message = record
    client.execute(cwd=str(tmp_path))
    shown = [data for kind, data in seen if kind == "display_data"]
    assert shown == [{"text/plain": ""}, {"text/plain": "<the run run>"}]
    updates = [data for kind, data in seen if kind == "update_display_data"]
    assert sum("image/png" in data for data in updates) >= 2  # while it went on, and the last one
    table, picture, line = cell.outputs
    assert picture["data"]["image/png"] and picture["data"]["text/plain"] == "<the run run>"
    assert table["data"] == {"text/plain": ""}
    assert line["text"] == "run: finished, 2 ranks, 60 steps\n"
