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
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PAGES = sorted(ROOT.glob("*.md"))

# From top to bottom: a module imports only from those below it.
ORDER = """
    launch check
    agent rank
    notebook local_ranks rehearsal rank_error rank_process
    train trainer plots
    runfolder console evaluation replica optim checkpoint runlog
    data folder cifar shapes cache sampler
    failure command stop
    model config
    world store place network
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


# The notebooks and the pages


def faults(notebook: dict) -> list[str]:
    """What keeps a notebook's committed outputs from being compared. nbval passes over a cell
    without an execution count, and over a command after `!` that fails."""
    found = []
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    code = [cell for cell in code if "".join(cell["source"]).strip()]
    counts = [cell["execution_count"] for cell in code]
    if counts != [*range(1, len(code) + 1)]:
        found.append(f"not run from top to bottom: execution counts {counts}")
    for number, cell in enumerate(code, 1):
        source, tags = "".join(cell["source"]), cell["metadata"].get("tags", [])
        ends_in_error = any(output["output_type"] == "error" for output in cell["outputs"])
        if ends_in_error != ("raises-exception" in tags):
            found.append(
                f"cell {number}: an error without the tag raises-exception, or the tag alone"
            )
        if re.search(r"^\s*!", source, re.M):
            found.append(f"cell {number}: a command after ! may fail unseen")
        if len(source.splitlines()) > 25:
            found.append(f"cell {number}: {len(source.splitlines())} lines")
        if len(re.findall(r"nbval-ignore-output|nbval-skip", " ".join(tags))) > 0 and (
            "assert" not in source
        ):
            found.append(f"cell {number}: its output is not compared, and it asserts nothing")
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_was_run_from_top_to_bottom(path):
    assert faults(json.loads(path.read_text())) == []


def test_an_unrun_notebook_is_seen():
    def cell(count, source="x = 1", tags=(), outputs=()):
        return {
            "cell_type": "code",
            "execution_count": count,
            "source": [source],
            "metadata": {"tags": [*tags]},
            "outputs": [*outputs],
        }

    error = {"output_type": "error"}
    good = [cell(1), cell(2, tags=["raises-exception"], outputs=[error]), cell(None, " ")]
    assert faults({"cells": good}) == []
    for bad in (
        cell(None),
        cell(3),
        cell(1, outputs=[error]),
        cell(1, tags=["raises-exception"]),
        cell(1, "!ls"),
        cell(1, "x = 1\n" * 26),
        cell(1, tags=["nbval-ignore-output"]),
    ):
        assert len(faults({"cells": [bad]})) == 1


def page_text(path: Path) -> str:
    if path.suffix != ".ipynb":
        return path.read_text()
    cells = json.loads(path.read_text())["cells"]
    return "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


def anchors(text: str) -> set[str]:
    """The ids that headings get on GitHub."""
    heads = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("path", PAGES + NOTEBOOKS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    text = page_text(path)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        there = path.parent / file if file else path
        assert there.exists(), target
        if anchor and path.suffix == there.suffix == ".md":
            assert anchor in anchors(there.read_text()), target


def code_in(text: str) -> list[str]:
    """Lines of code blocks, and pieces `between backticks`."""
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.M | re.S)
    rest = re.sub(r"^```[^\n]*\n(.*?)^```", "", text, flags=re.M | re.S)
    return [line for block in blocks for line in block.splitlines()] + re.findall(
        r"`([^`\n]+)`", rest
    )


@pytest.mark.parametrize("path", PAGES + NOTEBOOKS, ids=lambda path: path.name)
def test_named_make_targets_exist(path):
    named = {
        name
        for code in code_in(page_text(path))
        for name in re.findall(r"(?:^\s*|&& |; )make ([a-z][a-z-]*)", code)
    }
    assert named <= make_targets()


@pytest.mark.parametrize("path", PAGES + NOTEBOOKS, ids=lambda path: path.name)
def test_named_files_exist(path):
    """Paths between backticks that start with a folder of the project, and its top-level files."""
    ours = r"(?:ddp_lib|tests|notebooks|benchmarks|deploy|docs|\.ci)/[\w./-]*"
    top = r"Makefile|Dockerfile|LICENSE|[\w-]+\.(?:md|toml|yml|txt)"
    for code in code_in(page_text(path)):
        if re.fullmatch(f"{ours}|{top}", code):
            assert (ROOT / code).exists(), code
