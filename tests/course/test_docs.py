"""README, CONTRIBUTING and the notebooks' text: what they name is there."""

import json
import re
import shlex
import subprocess
import sys
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.lab.project import make_targets

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "notebooks").glob("*.ipynb"))]
each_page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)

# Of tools that a machine without them must still be able to check: what the pages use of each.
FOREIGN_FLAGS = {
    "apt": set(),
    "docker": {
        "--cap-add",
        "--gpus",
        "--ipc",
        "--network",
        "--rm",
        "--shm-size",
        "--env",
        "--volume",
        "--name",
        "--user",
        "--file",
        "--build-arg",
    },
    "git": {"--depth"},
    "kubectl": {"--filename", "--follow", "--namespace"},
    "nvidia-smi": {"--query-gpu", "--format"},
    "py-spy": {"--pid", "--native"},
    "sbatch": {"--nodes", "--ntasks-per-node", "--gpus-per-node", "--export", "--wait"},
    "srun": {"--nodes", "--ntasks", "--ntasks-per-node", "--export"},
    "sysctl": set(),
    "taskset": set(),
}


def page_text(path: Path) -> str:
    if path.suffix != ".ipynb":
        return path.read_text()
    cells = json.loads(path.read_text())["cells"]
    return "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


# Links


def anchors(path: Path) -> set[str]:
    """The ids that headings get: on GitHub for a page, in JupyterLab for a notebook."""
    text = re.sub(r"^```.*?^```", "", page_text(path), flags=re.M | re.S)
    heads = [head.replace("`", "").strip() for head in re.findall(r"^#+ (.+)$", text, re.M)]
    if path.suffix == ".ipynb":
        return {head.replace(" ", "-") for head in heads}
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def dead_links(path: Path) -> list[str]:
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page_text(path)):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        there = path.parent / file if file else path
        if not there.exists() or (anchor and anchor not in anchors(there)):
            dead.append(target)
    return dead


@each_page
def test_links_lead_somewhere(path):
    assert dead_links(path) == []


def test_a_dead_link_is_seen(tmp_path):
    notebook = {"cells": [{"cell_type": "markdown", "source": ["## Why `x` is late"]}]}
    (tmp_path / "there.ipynb").write_text(json.dumps(notebook))
    page = tmp_path / "page.md"
    page.write_text(
        "# All of it!\n[a](#all-of-it) [b](there.ipynb#Why-x-is-late) [c](https://x.org)\n"
        "[d](#all) [e](there.ipynb#Why) [f](gone.md)\n```\n# all\n```\n"
    )
    assert dead_links(page) == ["#all", "there.ipynb#Why", "gone.md"]


# Commands and their flags


def code_in(text: str) -> list[str]:
    """Lines of code blocks, those that end in a backslash joined, and pieces `between backticks`."""
    fenced = r"^ *```[^\n]*\n(.*?)^ *```"
    blocks = re.findall(fenced, text, re.M | re.S)
    rest = re.sub(fenced, "", text, flags=re.M | re.S)
    indented = re.findall(r"^    (\S[^\n]*)$", rest, re.M)
    lines = [line for b in blocks for line in re.sub(r"\\\n\s*", "", b).splitlines()]
    return lines + indented + re.findall(r"`([^`\n]+)`", rest)


@cache
def flags_of(command: str) -> set[str] | None:
    """The flags that a command of ours, or torchrun, lists in its help; None: no such command."""
    name, *rest = command.split()
    module = {"ddp-launch": "ddp_lib.launch", "torchrun": "torch.distributed.run"}.get(name, name)
    done = subprocess.run(
        [sys.executable, "-m", module, *rest, "--help"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )
    if done.returncode != 0:
        return None
    flags = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", done.stdout))
    return flags | {flag.replace("_", "-") for flag in flags}  # torchrun takes both


def unknown_in(line: str) -> list[str]:
    """The commands and flags in a line of shell that do not exist."""
    found = []
    for part in re.split(r"&&|\|\||[;|]", line):
        try:
            words = shlex.split(part, comments=True)
        except ValueError:  # an apostrophe: no line of shell
            continue
        while words and re.fullmatch(r"[A-Z_][A-Z0-9_]*=.*|\$|sudo", words[0]):
            words.pop(0)
        if words:
            found += unknown_words(words[0].rpartition("/")[2], words[1:])
    return found


def unknown_words(name: str, words: list[str]) -> list[str]:
    """The same of a command and the words after it; the command that it starts included."""
    if name == "make":
        targets = {word for word in words if re.fullmatch(r"[a-z][a-z-]*", word)}
        return [f"make {target}" for target in targets - make_targets()]
    if name == "ddp-launch":
        return unknown_flags(f"ddp-launch {words[0]}", words[1:]) if words else []
    if name in ("python", "python3", "torchrun"):
        at = words.index("-m") if "-m" in words else len(words)
        found = unknown_flags(name, words[:at]) if name == "torchrun" else []
        module = words[at + 1 : at + 2]
        if module and module[0] != "pip" and find_spec(module[0]) is None:
            return [*found, f"-m {module[0]}"]
        ours = module and module[0].startswith("ddp_lib.")
        return found + (unknown_flags(module[0], words[at + 2 :]) if ours else [])
    if name in FOREIGN_FLAGS:
        inner = ("ddp-launch", "torchrun", "python", "python3")
        inside = (at for at, word in enumerate(words) if word in inner or word.endswith(".sbatch"))
        at = next(inside, len(words))
        found = [f"{name} {flag}" for flag in flags_in(words[:at]) - FOREIGN_FLAGS[name]]
        if at == len(words):
            return found
        if words[at].endswith(".sbatch"):  # our script gives its flags to the training
            return found + unknown_flags("ddp-launch train", words[at + 1 :])
        return found + unknown_words(words[at], words[at + 1 :])
    return []


def flags_in(words: list[str]) -> set[str]:
    return {word.partition("=")[0] for word in words if re.match(r"--[a-z]", word)}


def unknown_flags(command: str, words: list[str]) -> list[str]:
    known = flags_of(command)
    if known is None:
        return [command]
    return [f"{command} {flag}" for flag in flags_in(words) - known - {"--help"}]


@each_page
def test_named_commands_and_flags_exist(path):
    unknown = [found for line in code_in(page_text(path)) for found in unknown_in(line)]
    assert unknown == []


@each_page
def test_flags_named_alone_exist(path):
    """`--flag` between backticks, without its command."""
    ours = ("ddp-launch train", "ddp-launch check", "ddp-launch plot", "torchrun")
    known = set().union(*(flags_of(command) or () for command in ours), *FOREIGN_FLAGS.values())
    named = {
        flag
        for code in code_in(page_text(path))
        for flag in re.findall(r"^(--[a-z][\w-]*)", code.strip())
    }
    assert named <= known


@pytest.mark.parametrize(
    ("line", "unknown"),
    [
        ("make test  # all", []),
        ("RANK=0 .venv/bin/ddp-launch train --epochs 3 && make demo", []),
        ("torchrun --nproc-per-node 2 -m ddp_lib.train --epochs 3", []),
        ("srun --nodes 2 ddp-launch train --lr 0.1", []),
        ("make nothing", ["make nothing"]),
        ("A=1 ddp-launch train --epoch 3", ["ddp-launch train --epoch"]),
        ("ddp-launch start", ["ddp-launch start"]),
        ("cd x && torchrun --procs 2 -m ddp_lib.train", ["torchrun --procs"]),
        ("torchrun -m ddp_lib.gone", ["-m ddp_lib.gone"]),
        ("srun --nodes 2 ddp-launch train --rate 1", ["ddp-launch train --rate"]),
        ("docker run --none image", ["docker --none"]),
    ],
)
def test_an_unknown_command_or_flag_is_seen(line, unknown):
    assert unknown_in(line) == unknown


# Files and names


@each_page
def test_named_files_exist(path):
    """Paths that start with a folder of the project, and its top-level files."""
    ours = r"(?:ddp_lib|tests|notebooks|benchmarks|deploy|docs|\.ci)/[\w./-]*"
    top = r"(?:Makefile|Dockerfile|LICENSE|[\w-]+\.(?:md|toml|yml|txt))"
    for code in code_in(page_text(path)):
        if re.fullmatch(top, code):
            assert (ROOT / code).exists(), code
        for named in re.findall(rf"(?<![\w./~-]){ours}", code):
            assert (ROOT / named.rstrip(".")).exists(), code


@each_page
def test_named_modules_and_functions_exist(path):
    """`ddp_lib.load_dataset`, `torch.distributed.all_reduce` and the like."""
    for code in code_in(page_text(path)):
        if re.fullmatch(r"(?:ddp_lib|torch)(?:\.[A-Za-z_]\w*)+(?:\(.*\))?", code):
            assert resolves(code.partition("(")[0]), code


def resolves(name: str) -> bool:
    module, *rest = name.split(".")
    found = import_module(module)
    for part in rest:
        if not hasattr(found, part):
            try:
                import_module(f"{found.__name__}.{part}")
            except (AttributeError, ImportError):
                return False
        found = getattr(found, part)
    return True


def test_a_name_that_is_gone_is_seen():
    assert resolves("ddp_lib.data.dataset.load_dataset") and resolves("torch.nn.Linear")
    assert not resolves("ddp_lib.data.dataset.gone") and not resolves("torch.gone.Linear")
