"""Which exercises of a class's notebooks are right.

A reader's answer is run in a kernel of its own, and judged by the course's own check: what the reader has
changed in it does not count. The kernel gets a time limit, an empty home, and no variable of this process but
those that Python needs. This is no sandbox: you run other people's code, with your rights.
"""

import asyncio
import json
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ddp_lib.course.exercises import Exercise, read_exercises, tags, text
from ddp_lib.errors import UserError

# What a kernel gets of this process's environment.
_KEPT = ("PATH", "PYTHONPATH", "LANG", "LC_ALL", "TMPDIR", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "SYSTEMROOT")
UNTOUCHED, RIGHT = "untouched", "right"


@dataclass(frozen=True)
class Grade:
    """notebook: its name without the ending. result: "right", "untouched", or why it is neither."""

    reader: str
    notebook: str
    number: int
    result: str


def grade(course: Path, folder: Path, timeout_s: float) -> list[Grade]:
    """The grade of each exercise of each reader: a folder in `folder`, or `folder` itself if it holds
    notebooks. timeout_s: for an answer. UserError if there is nothing to grade."""
    originals = {path.name: path for path in sorted(course.glob("*.ipynb"))}
    if not originals:
        raise UserError(f"{course} holds no notebooks: give the folder of the course")
    alone = any((folder / name).exists() for name in originals)
    readers = [folder] if alone else sorted(path for path in folder.glob("*") if path.is_dir())
    grades = []
    for reader in readers:
        for name, original in originals.items():
            if (reader / name).exists():
                results = asyncio.run(_grade_notebook(original, reader / name, timeout_s))
                grades += [Grade(reader.name, original.stem, n, result) for n, result in results.items()]
    if not grades:
        raise UserError(f"{folder} holds no notebook of the course, and no folder that does")
    return grades


async def _grade_notebook(original: Path, answered: Path, timeout_s: float) -> dict[int, str]:
    """Number of the exercise -> result."""
    setup, exercises = read_exercises(json.loads(original.read_text(encoding="utf-8")))
    try:
        cells = json.loads(answered.read_text(encoding="utf-8"))["cells"]
        answers = [text(cell) for cell in cells if "exercise" in tags(cell)]
    except (ValueError, KeyError, TypeError, AttributeError):
        return dict.fromkeys((e.number for e in exercises), f"{answered.name} is no notebook")
    if len(answers) != len(exercises):
        why = f"has {len(answers)} cells of exercises, the course has {len(exercises)}: answer in a new copy"
        return dict.fromkeys((e.number for e in exercises), why)
    results = {
        exercise.number: UNTOUCHED if answer.strip() == exercise.source.strip() else ""
        for exercise, answer in zip(exercises, answers, strict=True)
    }
    with tempfile.TemporaryDirectory(prefix="grade-") as home:
        while any(not result for result in results.values()):
            todo = [(e, answers[e.number - 1]) for e in exercises if not results[e.number]]
            await _judge(setup, todo, results, home, timeout_s)
    return results


async def _judge(
    setup: list[str], todo: list[tuple[Exercise, str]], results: dict[int, str], home: str, timeout_s: float
) -> None:
    """Fills in the results of all in `todo`, or up to one that ends the kernel or is not done in time."""
    from nbclient import NotebookClient
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from nbformat.v4 import new_code_cell, new_notebook

    notebook = new_notebook()
    client = NotebookClient(notebook, kernel_name="python3", timeout=timeout_s, allow_errors=True)
    manager = client.create_kernel_manager()
    manager.transport, manager.ip = "ipc", f"{home}/kernel"  # no port that other users could reach
    env = {name: os.environ[name] for name in _KEPT if name in os.environ}

    async def run(code: str) -> tuple[list[str], str]:
        """The lines that the code prints, and the error that ends it."""
        cell = new_code_cell(code)
        notebook.cells.append(cell)
        await client.async_execute_cell(cell, len(notebook.cells) - 1)
        lines = [line for o in cell.outputs if o.output_type == "stream" for line in o.text.splitlines()]
        errors = (f"{o.ename}: {o.evalue}" for o in cell.outputs if o.output_type == "error")
        error = next(errors, "").partition("\n")[0]
        return lines, re.sub(r"\(\d+\.py, ", "(", error)  # the name of a file that the kernel makes up

    number = todo[0][0].number
    try:
        env |= {"HOME": home, "IPYTHONDIR": home}
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        async with client.async_setup_kernel(env=env, cwd=home, **quiet):
            for source in setup:
                if error := (await run(source))[1]:
                    raise UserError(f"the course's own cells fail: {error}")
            for exercise, answer in todo:
                number = exercise.number
                lines, error = await run(answer)
                if not error:
                    lines, error = await run(exercise.judge)
                said = [line for line in lines if line.startswith(f"{number}: ")]
                results[number] = error or (said or ["printed nothing"])[-1].removeprefix(f"{number}: ")
    except CellTimeoutError:
        results[number] = f"not done within {timeout_s:g} s"
    except DeadKernelError:
        results[number] = "ends the kernel"


def table(grades: list[Grade]) -> list[str]:
    """Lines: for each reader how many are right in each notebook, and in all; then what is not right."""
    notebooks = sorted({grade.notebook for grade in grades})
    heads = [name.partition("_")[0] for name in notebooks]
    width = max(len("reader"), *(len(grade.reader) for grade in grades))
    lines = ["  ".join([f"{'reader':{width}}", *(f"{head:>5}" for head in heads), "right"])]
    readers = list(dict.fromkeys(grade.reader for grade in grades))
    for reader in readers:
        mine = [grade for grade in grades if grade.reader == reader]
        by_notebook = [[g.result == RIGHT for g in mine if g.notebook == name] for name in notebooks]
        counts = [f"{sum(right)}/{len(right)}" if right else "-" for right in by_notebook]
        total = sum(grade.result == RIGHT for grade in mine)
        words = [f"{reader:{width}}", *(f"{text:>5}" for text in counts), f"{total} of {len(mine)}"]
        lines.append("  ".join(words))
    for grade in grades:
        if grade.result not in (RIGHT, UNTOUCHED):
            lines.append(f"{grade.reader}, {grade.notebook}, exercise {grade.number}: {grade.result}")
    return lines
