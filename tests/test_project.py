"""The project as a whole: what its files promise each other."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import ddp_lib

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "ddp_lib").glob("*.py"))

# From top to bottom: a module imports only from those below it.
ORDER = """
    launch check verdict dry_run
    agent rendezvous rank
    notebook local_ranks rehearsal rank_error rank_process
    train trainer plots
    steps runfolder keeper found logcopy console evaluation replica optim checkpoint runlog
    data folder cifar shapes cache sampler
    failure command stop forkserver
    model config scaling
    transfer world devices meeting store probe master place options network
    errors
""".split()


# The package


def imported_modules(path: Path) -> set[str]:
    """Modules of ddp_lib that the file imports, at its top or in a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name.partition(".")[2] for a in node.names if a.name.startswith("ddp_lib.")}
        elif isinstance(node, ast.ImportFrom) and node.level:
            found.add("(relative)")
        elif isinstance(node, ast.ImportFrom) and node.module == "ddp_lib":
            names = {a.name for a in node.names if a.name != "__version__"}
            found |= {ddp_lib._HOME.get(name, name) for name in names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ddp_lib."):
            found.add(node.module.split(".")[1])
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_imports_point_downward(path):
    if path.stem == "__init__":
        return
    assert path.stem in ORDER, f"give {path.name} its place in ORDER"
    below = set(ORDER[ORDER.index(path.stem) + 1 :])
    assert imported_modules(path) <= below


def test_an_upward_import_is_seen(tmp_path):
    path = tmp_path / "network.py"
    path.write_text("import ddp_lib.world\ndef f():\n    from ddp_lib import fit, checkpoint\n")
    assert imported_modules(path) == {"world", "train", "checkpoint"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_a_module_stays_small(path):
    assert len(path.read_text().splitlines()) <= 260


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import ddp_lib", "torch torchvision matplotlib pandas"),
        (f"from ddp_lib import {', '.join(ddp_lib.__all__)}", "torchvision matplotlib pandas"),
    ],
    ids=["package", "all names"],
)
def test_importing_is_cheap(code, absent):
    check = f"import sys; {code}; print(*(set({absent.split()}) & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert (done.stdout.strip(), done.stderr, done.returncode) == ("", "", 0)


# Installing


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_requirements_are_exact_and_nothing_but_pins():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    pattern = re.compile(r"([a-z0-9][a-z0-9-]*)==[0-9][0-9a-z.]*( ; [A-Za-z_.0-9'<>=!() -]+)?")
    wrong = [line for line in pins if not pattern.fullmatch(line)]
    assert not wrong
    assert not [line for line in lines if re.search(r"https?:|file:|/", line)]
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


def make_targets() -> set[str]:
    text = (ROOT / "Makefile").read_text()
    return set(re.search(r"^\.PHONY: (.*)$", text, re.M)[1].split())


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
    found = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    for name in IN_TABLES:
        assert body(found[name]) in readme
    assert main_figures(found) in readme
