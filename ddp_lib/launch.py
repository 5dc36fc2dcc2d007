"""ddp-launch: starts the ranks of this machine with torch's own elastic agent, or joins as one."""

import dataclasses
import os
import socket
import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from ddp_lib.command import parse
from ddp_lib.config import TrainConfig
from ddp_lib.errors import UserError
from ddp_lib.failure import as_exit_status
from ddp_lib.network import port_number
from ddp_lib.stop import AGENT, StopSignal, end_all_below

USAGE = """usage: ddp-launch {train,plot} ...

  train   train on this machine or on several: ddp-launch train --help
  plot    draw a run's losses, accuracy and speed: ddp-launch plot --help
"""
# After a signal all are gone by then: half a second later than the ranks' own limit (stop.py).
_LIMIT_S = 4.5


@dataclass(frozen=True)
class LaunchOptions:
    """Which ranks to start; named as torchrun names them."""

    nproc_per_node: str = "auto"
    """Ranks on this machine: a number, or auto: one a GPU, and one where there is none."""
    nnodes: str = "1"
    """Machines: a number, or MIN:MAX for an elastic job."""
    rdzv_endpoint: str = ""
    """HOST:PORT of the machine where all meet; the same on every machine. [address]:PORT for IPv6."""
    rdzv_id: str = "ddp"
    """Name of the job, the same on every machine."""
    max_restarts: int = 0
    """How often the ranks are started again after one has failed; they resume."""


@dataclass(frozen=True)
class TrainCommand:
    """Trains on this machine, or on several."""

    launch: LaunchOptions
    training: TrainConfig


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
    with as_exit_status() as outcome:
        match args[:1]:
            case ["train"]:
                outcome.status = train(args[1:])
            case ["plot"]:
                outcome.status = plot(args[1:])
            case ["-h" | "--help"]:
                print(USAGE, end="")
            case []:
                raise UserError("no command given: use ddp-launch train, or ddp-launch plot")
            case [other, *_]:
                raise UserError(
                    f"{other!r} is no command: use ddp-launch train, or ddp-launch plot"
                )
    return outcome.status


def plot(args: list[str]) -> int:
    options = parse(PlotOptions, args, "ddp-launch plot")
    from ddp_lib.plots import plot_run

    print(plot_run(options.run_dir, options.out or None))
    return 0


def train(args: list[str]) -> int:
    given = parse(TrainCommand, args, "ddp-launch train")
    names = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(LaunchOptions)}
    ours, theirs = _split(args, names)
    if not ours and _placed_from_outside():
        from ddp_lib.train import main as rank_main

        return rank_main(theirs)
    command = [sys.executable, "-u", "-m", "ddp_lib.rank", *theirs]
    return start_agent(given.launch, given.training.join_timeout_s, command)


def _split(args: list[str], names: set[str]) -> tuple[list[str], list[str]]:
    """The launcher's flags with their values, and all others, which go to the ranks as they are."""
    ours: list[str] = []
    theirs: list[str] = []
    rest = iter(args)
    for word in rest:
        flag, has_value, _ = word.partition("=")
        if flag.replace("_", "-") in names:
            ours += [word] if has_value else [word, next(rest)]
        else:
            theirs.append(word)
    return ours, theirs


def _placed_from_outside() -> bool:
    """Whether somebody else (docker run -e, srun, torchrun) has given this process its rank."""
    env = os.environ
    return bool({"RANK", "WORLD_SIZE", "MASTER_ADDR"} & env.keys()) or (
        "SLURM_PROCID" in env
        and "SLURM_STEP_ID" in env
        and env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS")) != "1"
    )


def start_agent(options: LaunchOptions, join_timeout_s: float, command: list[str]) -> int:
    """Runs `command` as this machine's ranks; returns 0, or the status of the first that failed."""
    nodes = _nodes(options.nnodes)
    if options.max_restarts < 0:
        raise UserError(f"--max-restarts is {options.max_restarts}: give a number of at least 0")
    if not options.rdzv_id.strip():
        raise UserError("--rdzv-id is empty: give the job a name, the same on every machine")
    endpoint = _endpoint(options.rdzv_endpoint, nodes[1])
    with StopSignal(_LIMIT_S, _end_now, impatient=True):
        nproc = _nproc(options.nproc_per_node)
        # Before torch loads, which reads it.
        threads = os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // nproc)))
        # With the agent's store shared, a restart of the ranks meets the keys of those that died.
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
        where = "" if endpoint is None else f", one of {options.nnodes} machines"
        meeting = "" if endpoint is None else f" meeting at {options.rdzv_endpoint},"
        print(
            f"ddp-launch: starting {nproc} rank(s) on {socket.gethostname()}{where},{meeting} "
            f"OMP_NUM_THREADS={threads} a rank",
            flush=True,
        )
        from ddp_lib.agent import run_agent

        os.environ[AGENT] = str(os.getpid())  # for the ranks
        try:
            return run_agent(
                command,
                nproc,
                nodes,
                endpoint,
                options.rdzv_id,
                options.max_restarts,
                join_timeout_s,
            )
        finally:
            del os.environ[AGENT]


def _end_now(number: int) -> None:
    """Called from a thread when the time to leave is over, or at the second Ctrl-C."""
    end_all_below()
    os._exit(128 + number)


def _nodes(text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    try:
        nodes = int(low), int(high or low)
    except ValueError:
        nodes = (0, 0)
    if not 1 <= nodes[0] <= nodes[1]:
        raise UserError(f"--nnodes {text!r}: give a number of machines, such as 2, or a range, 1:2")
    return nodes


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _nproc(text: str) -> int:
    if text == "auto":
        import torch

        return max(1, torch.cuda.device_count())
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--nproc-per-node {text!r}: give a number of ranks from 1, or auto")
    return int(text)


def _endpoint(text: str, most_nodes: int) -> tuple[str, int] | None:
    if not text:
        if most_nodes > 1:
            raise UserError(
                f"--nnodes {most_nodes} needs --rdzv-endpoint HOST:PORT: name one of the machines, "
                "such as 192.168.1.10:29500, and the same on all"
            )
        return None
    host, _, port = text.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    if (
        not bare
        or (":" in bare) != host.startswith("[")
        or host.startswith("[") != host.endswith("]")
    ):
        raise UserError(
            f"--rdzv-endpoint {text!r}: write HOST:PORT, such as master:29500, "
            "and brackets around an IPv6 address, [fd77::10]:29500"
        )
    return bare, port_number("--rdzv-endpoint's port", port)


if __name__ == "__main__":
    sys.exit(main())
