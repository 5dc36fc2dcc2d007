"""What the comparison of outputs leaves out, and that it sees an altered number."""

import copy
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from xml.etree import ElementTree

import pytest
from nbval.plugin import get_sanitize_patterns

from tests.lab.notebooks import NOTEBOOKS, SANITIZER, code_cells, is_compared, read


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


def altered(notebook: dict) -> tuple[dict, int]:
    """The notebook up to the first compared output with a number, and with that number altered; and
    the index of the cell, among those of code. (`make test` runs it unaltered.)"""
    cut = copy.deepcopy(notebook)
    for at, one in enumerate(cut["cells"]):
        if one["cell_type"] != "code" or not is_compared(one):
            continue
        for number, output in enumerate(one["outputs"]):
            text = "".join(output.get("text", []))
            if digit := re.search(r"\d", text):
                cut["cells"] = cut["cells"][: at + 1]
                changed = text[: digit.start()] + str(9 - int(digit[0])) + text[digit.end() :]
                cut["cells"][at]["outputs"][number]["text"] = [changed]
                return cut, len(code_cells(cut)) - 1
    raise ValueError("no compared output has a number")


@pytest.mark.ranks
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_an_altered_number_is_seen(path, tmp_path):
    other, index = altered(read(path))
    (tmp_path / "other.ipynb").write_text(json.dumps(other))
    command = f"{sys.executable} -m pytest -q -p no:cacheprovider --junitxml report.xml --nbval"
    command += f" --nbval-current-env --nbval-cell-timeout 180 --nbval-sanitize-with={SANITIZER}"
    done = subprocess.run(
        [*command.split(), "other.ipynb"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=400,
    )
    cases = ElementTree.parse(tmp_path / "report.xml").iter("testcase")
    red = [case.find("failure") is not None for case in cases]
    assert red == [False] * index + [True], done.stdout
