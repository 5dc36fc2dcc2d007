"""The project as a whole: what its files promise each other."""

import ast
import graphlib
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
from tests.lab.project import ROOT, make_targets

PACKAGE = ROOT / "ddp_lib"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


# The package


def rooms(readme: str) -> list[set[str]]:
    """The lines of README's map, from top to bottom: the rooms in each."""
    lines = re.search(r"^```text\n(launch .*?)^```", readme, re.M | re.S)[1].splitlines()
    found = []
    for line in lines:
        left = re.match(r"\w+(?: {3}\w+)*", line)[0]
        found.append(set(left.split()))
    return found


def room_of(module: str) -> str:
    """`run_dir` for ddp_lib.run_dir.log, `config` for ddp_lib.config."""
    return module.split(".")[1]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


def imported_modules(text: str) -> set[str]:
    """Modules of ddp_lib that the code imports, at its top, in a function, or by name as a string."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.startswith("ddp_lib.")}
        elif isinstance(node, ast.ImportFrom) and node.level:
            found.add("ddp_lib.(relative)")
        elif isinstance(node, ast.ImportFrom) and node.module == "ddp_lib":
            public = {a.name for a in node.names if a.name != "__version__"}
            found |= {
                getattr(ddp_lib, name).__module__ if name in ddp_lib.__all__ else f"ddp_lib.{name}"
                for name in public
            }
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ddp_lib."):
            found |= {f"{node.module}.{a.name}" for a in node.names} & set(map(module_of, MODULES))
            found.add(node.module)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= set(
                re.findall(r"^ddp_lib\.[\w.]+$", node.value)
            )  # as the fork server's preload
    return found


def upward(module: str, text: str, map_of_rooms: list[set[str]]) -> set[str]:
    """Imports that leave the module's room for one that is not below it."""
    room = room_of(module)
    level = next(number for number, line in enumerate(map_of_rooms) if room in line)
    below = set().union(*map_of_rooms[level + 1 :])
    return {name for name in imported_modules(text) if room_of(name) not in {room, *below}}


@pytest.fixture(scope="module")
def map_of_rooms() -> list[set[str]]:
    return rooms((ROOT / "README.md").read_text())


def test_every_room_is_on_the_map(map_of_rooms):
    there = [room for line in map_of_rooms for room in line]
    assert sorted(there) == sorted({room_of(module_of(path)) for path in MODULES})


@pytest.mark.parametrize("path", MODULES, ids=lambda path: module_of(path))
def test_imports_point_downward(path, map_of_rooms):
    assert upward(module_of(path), path.read_text(), map_of_rooms) == set()


@pytest.mark.parametrize(
    ("code", "seen"),
    [
        ("import ddp_lib.training.optim", {"ddp_lib.training.optim"}),
        ("def f():\n    from ddp_lib import fit", {"ddp_lib.train"}),
        (
            "from ddp_lib.run_dir import checkpoint",
            {"ddp_lib.run_dir", "ddp_lib.run_dir.checkpoint"},
        ),
        ("PRELOAD = ['ddp_lib.train']", {"ddp_lib.train"}),
        ("from ddp_lib.distributed import world\nimport ddp_lib.errors", set()),
    ],
)
def test_an_upward_import_is_seen(code, seen, map_of_rooms):
    assert upward("ddp_lib.distributed.addresses", code, map_of_rooms) == seen


def test_no_modules_import_each_other():
    """Neither a pair nor a longer ring, but for names that only type checkers read."""
    names = {module_of(path): path for path in MODULES}
    needs = {
        name: (
            imported_modules(re.sub(r"\nif TYPE_CHECKING:\n( .*\n)+", "\n", path.read_text()))
            & names.keys()
        )
        - {name}
        for name, path in names.items()
    }
    graphlib.TopologicalSorter(needs).prepare()  # raises CycleError


@pytest.mark.parametrize("path", MODULES, ids=lambda path: module_of(path))
def test_a_long_file_says_why(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 300 or "Long because" in ast.get_docstring(ast.parse(text))


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
