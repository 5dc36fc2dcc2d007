"""`make class`: students get no solution, and nothing else is missing."""

import json
import re
import shutil
from itertools import pairwise

import pytest

from ddp_lib.course.classroom import without_solutions, write_class
from ddp_lib.course.copy import copy_course
from ddp_lib.course.exercises import read_exercises, tags, text
from ddp_lib.errors import UserError
from tests.lab.notebooks import NOTEBOOKS, make_cell, make_notebook
from tests.lab.project import ROOT

PLAN = ROOT / "docs" / "teaching.md"


def test_the_class_gets_all_but_the_solutions(class_folder):
    assert (class_folder / "teacher" / PLAN.name).read_bytes() == PLAN.read_bytes()
    for path in NOTEBOOKS:
        assert (class_folder / "teacher" / path.name).read_bytes() == path.read_bytes()
        student = json.loads((class_folder / "student" / path.name).read_text())
        mine, whole = student["cells"], json.loads(path.read_text())["cells"]
        assert "Solution</summary>" not in json.dumps(student)
        code = [cell for cell in mine if cell["cell_type"] == "code"]
        assert code == [cell for cell in whole if cell["cell_type"] == "code"]
        lines = {line for cell in mine for line in text(cell).splitlines()}
        assert {line for cell in whole for line in text(cell).splitlines() if line.startswith("#")} <= lines
        assert any("**Onward" in line or "**The end" in line for line in lines) or path == NOTEBOOKS[-1]


def test_a_students_folder_serves_as_the_readers_copy(class_folder, tmp_path):
    work = shutil.copytree(class_folder / "student", tmp_path / "work")
    assert copy_course(ROOT / "notebooks", work) == []  # nothing to copy, and nothing newer to offer
    assert "Solution</summary>" not in (work / NOTEBOOKS[0].name).read_text()


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


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_folded_hint_comes_before_each_place_to_write(path):
    """And gives nothing of the solution away; a student's copy has nothing else of it either."""
    notebook = json.loads(path.read_text())
    solutions = [exercise.solution for exercise in read_exercises(notebook)[1]]
    cells = without_solutions(notebook)["cells"]
    place = [number for number, cell in enumerate(cells) if "exercise" in tags(cell)]
    assert len(place) == len(solutions)
    for number, (start, end) in enumerate(pairwise([0, *place]), 1):
        above = "\n".join(text(cell) for cell in cells[start:end] if cell["cell_type"] == "markdown")
        asked = above[above.index(f"**{number} (") :]
        [hint] = re.findall(
            r"^<details><summary>Hint</summary>\n\n(.{20,300}?)\n</details>$", asked, re.S | re.M
        )
        assert not any(line in hint for line in map(str.strip, solutions[number - 1].splitlines()) if line)


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
