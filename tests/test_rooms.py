"""The rooms of the package: imports point down, as README's map shows."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ddp_lib
from tests.lab.project import ROOT

PACKAGE = ROOT / "ddp_lib"

MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def rooms(readme: str) -> list[set[str]]:
    """The lines of README's map, from top to bottom: the rooms in each."""
    lines = re.search(r"^```text\n(launch .*?)^```", readme, re.M | re.S)[1].splitlines()
    by_line = []
    for line in lines:
        left = re.match(r"\w+(?: {3}\w+)*", line)[0]
        by_line.append(set(left.split()))
    return by_line


def room_of(module: str) -> str:
    """`run_dir` for ddp_lib.run_dir.log, `config` for ddp_lib.config."""
    return module.split(".")[1]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


def imported_modules(text: str) -> set[str]:
    """Modules of ddp_lib that the code imports, at its top, in a function, or by name as a string."""
    modules = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            modules |= {a.name for a in node.names if a.name.startswith("ddp_lib.")}
        elif isinstance(node, ast.ImportFrom) and node.level:
            modules.add("ddp_lib.(relative)")
        elif isinstance(node, ast.ImportFrom) and node.module == "ddp_lib":
            public = {a.name for a in node.names if a.name != "__version__"}
            modules |= {
                getattr(ddp_lib, name).__module__ if name in ddp_lib.__all__ else f"ddp_lib.{name}"
                for name in public
            }
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ddp_lib."):
            modules |= {f"{node.module}.{a.name}" for a in node.names} & set(map(module_of, MODULES))
            modules.add(node.module)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            modules |= set(re.findall(r"^ddp_lib\.[\w.]+$", node.value))  # as the fork server's preload
    return modules


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
            imported_modules(re.sub(r"\nif TYPE_CHECKING:\n( .*\n)+", "\n", path.read_text())) & names.keys()
        )
        - {name}
        for name, path in names.items()
    }
    graphlib.TopologicalSorter(needs).prepare()  # raises CycleError


@pytest.mark.parametrize("path", MODULES, ids=lambda path: module_of(path))
def test_a_long_file_says_why(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 300 or "Long because" in ast.get_docstring(ast.parse(text))


@pytest.mark.process
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
