"""The reader's own copy of the notebooks: nothing in it is ever written over."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ddp_lib.course.copy import copy_course
from ddp_lib.errors import UserError
from tests.lab.project import ROOT


def write(path: Path, text: str) -> None:
    cell = {"cell_type": "code", "source": [text], "outputs": [], "metadata": {}, "execution_count": None}
    path.write_text(json.dumps({"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))


@pytest.fixture
def course(tmp_path: Path) -> Path:
    folder = tmp_path / "notebooks"
    folder.mkdir()
    write(folder / "00_first.ipynb", "1")
    write(folder / "01_second.ipynb", "2")
    return folder


def test_answers_stay_when_the_course_changes(course, tmp_path):
    work = tmp_path / "work"
    assert copy_course(course, work)[0].startswith(f"{work}: copied all notebooks")
    write(work / "00_first.ipynb", "my answer")
    answer = (work / "00_first.ipynb").read_text()
    assert copy_course(course, work) == []  # the course has not changed
    write(course / "00_first.ipynb", "1, mended")
    write(course / "02_third.ipynb", "3")
    copied, newer = copy_course(course, work)
    assert "copied 02_third" in copied
    assert "newer versions of 00_first." in newer
    assert (work / "00_first.ipynb").read_text() == answer
    (work / "00_first.ipynb").rename(work / "mine.ipynb")
    assert "copied 00_first" in copy_course(course, work)[0]
    assert copy_course(course, work) == []


def test_new_outputs_are_no_change_of_the_course(course, tmp_path):
    copy_course(course, tmp_path / "work")
    notebook = json.loads((course / "00_first.ipynb").read_text())
    notebook["cells"][0]["execution_count"] = 3
    (course / "00_first.ipynb").write_text(json.dumps(notebook))
    assert copy_course(course, tmp_path / "work") == []


def test_a_fresh_copy_keeps_the_earlier_ones(course, tmp_path):
    work = tmp_path / "work"
    for _ in range(3):
        copy_course(course, work, fresh=True)
        write(work / "00_first.ipynb", "my answer")
    for kept in ("work", "work-1", "work-2"):
        assert "my answer" in (tmp_path / kept / "00_first.ipynb").read_text()


def test_what_cannot_be_copied_is_named(course, tmp_path):
    with pytest.raises(UserError, match="holds no notebooks"):
        copy_course(tmp_path, tmp_path / "work")
    (tmp_path / "work").write_text("a file")
    with pytest.raises(UserError, match=r"cannot copy the course .* File exists"):
        copy_course(course, tmp_path / "work")


@pytest.mark.process
def test_git_does_not_see_the_copies():
    paths = ["work/00_start_here.ipynb", "work-1/.copied.json", "wheels/x.whl"]
    seen = subprocess.run(["git", "check-ignore", *paths], cwd=ROOT, capture_output=True, text=True)
    assert seen.stdout.split() == paths


@pytest.mark.process
def test_the_command_is_one_line_where_it_fails(tmp_path):
    command = [sys.executable, "-m", "ddp_lib.course"]
    for words, said in (
        (["copy", str(tmp_path), "x"], "holds no notebooks"),
        (["copi"], "'copi' is no command"),
    ):
        done = subprocess.run([*command, *words], capture_output=True, text=True, cwd=ROOT)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert said in done.stderr
