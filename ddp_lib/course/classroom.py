"""The course for a class: notebooks without solutions for the students, with them for the teacher; slides."""

import json
import re
import shutil
from pathlib import Path

from ddp_lib.course.copy import COPIED, digest_of_cells
from ddp_lib.course.exercises import Cell, text
from ddp_lib.course.slides import write_slides
from ddp_lib.errors import UserError

_SOLUTION = re.compile(r"<details><summary>Solution</summary>.*?</details>\n*", re.S)


def write_class(course: Path, plan: Path, out: Path) -> list[str]:
    """Writes `out`/student, `out`/teacher with the plan, and `out`/slides; returns lines that say so.

    UserError if `out` holds something already, or cannot be written.
    """
    notebooks = sorted(course.glob("*.ipynb"))
    if not notebooks:
        raise UserError(f"{course} holds no notebooks: give the folder of the course")
    try:
        if out.exists() and any(out.iterdir()):
            raise UserError(f"{out} is not empty: give another folder, or empty it")
        for name in ("student", "teacher"):
            (out / name).mkdir(parents=True, exist_ok=True)
        for path in notebooks:
            shutil.copyfile(path, out / "teacher" / path.name)
            notebook = without_solutions(json.loads(path.read_text(encoding="utf-8")))
            written = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
            (out / "student" / path.name).write_text(written, encoding="utf-8")
        # student/ may become a reader's copy
        copied = {path.name: digest_of_cells(path) for path in notebooks}
        (out / "student" / COPIED).write_text(json.dumps(copied, indent=1) + "\n")
        shutil.copyfile(plan, out / "teacher" / plan.name)
        slides = write_slides(notebooks, out / "slides")
    except OSError as error:
        raise UserError(f"cannot write the class to {out}: {error}") from error
    return [
        f"{out / 'student'}: {len(notebooks)} notebooks with hints, without solutions",
        f"{out / 'teacher'}: the same with solutions, and {plan.name}, a plan for half a day and for a day",
        f"{out / 'slides' / 'index.html'}: {slides} slides of the main cells",
    ]


def without_solutions(notebook: Cell) -> Cell:
    """The notebook without the folded solutions; cells that held nothing else go too."""
    cells = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            left = _SOLUTION.sub("", text(cell)).strip("\n")
            if left != text(cell).strip("\n"):
                if not left:
                    continue
                cell = {**cell, "source": left.splitlines(keepends=True)}
        cells.append(cell)
    return {**notebook, "cells": cells}
