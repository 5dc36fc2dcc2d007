"""The exercises judge rightly."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lab.notebooks import NOTEBOOKS, code_cells, make_cell, make_notebook, read, source, tags
from tests.lab.project import ROOT

WRONG_ANSWERS = ROOT / "tests" / "course" / "exercises"

RUNNER = ROOT / "tests" / "lab" / "run_exercises.py"


@pytest.mark.ranks
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_exercises_judge_rightly(path, tmp_path):
    """The start and two wrong answers get "not yet", one that raises its error, the solution "right"."""
    done = run_exercises(path, WRONG_ANSWERS / f"{path.stem}.py", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    judged = [line for line in done.stdout.splitlines() if line.startswith("ok: ")]
    assert len(judged) == 5 * len(exercises(read(path))) + 1


def run_exercises(notebook: Path, wrong_answers: Path, folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(RUNNER), str(notebook), str(wrong_answers)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=500)


def exercises(notebook: dict) -> list[dict]:
    return [cell for cell in code_cells(notebook) if "exercise" in tags(cell)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_there_are_three_exercises_and_half_run_on_ranks(path):
    cells = exercises(read(path))
    on_ranks = [c for c in cells if re.search(r"\brun_(ranks|nodes)\(", source(c))]
    assert len(cells) >= 3
    assert len(on_ranks) >= len(cells) / 2


IMPORT = "from ddp_lib.course.cells import exercise, right_so_far"

FORM = ["def f():\n    return 0  # your code\n\n\n@exercise\n", "\n\n\ncheck_1(f)"]

CHECKS = {
    "good": "def check_1(f):\n    return f() == 1 or 'look again'",
    "lenient": "def check_1(f):\n    return f() > 0",
    "stern": "def check_1(f):\n    f()\n    return 'look again'",
    "kind": "def check_1(f):\n    return True",
    "silent": "def check_1(f):\n    f()",
    "hides": "def check_1(f):\n    try:\n        return f() == 1\n    except NameError:\n        return 0",
}


@pytest.mark.process
@pytest.mark.parametrize("check", CHECKS)
def test_an_exercise_that_judges_wrongly_is_seen(check, tmp_path):
    solution = "<details><summary>Solution</summary>\n\n```python\ndef f():\n    return one\n```\n</details>"
    cells = [
        make_cell(1, f"%matplotlib inline\n{IMPORT}\none = 1"),
        make_cell(2, "this cell is not executed"),
        make_cell(3, CHECKS[check].join(FORM), tags=["exercise"]),
        make_cell(4, solution, kind="markdown"),
        make_cell(5, "right_so_far(of=1)"),
    ]
    (tmp_path / "some.ipynb").write_text(json.dumps(make_notebook(*cells)))
    (tmp_path / "wrong.py").write_text(
        "def wrong_1_a():\n    return -1\n\n\ndef wrong_1_b():\n    return 2\n"
    )
    done = run_exercises(tmp_path / "some.ipynb", tmp_path / "wrong.py", tmp_path)
    assert done.returncode == (0 if check == "good" else 1), done.stderr
    assert done.stderr == ""
    assert ("FAILED: some wrong_1_b: 1: right" in done.stdout) == (check in ("lenient", "kind"))
    assert ("FAILED: some raises" in done.stdout) == (check in ("kind", "hides"))
