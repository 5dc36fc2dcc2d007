"""ddp-launch: its commands, and the flags of each."""

import gc
import os
import platform
import signal
import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import tyro

from ddp_lib import __version__
from ddp_lib.cli import parse
from ddp_lib.config import PER_MACHINE, TrainConfig
from ddp_lib.distributed.addresses import parse_endpoint
from ddp_lib.errors import UserError, require_seconds
from ddp_lib.launch.options import (
    CheckOptions,
    LaunchOptions,
    ScriptOptions,
    Switch,
    count_ranks,
    read_launch,
    read_nproc,
)
from ddp_lib.launch.ranks import ForkedRanks, ScriptRanks
from ddp_lib.launch.script import name_of, read_script, split
from ddp_lib.launch.start import start_agent, telling_others
from ddp_lib.processes.exit_status import as_exit_status, require_working_directory
from ddp_lib.processes.forkserver import collect_garbage

USAGE = """usage: ddp-launch {run,train,check,plot,watch,stacks,join} ...

  run     run a script of yours on this machine or on several: ddp-launch run --help
  train   run this package's own training: ddp-launch train --help
  check   on every machine: say why they would not train together: ddp-launch check --help
  plot    draw a run's losses, accuracy and speed: ddp-launch plot --help
  watch   say what each rank of a run does now, until the run ends: ddp-launch watch --help
  stacks  say where each rank of this machine stands now: ddp-launch stacks
  join    start ranks here for the cells of a notebook elsewhere: ddp-launch join --help

ddp-launch --version names the versions of ddp_lib, torch and Python.
"""
# What a rank needs, imported before it is forked. DDP imports torch._dynamo when it wraps its first model.
PRELOAD = ["ddp_lib.train", "torch._dynamo"]


@dataclass(frozen=True)
class RunCommand:
    """Runs a script, as torchrun does, as the ranks of this machine, or of several machines together:

    ddp-launch run [flags] SCRIPT [the script's flags], or: ddp-launch run [flags] -m MODULE [its flags]
    """

    launch: LaunchOptions
    script: ScriptOptions


@dataclass(frozen=True)
class TrainCommand:
    """Trains on this machine, or on several."""

    launch: LaunchOptions
    training: TrainConfig


@dataclass(frozen=True)
class CheckCommand:
    """Says why machines would not train together; run it on every one of them."""

    launch: LaunchOptions
    check: CheckOptions


@dataclass(frozen=True)
class StacksOptions:
    """Says where each rank of this machine stands now, also one that is blocked."""

    timeout_s: float = 10.0
    """Seconds to wait for each rank's stack."""

    def __post_init__(self) -> None:
        require_seconds("--timeout-s", self.timeout_s)


@dataclass(frozen=True)
class PlotOptions:
    """Draws a run's losses, accuracy and speed."""

    run_dir: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    """Folder of the run."""
    out: str = ""
    """File to write; loss.png in the run's folder if not given."""


@dataclass(frozen=True)
class WatchOptions:
    """Says what each rank of a run does now, until the run ends, and what a person should look at."""

    run_dir: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    """Folder of the run, which may begin later."""
    once: Switch = 0
    """Print one line per rank, for scripts, and end."""
    wait_s: float = 60.0
    """Seconds without a new line after which a run that no job has is taken to have ended."""


@dataclass(frozen=True)
class JoinOptions:
    """Starts ranks on this machine for a notebook elsewhere; `%ranks --nnodes` prints the line to type."""

    endpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="HOST:PORT")]
    """Address of the notebook's machine."""
    token: str
    """What %ranks has printed: it proves to both sides that they mean each other."""
    nproc_per_node: str = "auto"
    """Ranks on this machine: a number, gpu, cpu, or auto, as for ddp-launch run."""
    timeout_s: float = 30.0
    """Seconds that the notebook may take to answer."""


def main(argv: list[str] | None = None) -> int:
    """The ddp-launch script; returns its exit status."""
    args = sys.argv[1:] if argv is None else argv
    gc.disable()  # until a command has loaded its modules, which takes a fifth less time
    with as_exit_status() as outcome:
        require_working_directory()
        match args:
            case ["run", *rest]:
                outcome.status = run(rest)
            case ["train", *rest]:
                outcome.status = train(rest)
            case ["check", *rest]:
                outcome.status = check(rest)
            case ["plot", *rest]:
                plot(rest)
            case ["watch", *rest]:
                watch(rest)
            case ["stacks", *rest]:
                outcome.status = stacks(rest)
            case ["join", *rest]:
                join(rest)
            case ["-h" | "--help", *_]:
                print(USAGE, end="")
            case ["--version", *_]:
                torch, python = version("torch"), platform.python_version()
                print(f"ddp-launch {__version__}, torch {torch}, Python {python}")
            case _:
                problem = f"{args[0]!r} is no command" if args else "no command given"
                raise UserError(f"{problem}: use ddp-launch run, train, check, plot, watch, stacks or join")
    gc.enable()
    return outcome.status


def plot(args: list[str]) -> None:
    options = parse(PlotOptions, args, "ddp-launch plot")
    from ddp_lib.report.plots import plot_run

    print(plot_run(options.run_dir, options.out or None))


def watch(args: list[str]) -> None:
    options = parse(WatchOptions, args, "ddp-launch watch")
    from ddp_lib.report.watch import watch, watch_once

    collect_garbage()
    if options.once:
        watch_once(options.run_dir)
    else:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, so that the screen comes back
        watch(options.run_dir, wait_s=options.wait_s)


def check(args: list[str]) -> int:
    given = parse(CheckCommand, args, "ddp-launch check")
    options = given.check
    if options.gpus:
        require_seconds("--timeout-s", options.timeout_s)
        launch = replace(read_launch(given.launch, job="ddp-launch check"), timeout_s=options.timeout_s)
        arguments = (options.backend, options.timeout_s)
        return start_agent(
            launch, options.timeout_s, ForkedRanks("ddp_lib.launch.gpu_check:run", arguments, PRELOAD)
        )
    from ddp_lib.launch.check import run_check

    collect_garbage()
    return run_check(given.launch, options)


def stacks(args: list[str]) -> int:
    options = parse(StacksOptions, args, "ddp-launch stacks")
    from ddp_lib.launch.stacks import print_stacks

    return print_stacks(options.timeout_s)


def join(args: list[str]) -> None:
    options = parse(JoinOptions, args, "ddp-launch join")
    require_seconds("--timeout-s", options.timeout_s)
    endpoint = parse_endpoint("HOST:PORT", options.endpoint)
    nproc = count_ranks(read_nproc("--nproc-per-node", options.nproc_per_node))
    from ddp_lib.notebook.join import join_notebook

    collect_garbage()
    join_notebook(endpoint, options.token, nproc, options.timeout_s)


def run(args: list[str]) -> int:
    flags, words = split(args, LaunchOptions)
    given = parse(RunCommand, flags, "ddp-launch run")
    launch = read_launch(given.launch, job=name_of(words))
    with nullcontext() if given.launch.dry_run else telling_others(launch, given.script.join_timeout_s):
        script = read_script(words)
    if given.launch.dry_run:
        from ddp_lib.launch.torchrun_command import plain_command

        print(plain_command(launch, script.target, given.script.join_timeout_s))
        return 0
    os.environ["DDP_LIB_TIMEOUT_S"] = str(given.script.timeout_s)
    launch = replace(launch, timeout_s=given.script.timeout_s)
    return start_agent(launch, given.script.join_timeout_s, ScriptRanks(script, given.script))


def train(args: list[str]) -> int:
    given = parse(TrainCommand, args, "ddp-launch train")
    training, job = given.training, Path(given.training.run_dir).absolute().name
    launch = read_launch(given.launch, job=job)
    if given.launch.dry_run:
        from ddp_lib.launch.torchrun_command import plain_command, training_flags

        target = ["-m", "ddp_lib.train", *training_flags(training)]
        print(plain_command(launch, target, training.join_timeout_s))
        return 0
    if launch.local and given.launch == LaunchOptions():  # nothing that needs an agent
        from ddp_lib.train import run

        collect_garbage()
        return run(training)
    launch = replace(launch, timeout_s=training.timeout_s)
    describe, folder = partial(_describe, training), training.run_dir
    ranks = ForkedRanks("ddp_lib.train:run", (training,), PRELOAD, describe, folder)
    return start_agent(launch, training.join_timeout_s, ranks)


def _describe(training: TrainConfig) -> dict[str, Any]:
    """What is equal on all machines of an elastic job: a machine that differs must not join it."""
    from ddp_lib.launch.torchrun_command import training_flags
    from ddp_lib.train import load_own_data

    package = read_script(["-m", "ddp_lib.train"])
    model = read_script(["-m", training.model.partition(":")[0]])
    return {
        "files": {**model.digests(), **package.digests()},
        "flags": training_flags(replace(training, **{f: getattr(TrainConfig, f) for f in PER_MACHINE})),
        "data": load_own_data(training, lambda text: print(text, flush=True)).digest[:16],
    }
