"""The commands and flags that README, CONTRIBUTING and the notebooks name exist."""

import re
import shlex
import subprocess
import sys
from functools import cache
from importlib.util import find_spec

import pytest

from ddp_lib.launch.options import LaunchOptions
from ddp_lib.launch.script import split
from tests.lab.own_script import EXAMPLES
from tests.lab.pages import code_in, each_page, page_text
from tests.lab.project import ROOT, make_targets

# Flags of other tools that the pages use; so a machine without these tools can check them too.
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
        "--time",
    },
    "git": {"--depth"},
    "kubectl": {"--filename", "--follow", "--namespace"},
    "nvidia-smi": {"--query-gpu", "--format"},
    "py-spy": {"--pid", "--native"},
    "sbatch": {"--nodes", "--ntasks-per-node", "--gpus-per-node", "--export", "--wait"},
    "srun": {"--nodes", "--ntasks", "--ntasks-per-node", "--export", "--gpus-per-task"},
    "sysctl": set(),
    "taskset": set(),
}


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
    unknown = []
    for part in re.split(r"&&|\|\||[;|]", line):
        try:
            words = shlex.split(part, comments=True)
        except ValueError:  # an apostrophe: no line of shell
            continue
        while words and re.fullmatch(r"[A-Z_][A-Z0-9_]*=.*|\$|sudo", words[0]):
            words.pop(0)
        if words:
            unknown += unknown_words(words[0].rpartition("/")[2], words[1:])
    return unknown


def unknown_words(name: str, words: list[str]) -> list[str]:
    """The same of a command and the words after it; the command that it starts included."""
    if name == "make":
        targets = {word for word in words if re.fullmatch(r"[a-z][a-z-]*", word)}
        return [f"make {target}" for target in targets - make_targets()]
    if name == "ddp-launch" and words[:1] == ["run"]:
        # Behind the script, the flags are its own.
        return unknown_flags("ddp-launch run", split(words[1:], LaunchOptions)[0])
    if name == "ddp-launch":
        return unknown_flags(f"ddp-launch {words[0]}", words[1:]) if words else []
    if name in ("python", "python3", "torchrun"):
        at = words.index("-m") if "-m" in words else len(words)
        unknown = unknown_flags(name, words[:at]) if name == "torchrun" else []
        module = words[at + 1 : at + 2]
        if module and module[0] != "pip" and find_spec(module[0]) is None:
            return [*unknown, f"-m {module[0]}"]
        ours = module and module[0].startswith("ddp_lib.")
        return unknown + (unknown_flags(module[0], words[at + 2 :]) if ours else [])
    if name in FOREIGN_FLAGS:
        inner = ("ddp-launch", "torchrun", "python", "python3")
        inside = (at for at, word in enumerate(words) if word in inner or word.endswith(".sbatch"))
        at = next(inside, len(words))
        unknown = [f"{name} {flag}" for flag in flags_in(words[:at]) - FOREIGN_FLAGS[name]]
        if at == len(words):
            return unknown
        if words[at].endswith(".sbatch"):  # our script gives its flags to the training
            return unknown + unknown_flags("ddp-launch train", words[at + 1 :])
        return unknown + unknown_words(words[at], words[at + 1 :])
    return []


def flags_in(words: list[str]) -> set[str]:
    return {word.partition("=")[0] for word in words if re.match(r"--[a-z]", word)}


def unknown_flags(command: str, words: list[str]) -> list[str]:
    known = flags_of(command)
    if known is None:
        return [command]
    return [f"{command} {flag}" for flag in flags_in(words) - known - {"--help"}]


@pytest.mark.process
@each_page
def test_named_commands_and_flags_exist(path):
    unknown = [word for line in code_in(page_text(path)) for word in unknown_in(line)]
    assert unknown == []


@pytest.mark.process
@each_page
def test_flags_named_alone_exist(path):
    """`--flag` between backticks, without its command."""
    ours = (*(f"ddp-launch {name}" for name in ("run", "train", "check", "plot", "watch")), "torchrun")
    known = set().union(*(flags_of(command) or () for command in ours), *FOREIGN_FLAGS.values())
    for script in EXAMPLES.glob("*.py"):
        known |= set(re.findall(r'add_argument\("(--[a-z-]+)"', script.read_text()))
    named = {
        flag for code in code_in(page_text(path)) for flag in re.findall(r"^(--[a-z][\w-]*)", code.strip())
    }
    assert named <= known


@pytest.mark.process
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
