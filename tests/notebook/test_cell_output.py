"""The text of several ranks: the same whatever the order in which they printed."""

import io
import json
from contextlib import ExitStack

import pytest

from ddp_lib.notebook.cell_output import DISPLAY, CellOutput, RankOutput, fold, ranks_text


@pytest.mark.parametrize(
    ("sequences", "want"),
    [
        ({0: ["a", "b"], 1: ["a", "b"]}, ["0-1 a", "0-1 b"]),
        ({0: ["head", "a"], 1: ["a"]}, ["0 head", "0-1 a"]),
        ({0: ["x0", "end"], 1: ["x1", "end"]}, ["0 x0", "1 x1", "0-1 end"]),
        ({0: ["x", "y", "x"], 1: ["x"]}, ["0-1 x", "0 y", "0 x"]),
        ({0: ["a", "b"], 1: ["b", "a"]}, ["0 a", "0-1 b", "1 a"]),  # crossing
        ({0: ["a"], 1: [], 2: ["a"], 3: ["a"]}, ["0,2-3 a"]),
    ],
)
def test_equal_lines_are_folded(sequences, want):
    assert [f"{ranks_text(ranks).split()[1]} {line}" for ranks, line in fold(sequences)] == want


@pytest.fixture
def files(tmp_path):
    with ExitStack() as stack:
        yield {rank: stack.enter_context(open(tmp_path / f"rank{rank}", "a+b")) for rank in (0, 1)}


def write(file: io.BufferedRandom, text: str) -> None:
    file.write(text.encode())
    file.flush()


def test_a_display_stands_below_its_rank_and_a_progress_bar_is_one_line(files, capsys):
    output = CellOutput(files)
    picture = json.dumps([{"text/plain": "a picture"}, {}])
    write(files[0], "both\n\r 10%\r 50%\n[rank 0] own prefix")
    write(files[1], f"both\nunfinished{DISPLAY}{picture}\n")
    output.refresh(now=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:5] == [
        "[ranks 0-1] both",
        "[rank 0]  50%",
        "[rank 0] own prefix",
        "[rank 1] unfinished",
        "[rank 1] a picture",
    ]


def test_many_lines_and_long_ones_are_cut(files):
    output = RankOutput(0, files[0])
    write(files[0], "".join(f"{number}\n" for number in range(5000)) + "x" * 3_000_000)
    assert output.read()
    items = output.items()
    assert items[:2] == ["0", "1"] and items[500] == "... 4,000 lines left out ..."
    assert items[-2] == "4999" and items[-1] == "x" * 2000 and len(items) == 1002
