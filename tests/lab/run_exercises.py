"""Runs the exercises of one notebook: python run_exercises.py NOTEBOOK WRONG_ANSWERS

Each exercise is answered in five ways: the function as the reader finds it and the two wrong answers
(`wrong_N_a`, `wrong_N_b` in WRONG_ANSWERS) must give "N: not yet", one that raises an exception must show it
and its line, and the solution must give "N: right". Then the notebook's last code cell must count all as
right. Prints a line for each, ends with status 1 if one is not as it must be.
"""

import ast
import contextlib
import io
import json
import linecache
import re
import sys
import traceback
from pathlib import Path
from typing import Any

from ddp_lib.course.exercises import Exercise, read_exercises, text


def execute(source: str, where: dict[str, Any], name: str) -> None:
    linecache.cache[name] = len(source), None, source.splitlines(keepends=True), name
    exec(compile(source, name, "exec"), where)


def last_line(source: str, where: dict[str, Any], name: str) -> str:
    """What `source` prints last, without the stacks of ranks that hang; or the exception that leaves it."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            execute(source, where, name)
        except Exception as error:
            print("\nraised", traceback.format_exception_only(error)[-1].strip())
    lines = printed.getvalue().splitlines()
    return next((line for line in reversed(lines) if re.match(r"\d+: |\d+ of |raised ", line)), "nothing")


def raising(exercise: Exercise) -> str:
    """The reader's function with a misspelt name in it, in line 2."""
    defined = {part.name: part for part in ast.parse(exercise.source).body if hasattr(part, "name")}
    return f"def {exercise.function}({ast.unparse(defined[exercise.function].args)}):\n    return misspelt"


def is_good(line: str, way: str, number: int) -> bool:
    if way == "solution":
        return line == f"{number}: right"
    if way == "raises":
        shown = r"(rank \d+: )?NameError: name 'misspelt' is not defined, .*\bline 2 in \w+: return misspelt"
        return bool(re.fullmatch(f"{number}: not yet: {shown}", line))
    return line == f"{number}: not yet" or line.startswith(f"{number}: not yet: ")


def main(notebook: Path, wrong_answers: Path) -> int:
    cells = json.loads(notebook.read_text())
    setup, exercises = read_exercises(cells)
    names = vars(sys.modules["__main__"])
    for number, source in enumerate(setup, 1):
        execute(source, names, f"setup cell {number}")
    # As if defined in __main__ too, so that the ranks get these functions whole.
    wrong: dict[str, Any] = {"__name__": "__main__"}
    execute(wrong_answers.read_text(), wrong, str(wrong_answers))

    results = []
    for exercise in exercises:
        again = exercise.call
        file_name = f"exercise {exercise.number}"
        printed = {"untouched": last_line(exercise.source, names, file_name)}
        start = names[exercise.function]
        for name in (f"wrong_{exercise.number}_a", f"wrong_{exercise.number}_b"):
            names[exercise.function] = wrong[name]
            printed[name] = last_line(again, names, file_name)
        printed["raises"] = last_line(f"{raising(exercise)}\n{again}", names, file_name)
        printed["solution"] = last_line(f"{exercise.solution}\n{again}", names, file_name)
        names[exercise.function] = start  # what comes next must not need this one solved
        results += [(way, line, is_good(line, way, exercise.number)) for way, line in printed.items()]
    last = last_line(
        [text(cell) for cell in cells["cells"] if cell["cell_type"] == "code"][-1], names, "last"
    )
    results.append(("last cell", last, last == f"{len(exercises)} of {len(exercises)} right"))
    for way, line, good in results:
        print(f"{'ok' if good else 'FAILED'}: {notebook.stem} {way}: {line}")
    return 0 if all(good for *_, good in results) else 1


if __name__ == "__main__":
    # Imported, so that nothing a notebook defines in __main__ replaces a function of this file.
    import run_exercises

    sys.exit(run_exercises.main(Path(sys.argv[1]), Path(sys.argv[2])))
