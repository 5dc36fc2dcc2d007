"""Runs the exercises of one notebook: python run_exercises.py NOTEBOOK WRONG_ANSWERS

An exercise is a cell with the tag `exercise`, and the solution folded into the next cell. It may use
the names of the notebook's first code cell, of cells with the tag `exercise-setup`, and of exercises
before it: nothing else is executed here. Each is answered in four ways: the function as the reader
finds it and the two wrong answers (`wrong_N_a`, `wrong_N_b` in WRONG_ANSWERS) must give "N: not yet",
the solution "N: right". Prints a line for each, ends with status 1 if one is not as it must be.
"""

import ast
import contextlib
import io
import json
import re
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Exercise:
    """check: the name of the check_N that `source` calls; function: the name of what it checks."""

    number: int
    source: str
    solution: str
    check: str
    function: str


def text(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def tags(cell: dict[str, Any]) -> list[str]:
    return cell["metadata"].get("tags", [])


def read_exercise(number: int, source: str, after: str) -> Exercise:
    """ValueError if the two cells do not have the form that the readers know."""
    lines = source.strip().splitlines()
    call = re.fullmatch(r"(check_(\d+))\((\w+)\)", lines[-1])
    if not call or int(call[2]) != number:
        raise ValueError(f"exercise {number} does not end in check_{number}(your_function)")
    check, _, function = call.groups()
    if "# your code" not in source:
        raise ValueError(f"exercise {number} does not say where to write: # your code")
    solution = re.match(
        r"<details><summary>Solution</summary>\n\n```python\n(.*?)^```\n+</details>",
        after,
        re.S | re.M,
    )
    if not solution:
        raise ValueError(f"exercise {number} has no folded solution in the cell below")
    defined = {n.name for n in ast.parse(solution[1]).body if isinstance(n, ast.FunctionDef)}
    if function not in defined:
        raise ValueError(f"the solution of exercise {number} does not define {function}")
    return Exercise(number, source, solution[1], check, function)


def read_notebook(path: Path) -> tuple[list[str], list[Exercise]]:
    """What is executed first, cell by cell, and the exercises, both in the notebook's order."""
    cells = json.loads(path.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    before = [cell for cell in code if cell is code[0] or "exercise-setup" in tags(cell)]
    exercises: list[Exercise] = []
    for cell, after in zip(cells, [*cells[1:], {"source": ""}], strict=True):
        if "exercise" in tags(cell):
            exercises.append(read_exercise(len(exercises) + 1, text(cell), text(after)))
    # A line such as `%matplotlib inline` is for the notebook alone.
    return [re.sub(r"^%.*$", "", text(cell), flags=re.M) for cell in before], exercises


def execute(source: str, where: dict[str, Any], name: str) -> None:
    exec(compile(source, name, "exec"), where)


def last_line(source: str, where: dict[str, Any], name: str) -> str:
    """What `source` prints last, or the exception that leaves it."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            execute(source, where, name)
        except Exception as error:
            print("\nraised", traceback.format_exception_only(error)[-1].strip())
    return (printed.getvalue().strip().splitlines() or ["nothing"])[-1]


def main(notebook: Path, wrong_answers: Path) -> int:
    setup, exercises = read_notebook(notebook)
    names = vars(sys.modules["__main__"])
    for number, source in enumerate(setup, 1):
        execute(source, names, f"setup cell {number}")
    # As if defined in __main__ too, so that the ranks get these functions whole.
    wrong: dict[str, Any] = {"__name__": "__main__"}
    execute(wrong_answers.read_text(), wrong, str(wrong_answers))

    failures = 0
    for exercise in exercises:
        again = f"{exercise.check}({exercise.function})"
        file_name = f"exercise {exercise.number}"
        printed = {"untouched": last_line(exercise.source, names, file_name)}
        start = names[exercise.function]
        for name in (f"wrong_{exercise.number}_a", f"wrong_{exercise.number}_b"):
            names[exercise.function] = wrong[name]
            printed[name] = last_line(again, names, file_name)
        printed["solution"] = last_line(f"{exercise.solution}\n{again}", names, file_name)
        names[exercise.function] = start  # what comes next must not need this one solved
        for way, line in printed.items():
            wanted = f"{exercise.number}: right" if way == "solution" else f"{exercise.number}: not yet"
            good = line == wanted or (way != "solution" and line.startswith(f"{wanted}: "))
            failures += not good
            print(f"{'ok' if good else 'FAILED'}: {notebook.stem} {way}: {line}", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    # Imported, so that nothing a notebook defines in __main__ replaces a function of this file.
    import run_exercises

    sys.exit(run_exercises.main(Path(sys.argv[1]), Path(sys.argv[2])))
