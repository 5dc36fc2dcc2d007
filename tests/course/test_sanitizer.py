"""What the comparison of outputs leaves out, and that it sees an altered number."""

import copy
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
from nbval.plugin import IPyNbCell, IPyNbFile, coalesce_streams, get_sanitize_patterns

from tests.lab.notebooks import (
    NOTEBOOKS,
    SANITIZER,
    STREAM,
    code_cells,
    is_compared,
    make_cell,
    make_notebook,
    read,
)


def broad_rules(rules: list[tuple[str, str]], proofs: list[str]) -> list[str]:
    """Rules of the sanitizer that touch what the notebooks prove, or that nothing needs."""
    broad = []
    for pattern, _ in rules:
        hits = [hit[0] for line in proofs for hit in re.finditer(pattern, line)]
        if not hits:
            broad.append(f"{pattern}: no output has it")
        # What may differ from run to run has digits, or a name that a digit is part of.
        if any(not re.search(r"\d", hit) or len(hit) > 40 or "\n" in hit for hit in hits):
            broad.append(f"{pattern}: takes words, or more than 40 characters")
        if any(re.fullmatch(r"[\d.,% ]+|True|False", hit) for hit in hits):
            broad.append(f"{pattern}: takes a bare number or a truth value")
    return broad


def compared_lines() -> Iterator[str]:
    for path in NOTEBOOKS:
        for cell in code_cells(read(path)):
            for output in cell["outputs"] if is_compared(cell) else []:
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


@pytest.fixture
def compared_cells(request, monkeypatch) -> Callable[[Path], list[IPyNbCell]]:
    """A notebook's cells as nbval compares them, with the course's sanitizer."""
    monkeypatch.setattr(request.config.option, "nbval_sanitize_with", str(SANITIZER))

    def cells(path: Path) -> list[IPyNbCell]:
        notebook = IPyNbFile.from_parent(request.session, path=path)
        notebook.setup_sanitize_files()
        return [item for item in notebook.collect() if is_compared(item.cell)]

    return cells


def altered(outputs: list) -> list:
    """The outputs with their first number altered; [] if they print no number."""
    changed = copy.deepcopy(outputs)
    for output in changed:
        if digit := re.search(r"\d", output.get("text", "")):
            text = output["text"]
            new = str(9 - int(digit[0]))
            output["text"] = text[: digit.start()] + new + text[digit.end() :]
            return changed
    return []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_an_altered_number_is_seen(path, compared_cells):
    """`make test` has run the notebook and found the committed outputs: what if they were others?"""
    seen = []
    for item in compared_cells(path):
        outputs = coalesce_streams(item.cell.outputs)
        if other := altered(outputs):
            assert item.compare_outputs(outputs, outputs)
            seen.append(not item.compare_outputs(outputs, other))
    assert seen and seen[0]
    assert sum(seen) >= 0.9 * len(seen)  # else the first number is one that may differ


@pytest.mark.process
def test_nbval_runs_the_cells_and_compares(tmp_path):
    """The whole way, with a kernel: the altered notebook differs, and nothing else."""
    texts = ["25\n", "port 41234\n", "26\n"]
    outputs = [{**STREAM, "text": [text]} for text in texts]
    cells = [
        make_cell(1, "print(25)", outputs=outputs[:1]),
        make_cell(2, "print('port 51234')", outputs=outputs[1:2]),
        make_cell(3, "print(25)", outputs=outputs[2:]),
    ]
    (tmp_path / "some.ipynb").write_text(json.dumps(make_notebook(*cells)))
    (tmp_path / "sanitize.cfg").write_text("[port]\nregex: port \\d+\nreplace: port\n")
    command = f"{sys.executable} -m pytest -q -p no:cacheprovider --junitxml report.xml --nbval"
    command += " --nbval-current-env --nbval-cell-timeout 180 --nbval-sanitize-with=sanitize.cfg"
    done = subprocess.run(
        [*command.split(), "some.ipynb"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=400,
    )
    cases = ElementTree.parse(tmp_path / "report.xml").iter("testcase")
    red = [case.find("failure") is not None for case in cases]
    assert red == [False, False, True], done.stdout
