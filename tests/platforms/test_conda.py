"""environment.yml, by conda's own parser and by pip."""

import json
import shlex
import subprocess
import sys
from typing import Any

import pytest
import yaml
from rattler import MatchSpec

from tests.lab.project import ROOT

Spec = str | dict[str, list[str]]


def dependencies() -> list[Spec]:
    specs: list[Spec] = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    return specs


def wrong_specs(specs: list[Spec]) -> list[str]:
    wrong = []
    for spec in specs:
        if isinstance(spec, str):
            try:
                MatchSpec(spec, strict=True)
            except Exception as error:
                wrong.append(f"{spec}: {error}")
    return wrong


def dry_run(lines: list[str]) -> "subprocess.CompletedProcess[str]":
    """What pip would install for these lines of a pip section."""
    command = [sys.executable, *"-m pip install --dry-run --quiet --report -".split()]
    words = [word for line in lines for word in shlex.split(line)]
    return subprocess.run(
        [*command, "--no-build-isolation", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_conda_understands_each_spec():
    assert wrong_specs(dependencies()) == []


@pytest.mark.process
def test_pip_resolves_its_section():
    section: Any = dependencies()[-1]
    done = dry_run(section["pip"])
    assert done.returncode == 0, done.stderr
    names = [item["metadata"]["name"] for item in json.loads(done.stdout)["install"]]
    assert "ddp-lib" in names


@pytest.mark.parametrize("spec", ["python=>3.11", "python 3.11 x y", "py thon=3.11", "pip>=>23"])
def test_a_wrong_spec_is_seen(spec):
    assert len(wrong_specs([spec])) == 1


@pytest.mark.process
@pytest.mark.parametrize("line", ["torch==99", "-r requirement.txt", "torch=>2", "-e ./nowhere"])
def test_a_wrong_pip_line_is_seen(line):
    assert dry_run([line]).returncode != 0
