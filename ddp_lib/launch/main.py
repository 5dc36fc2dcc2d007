"""ddp-launch: starts this machine's ranks with torch's elastic agent, or joins as a single rank."""

import gc
import os
import socket
import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from ddp_lib.cli import parse
from ddp_lib.config import TrainConfig
from ddp_lib.distributed.addresses import join_host
from ddp_lib.distributed.device import thread_budget
from ddp_lib.errors import UserError
from ddp_lib.launch.options import CheckOptions, LaunchOptions, count_ranks, has_pet_variables, read_launch
from ddp_lib.processes.exit_status import as_exit_status
from ddp_lib.processes.forkserver import collect_garbage, start_server
from ddp_lib.processes.signals import AGENT, StopSignal, kill_descendants

USAGE = """usage: ddp-launch {train,check,plot} ...

  train   train on this machine or on several: ddp-launch train --help
  check   on every machine: say why they would not train together: ddp-launch check --help
  plot    draw a run's losses, accuracy and speed: ddp-launch plot --help
"""
# What a rank needs, imported before it is forked. DDP imports torch._dynamo when it wraps its first model.
PRELOAD = ["ddp_lib.train", "torch._dynamo"]
# How long the ranks may live after a signal: half a second more than their own grace_s (signals.py).
_GRACE_S = 4.5


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
class PlotOptions:
    """Draws a run's losses, accuracy and speed."""

    run_dir: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    """Folder of the run."""
    out: str = ""
    """File to write; loss.png in the run's folder if not given."""


def main(argv: list[str] | None = None) -> int:
    """The ddp-launch script; returns its exit status."""
    args = sys.argv[1:] if argv is None else argv
    gc.disable()  # until a command has loaded its modules, which takes a fifth less time
    with as_exit_status() as outcome:
        match args:
            case ["train", *rest]:
                outcome.status = train(rest)
            case ["check", *rest]:
                outcome.status = check(rest)
            case ["plot", *rest]:
                plot(rest)
            case ["-h" | "--help", *_]:
                print(USAGE, end="")
            case _:
                problem = f"{args[0]!r} is no command" if args else "no command given"
                raise UserError(f"{problem}: use ddp-launch train, check or plot")
    gc.enable()
    return outcome.status


def plot(args: list[str]) -> None:
    options = parse(PlotOptions, args, "ddp-launch plot")
    from ddp_lib.report.plots import plot_run

    print(plot_run(options.run_dir, options.out or None))


def check(args: list[str]) -> int:
    given = parse(CheckCommand, args, "ddp-launch check")
    from ddp_lib.launch.check import run_check

    collect_garbage()
    return run_check(given.launch, given.check)


def train(args: list[str]) -> int:
    given = parse(TrainCommand, args, "ddp-launch train")
    if given.launch.dry_run:
        from ddp_lib.launch.torchrun_command import plain_command

        print(plain_command(read_launch(given.launch), given.training))
        return 0
    if given.launch == LaunchOptions() and not has_pet_variables() and _has_rank():
        from ddp_lib.train import run

        collect_garbage()
        return run(given.training)
    return start_agent(given.launch, given.training.join_timeout_s, "ddp_lib.train:run", given.training)


def _has_rank() -> bool:
    """Whether docker run -e, srun or torchrun has given this process its rank."""
    env = os.environ
    return bool({"RANK", "WORLD_SIZE", "MASTER_ADDR"} & env.keys()) or (
        "SLURM_PROCID" in env
        and "SLURM_STEP_ID" in env
        and env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS")) != "1"
    )


def start_agent(options: LaunchOptions, join_timeout_s: float, function: str, *args: object) -> int:
    """Runs `function(*args)`, package.module:function, as this machine's ranks; returns 0, or the status of
    the first failed rank."""
    launch = read_launch(options)
    with StopSignal(_GRACE_S, _end_now, impatient=True):
        os.environ[AGENT] = "1"
        # In a store shared with the agent, restarted ranks would find the dead ranks' keys.
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
        # For multiprocessing's resource tracker, which would warn about what it tidies up after all processes
        # are killed.
        sys.warnoptions.append("ignore:resource_tracker:UserWarning")
        try:
            start_server(PRELOAD)  # imports torch while the agent does
            nproc = count_ranks(launch.nproc)
            threads = os.environ.setdefault("OMP_NUM_THREADS", str(thread_budget(nproc)))
            where = socket.gethostname()
            if launch.endpoint is not None:
                address = join_host(launch.endpoint.host, launch.endpoint.port)
                where += f", one of {launch.nodes_text} machines, meeting at {address}"
            text = f"starting {nproc} rank(s) on {where}, OMP_NUM_THREADS={threads} per rank"
            print(f"ddp-launch: {text}", flush=True)
            from ddp_lib.launch.agent import run_agent

            collect_garbage()
            return run_agent(function, args, nproc, launch, join_timeout_s)
        finally:
            del os.environ[AGENT]


def _end_now(number: int) -> None:
    """Called from a thread when the grace time is over, or at the second Ctrl-C."""
    kill_descendants()
    os._exit(128 + number)
