"""The notebooks: that their outputs are compared at all, and that their exercises judge rightly.

`make test` executes every notebook and compares it with its committed outputs; these tests hold what
that comparison rests on.
"""

import copy
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
from nbval.plugin import get_sanitize_patterns

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SANITIZER = ROOT / "notebooks" / "nbval_sanitize.cfg"
WRONG_ANSWERS = ROOT / "tests" / "course" / "exercises"
RUNNER = ROOT / "tests" / "lab" / "run_exercises.py"

LONGEST_CELL = 25  # lines; a list of imported names, one per line, counts once
UNCOMPARED = ("nbval-ignore-output", "nbval-skip")


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def code_cells(notebook: dict) -> list[dict]:
    """The cells that nbval runs: those of code that are not empty."""
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return [cell for cell in code if source(cell).strip()]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def tags(cell: dict) -> list[str]:
    return cell["metadata"].get("tags", [])


def is_compared(cell: dict) -> bool:
    return not set(UNCOMPARED) & set(tags(cell))


def prints(cell: dict) -> bool:
    return any(o["output_type"] in ("stream", "execute_result") for o in cell["outputs"])


# Outputs


def faults(notebook: dict) -> list[str]:
    """What keeps a notebook's committed outputs from being compared. nbval passes over a cell
    without an execution count, and over a command after `!` that fails."""
    found = []
    code = code_cells(notebook)
    counts = [cell["execution_count"] for cell in code]
    if counts != [*range(1, len(code) + 1)]:
        found.append(f"not run from top to bottom: execution counts {counts}")
    for number, cell in enumerate(code, 1):
        ends_in_error = any(output["output_type"] == "error" for output in cell["outputs"])
        if ends_in_error != ("raises-exception" in tags(cell)):
            found.append(
                f"cell {number}: an error without the tag raises-exception, or the tag alone"
            )
        if re.search(r"^\s*!", source(cell), re.M):
            found.append(f"cell {number}: a command after ! may fail unseen")
        text = re.sub(r"^(from \S+ import) \([^)]*\)", r"\1", source(cell), flags=re.M)
        if (lines := len(text.splitlines())) > LONGEST_CELL:
            found.append(f"cell {number}: {lines} lines")
        if not is_compared(cell) and not re.search(r"\bassert\b", source(cell)):
            found.append(f"cell {number}: its output is not compared, and it asserts nothing")
    printing = [cell for cell in code if prints(cell)]
    passed_over = sum(not is_compared(cell) for cell in printing)
    if passed_over > len(printing) / 4:
        found.append(f"{passed_over} of {len(printing)} cells that print are not compared")
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_was_run_from_top_to_bottom(path):
    assert faults(read(path)) == []


def made_up(*cells: dict) -> dict:
    return {"cells": [*cells], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


def cell(count, text="x = 1", tags=(), outputs=(), kind="code") -> dict:
    made = {"cell_type": kind, "source": [text], "metadata": {"tags": [*tags]}}
    return made | ({"execution_count": count, "outputs": [*outputs]} if kind == "code" else {})


STREAM = {"output_type": "stream", "name": "stdout", "text": ["1"]}
ERROR = {"output_type": "error", "ename": "E", "evalue": "", "traceback": []}
LOOSE = cell(1, "assert 1", tags=["nbval-ignore-output"], outputs=[STREAM])


def test_an_unrun_notebook_is_seen():
    tight = [cell(number, outputs=[STREAM]) for number in (2, 3, 4)]
    good = [LOOSE, *tight, cell(5, tags=["raises-exception"], outputs=[ERROR]), cell(None, " ")]
    assert faults(made_up(*good)) == []
    for bad in (
        [cell(None)],
        [cell(3)],
        [cell(1, outputs=[ERROR])],
        [cell(1, tags=["raises-exception"])],
        [cell(1, "!ls")],
        [cell(1, "x = 1\n" * 26)],
        [cell(1, tags=["nbval-ignore-output"])],
        [LOOSE, *tight[:2]],
    ):
        assert len(faults(made_up(*bad))) == 1


def broad_rules(rules: list[tuple[str, str]], proofs: list[str]) -> list[str]:
    """Rules of the sanitizer that touch what the notebooks prove, or that nothing needs."""
    found = []
    for pattern, _ in rules:
        hits = [hit[0] for line in proofs for hit in re.finditer(pattern, line)]
        if not hits:
            found.append(f"{pattern}: no output has it")
        # What may differ from run to run has digits, or a name that a digit is part of.
        if any(not re.search(r"\d", hit) or len(hit) > 40 or "\n" in hit for hit in hits):
            found.append(f"{pattern}: takes words, or more than 40 characters")
        if any(re.fullmatch(r"[\d.,% ]+|True|False", hit) for hit in hits):
            found.append(f"{pattern}: takes a bare number or a truth value")
    return found


def compared_lines() -> Iterator[str]:
    for path in NOTEBOOKS:
        for one in code_cells(read(path)):
            for output in one["outputs"] if is_compared(one) else []:
                yield from "".join(output.get("text", [])).splitlines()
                yield from "".join(output.get("data", {}).get("text/plain", [])).splitlines()


def test_the_sanitizer_takes_no_more_than_it_names():
    rules = get_sanitize_patterns(SANITIZER.read_text())
    assert SANITIZER.read_text().count("regex:") == len(rules), "a rule that nbval does not read"
    assert broad_rules(rules, [*compared_lines()]) == []


def test_a_broad_rule_of_the_sanitizer_is_seen():
    lines = ["rank 0: 0.25", "same: True", "listens on port 41234"]
    assert broad_rules([(r"port \d{4,5}", "port")], lines) == []
    for pattern in (".*", r"\d+\.\d+", "True|False", "same", r"pid \d+"):
        assert broad_rules([(pattern, "")], lines)


# A changed number


def altered(notebook: dict) -> tuple[dict, dict, int]:
    """The notebook up to the first compared output with a number; the same with that number
    altered; and the index of the cell, among those of code."""
    cut = copy.deepcopy(notebook)
    for at, one in enumerate(cut["cells"]):
        if one["cell_type"] != "code" or not is_compared(one):
            continue
        for number, output in enumerate(one["outputs"]):
            text = "".join(output.get("text", []))
            if digit := re.search(r"\d", text):
                cut["cells"] = cut["cells"][: at + 1]
                other = copy.deepcopy(cut)
                changed = text[: digit.start()] + str(9 - int(digit[0])) + text[digit.end() :]
                other["cells"][at]["outputs"][number]["text"] = [changed]
                return cut, other, len(code_cells(cut)) - 1
    raise ValueError("no compared output has a number")


@pytest.mark.ranks
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_an_altered_number_is_seen(path, tmp_path):
    cut, other, index = altered(read(path))
    (tmp_path / "cut.ipynb").write_text(json.dumps(cut))
    (tmp_path / "other.ipynb").write_text(json.dumps(other))
    command = f"{sys.executable} -m pytest -q -p no:cacheprovider --junitxml report.xml --nbval"
    command += f" --nbval-current-env --nbval-cell-timeout 180 --nbval-sanitize-with={SANITIZER}"
    done = subprocess.run(
        [*command.split(), "cut.ipynb", "other.ipynb"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=400,
    )
    cases = ElementTree.parse(tmp_path / "report.xml").iter("testcase")
    red = [case.find("failure") is not None for case in cases]
    assert red == [False] * (2 * index + 1) + [True], done.stdout


# Exercises


@pytest.mark.ranks
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_exercises_judge_rightly(path, tmp_path):
    """The start and two wrong answers get "not yet", the solution "right"."""
    done = run_exercises(path, WRONG_ANSWERS / f"{path.stem}.py", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    judged = [line for line in done.stdout.splitlines() if line.startswith("ok: ")]
    assert len(judged) == 4 * len(exercises(read(path)))


def run_exercises(notebook: Path, wrong_answers: Path, folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(RUNNER), str(notebook), str(wrong_answers)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=500)


def exercises(notebook: dict) -> list[dict]:
    return [cell for cell in code_cells(notebook) if "exercise" in tags(cell)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_there_are_three_exercises_and_half_run_on_ranks(path):
    found = exercises(read(path))
    on_ranks = [one for one in found if re.search(r"\brun_(ranks|nodes)\(", source(one))]
    assert len(found) >= 3
    assert len(on_ranks) >= len(found) / 2


FORM = ["def f():\n    return 0  # your code\n\n\n", "\n\ncheck_1(f)"]
CHECKS = {
    "good": "def check_1(f):\n    print('1:', 'right' if f() == 1 else 'not yet: look again')",
    "lenient": "def check_1(f):\n    print('1:', 'right' if f() > 0 else 'not yet')",
    "stern": "def check_1(f):\n    print('1: not yet')",
    "kind": "def check_1(f):\n    print('1: right')",
    "silent": "def check_1(f):\n    f()",
    "raises": "def check_1(f):\n    assert f() == 1\n    print('1: right')",
}


@pytest.mark.parametrize("check", CHECKS)
def test_an_exercise_that_judges_wrongly_is_seen(check, tmp_path):
    solution = "<details><summary>Solution</summary>\n\n```python\ndef f():\n    return one\n```\n</details>"
    cells = [
        cell(1, "%matplotlib inline\none = 1"),
        cell(2, "this cell is not executed"),
        cell(3, CHECKS[check].join(FORM), tags=["exercise"]),
        cell(4, solution, kind="markdown"),
    ]
    (tmp_path / "some.ipynb").write_text(json.dumps(made_up(*cells)))
    (tmp_path / "wrong.py").write_text(
        "def wrong_1_a():\n    return -1\n\n\ndef wrong_1_b():\n    return 2\n"
    )
    done = run_exercises(tmp_path / "some.ipynb", tmp_path / "wrong.py", tmp_path)
    assert done.returncode == (0 if check == "good" else 1), done.stderr
    assert done.stderr == ""
    assert ("FAILED: some wrong_1_b: 1: right" in done.stdout) == (check in ("lenient", "kind"))
