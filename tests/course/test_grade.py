"""`python -m ddp_lib.course grade`: right, half done, untouched, hanging, crashing, and worse."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ddp_lib.course.grade import Grade, grade, table
from ddp_lib.errors import UserError
from tests.lab.notebooks import make_cell, make_notebook
from tests.lab.project import ROOT

EXERCISE = """
def answer_{n}():
    return 0  # your code


@exercise
def check_{n}(answer):
    return answer() == {n} or "too small"


check_{n}(answer_{n})
"""
SOLUTION = """<details><summary>Solution</summary>

```python
def answer_{n}():
    return {n}
```
</details>"""
NAME = "00_first.ipynb"


def write(path: Path, *answers: str) -> None:
    """A notebook with two exercises, as they are or with these cells."""
    cells = [make_cell(1, "from ddp_lib.course.cells import exercise\none = 1")]
    for n in (1, 2):
        text = answers[n - 1] if answers and answers[n - 1] else EXERCISE.format(n=n)
        cells.append(make_cell(n + 1, text, tags=["exercise"]))
        cells.append(make_cell(n + 1, SOLUTION.format(n=n), kind="markdown"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(make_notebook(*cells)))


@pytest.mark.process
def test_every_reader_gets_a_grade(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "secret")
    course, readers = tmp_path / "notebooks", tmp_path / "class"
    write(course / NAME)
    first = "def answer_1():\n    return one"
    write(readers / "half" / NAME, first, "def answer_2():\n    return 1")
    write(readers / "none" / NAME)
    write(
        readers / "crash" / NAME, "import os\n\ndef answer_1():\n    os._exit(1)", "def answer_2():\n    1 /"
    )
    write(
        readers / "hang" / NAME,
        "def answer_1():\n    while True:\n        pass",
        "def answer_2():\n    return 2",
    )
    always_right = "def check_1(answer):\n    print('1: right')\n\n\ndef answer_1():\n    return 7"
    curious = "import os\n\n\ndef answer_2():\n    raise KeyError(os.environ.get('SECRET'), one)"
    write(readers / "cheat" / NAME, always_right, curious)
    readers.joinpath("torn").mkdir()
    readers.joinpath("torn", NAME).write_text("{")
    results = {(g.reader, g.number): g.result for g in grade(course, readers, 10)}
    assert results == {
        ("half", 1): "right",
        ("half", 2): "not yet: too small",
        ("none", 1): "untouched",
        ("none", 2): "untouched",
        ("crash", 1): "ends the kernel",
        ("crash", 2): "SyntaxError: invalid syntax (line 2)",
        ("hang", 1): "not done within 10 s",
        ("hang", 2): "right",
        ("cheat", 1): "not yet: too small",
        ("cheat", 2): "not yet: KeyError: (None, 1), line 5 in answer_2: " + curious.split("    ")[1],
        ("torn", 1): "00_first.ipynb is no notebook",
        ("torn", 2): "00_first.ipynb is no notebook",
    }


def test_a_folder_of_notebooks_is_one_reader(tmp_path):
    write(tmp_path / "notebooks" / NAME)
    write(tmp_path / "mine" / NAME)
    assert grade(tmp_path / "notebooks", tmp_path / "mine", 1) == [
        Grade("mine", "00_first", n, "untouched") for n in (1, 2)
    ]


def test_a_table_says_what_is_right_and_why_the_rest_is_not():
    grades = [Grade("anna", "00_first", 1, "right"), Grade("anna", "01_second", 1, "not yet: a hint")]
    grades.append(Grade("ben", "01_second", 1, "untouched"))
    assert table(grades) == [
        "reader     00     01  right",
        "anna      1/1    0/1  1 of 2",
        "ben         -    0/1  0 of 1",
        "anna, 01_second, exercise 1: not yet: a hint",
    ]


def test_a_lost_exercise_cell_is_named(tmp_path):
    write(tmp_path / "notebooks" / NAME)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / NAME).write_text(json.dumps(make_notebook(make_cell(1))))
    [first, _] = grade(tmp_path / "notebooks", tmp_path / "mine", 1)
    assert first.result == "has 0 cells of exercises, the course has 2: answer in a new copy"


def test_nothing_to_grade_is_named(tmp_path):
    with pytest.raises(UserError, match="holds no notebooks"):
        grade(tmp_path, tmp_path, 1)
    with pytest.raises(UserError, match="holds no notebook of the course"):
        grade(ROOT / "notebooks", tmp_path, 1)


@pytest.mark.process
def test_a_wrong_timeout_is_one_line(tmp_path):
    command = [sys.executable, "-m", "ddp_lib.course", "grade", str(tmp_path), "--timeout-s", "0"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "--timeout-s" in done.stderr
