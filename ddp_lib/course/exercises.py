"""The exercises of a notebook: where the reader writes, what is checked, and the solution."""

import ast
import re
from dataclasses import dataclass
from typing import Any

from ddp_lib.errors import UserError

Cell = dict[str, Any]  # of a notebook's file
PREPARE = "prepare"  # the tag of the cell that `make buttons` writes, which is no cell of the course


@dataclass(frozen=True)
class Exercise:
    """source: the cell as the reader finds it. function: the name of what the reader writes; `check` is the
    name of the check_N that the cell defines, and calls with it in its last line."""

    number: int
    source: str
    solution: str
    check: str
    function: str

    @property
    def call(self) -> str:
        return f"{self.check}({self.function})"

    @property
    def judge(self) -> str:
        """The cell without the reader's function: what decides whether an answer is right."""
        body = ast.parse(self.source).body
        kept = [part for part in body if getattr(part, "name", "") != self.function]
        return "\n".join(map(ast.unparse, kept))


def text(cell: Cell) -> str:
    return "".join(cell["source"])


def tags(cell: Cell) -> list[str]:
    return list(cell["metadata"].get("tags", []))


def read_exercise(number: int, source: str, after: str) -> Exercise:
    """From the exercise's cell and the one below it. UserError if they do not have the form that the readers
    know."""
    call = re.fullmatch(r"(check_(\d+))\((\w+)\)", source.strip().rpartition("\n")[2])
    if not call or int(call[2]) != number:
        raise UserError(f"exercise {number} does not end in check_{number}(your_function)")
    check, _, function = call.groups()
    if f"@exercise\ndef {check}(" not in source:
        raise UserError(f"{check} does not have the decorator @exercise")
    if "# your code" not in source:
        raise UserError(f"exercise {number} does not say where to write: # your code")
    folded = r"<details><summary>Solution</summary>\n\n```python\n(.*?)^```\n+</details>"
    solution = re.match(folded, after, re.S | re.M)
    if not solution:
        raise UserError(f"exercise {number} has no folded solution in the cell below")
    defined = {n.name for n in ast.parse(solution[1]).body if isinstance(n, ast.FunctionDef)}
    if function not in defined:
        raise UserError(f"the solution of exercise {number} does not define {function}")
    return Exercise(number, source, solution[1], check, function)


def read_exercises(notebook: Cell) -> tuple[list[str], list[Exercise]]:
    """What is executed first, cell by cell, and the exercises, both in the notebook's order.

    An exercise is a cell with the tag `exercise`. It may use the names of the notebook's first code cell, of
    cells with the tag `exercise-setup`, and of exercises before it, and nothing else.
    """
    cells = notebook["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code" and PREPARE not in tags(cell)]
    before = [cell for cell in code if cell is code[0] or "exercise-setup" in tags(cell)]
    exercises: list[Exercise] = []
    for cell, after in zip(cells, [*cells[1:], {"source": ""}], strict=True):
        if "exercise" in tags(cell):
            exercises.append(read_exercise(len(exercises) + 1, text(cell), text(after)))
    # A line such as `%matplotlib inline` is for the notebook alone.
    return [re.sub(r"^%.*$", "", text(cell), flags=re.M) for cell in before], exercises
