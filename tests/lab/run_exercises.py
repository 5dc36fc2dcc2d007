"""Runs the exercises of one notebook: python run_exercises.py NOTEBOOK WRONG_ANSWERS

Each exercise is answered in four ways: the function as the reader
finds it and the two wrong answers (`wrong_N_a`, `wrong_N_b` in WRONG_ANSWERS) must give "N: not yet",
the solution "N: right". Prints a line for each, ends with status 1 if one is not as it must be.
"""

import contextlib
import io
import json
import sys
import traceback
from pathlib import Path
from typing import Any

from ddp_lib.course.exercises import read_exercises


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
    setup, exercises = read_exercises(json.loads(notebook.read_text()))
    names = vars(sys.modules["__main__"])
    for number, source in enumerate(setup, 1):
        execute(source, names, f"setup cell {number}")
    # As if defined in __main__ too, so that the ranks get these functions whole.
    wrong: dict[str, Any] = {"__name__": "__main__"}
    execute(wrong_answers.read_text(), wrong, str(wrong_answers))

    failures = 0
    for exercise in exercises:
        again = exercise.call
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
