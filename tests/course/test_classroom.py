"""`make class`: students get no solution, and nothing else is missing."""

import json
import re

import pytest

from ddp_lib.course.classroom import without_solutions, write_class
from ddp_lib.course.exercises import text
from ddp_lib.errors import UserError
from tests.lab.notebooks import NOTEBOOKS, make_cell, make_notebook
from tests.lab.project import ROOT

PLAN = ROOT / "docs" / "teaching.md"


def test_the_class_gets_all_but_the_solutions(tmp_path):
    write_class(ROOT / "notebooks", PLAN, tmp_path / "class")
    assert (tmp_path / "class" / "teacher" / PLAN.name).read_bytes() == PLAN.read_bytes()
    for path in NOTEBOOKS:
        assert (tmp_path / "class" / "teacher" / path.name).read_bytes() == path.read_bytes()
        student = json.loads((tmp_path / "class" / "student" / path.name).read_text())
        mine, whole = student["cells"], json.loads(path.read_text())["cells"]
        assert "Solution</summary>" not in json.dumps(student)
        code = [cell for cell in mine if cell["cell_type"] == "code"]
        assert code == [cell for cell in whole if cell["cell_type"] == "code"]
        lines = {line for cell in mine for line in text(cell).splitlines()}
        assert {line for cell in whole for line in text(cell).splitlines() if line.startswith("#")} <= lines
        assert any("**Onward" in line or "**The end" in line for line in lines) or path == NOTEBOOKS[-1]


def test_only_the_solution_goes():
    folded = "<details><summary>Solution</summary>\n\n```python\ny\n```\n</details>"
    hint = "<details><summary>Hint</summary>\n\nlook\n</details>"
    cells = [
        make_cell(1, folded, kind="markdown"),
        make_cell(1, f"{hint}\n\n{folded}\n\n**2.** Next", kind="markdown"),
        make_cell(1, "x = 1"),
    ]
    left = without_solutions(make_notebook(*cells))["cells"]
    assert [text(cell) for cell in left] == [f"{hint}\n\n**2.** Next", "x = 1"]


def test_a_folder_that_holds_something_is_not_written(tmp_path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(UserError, match="is not empty: give another folder"):
        write_class(ROOT / "notebooks", PLAN, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_the_plans_name_notebooks_that_are_there_and_add_up():
    plans = re.findall(
        r"^## [^\n]*\(([\d.]+) hours[^\n]*\n(.*?)^(?=## |The other)", PLAN.read_text(), re.M | re.S
    )
    assert len(plans) == 2
    for hours, rows in plans:
        table = re.findall(r"^\| (\d+) \| .* \| (\d\d)?", rows, re.M)
        numbers = {path.name[:2] for path in NOTEBOOKS}
        assert {number for _, number in table if number} <= numbers
        assert sum(int(minutes) for minutes, _ in table) == 60 * float(hours)
