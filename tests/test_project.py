"""The project as a whole: what its files promise each other."""

import json
import os
import re
import subprocess
import sys
import tomllib

import pytest
import yaml

from tests.lab.project import ROOT, make_targets


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_requirements_are_exact_and_nothing_but_pins():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    pattern = re.compile(r"([a-z0-9][a-z0-9-]*)==[0-9][0-9a-z.]*( ; [A-Za-z_.0-9'<>=!() -]+)?")
    wrong = [line for line in pins if not pattern.fullmatch(line)]
    assert not wrong
    assert not [line for line in lines if re.search(r"https?:|file:|/", line)]
    # A folder of wheels that 3.11.7 has filled is to serve 3.11.2.
    assert not [line for line in lines if re.search(r"'\d+\.\d+\.[1-9]", line)]
    names = {line.partition("==")[0] for line in pins}
    extras = project()["optional-dependencies"]
    direct = project()["dependencies"] + extras["notebooks"] + extras["dev"]
    assert {re.match(r"[a-z0-9-]+", need)[0] for need in direct} <= names


def test_conda_brings_python_and_pip_and_no_second_list_of_versions():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert set(environment) == {"name", "channels", "dependencies"}
    assert environment["channels"] == ["conda-forge", "nodefaults"]
    python, pip, section = environment["dependencies"]
    version = re.fullmatch(r"python=(\d+)\.(\d+)", python)
    lowest = re.fullmatch(r">=(\d+)\.(\d+)", project()["requires-python"])
    assert tuple(map(int, version.groups())) >= tuple(map(int, lowest.groups()))
    assert pip == "pip"
    assert section == {"pip": ["-r requirements.txt", "-e ."]}


def test_the_licence_is_whole():
    text = (ROOT / "LICENSE").read_text()
    assert text.split()[:5] == ["GNU", "AFFERO", "GENERAL", "PUBLIC", "LICENSE"]
    assert len(text.split()) == 5535 and "END OF TERMS AND CONDITIONS" in text
    assert project()["license"] == "AGPL-3.0-only"


def test_continuous_integration_runs_make_test():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().splitlines()[-1] == "make test"


@pytest.mark.process
def test_make_help_lists_every_target():
    done = subprocess.run(
        ["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    listed = {line.split()[1] for line in done.stdout.splitlines()}
    rules = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert listed == rules == make_targets()


def test_measured_figures_in_the_readme_are_those_of_the_results():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from report import IN_TABLES, RESULTS, body, main_figures

    readme = (ROOT / "README.md").read_text()
    marked = re.findall(r"<!-- (\w+): written by benchmarks/\1\.py -->", readme)
    assert set(marked) == {*IN_TABLES, "report"}
    results = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    for name in IN_TABLES:
        assert body(results[name]) in readme
    assert main_figures(results) in readme
