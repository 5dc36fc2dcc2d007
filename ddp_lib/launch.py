"""ddp-launch: starts the ranks of this machine with torch's own elastic agent, or joins as one."""

import dataclasses
import logging
import os
import socket
import sys
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from ddp_lib.command import parse
from ddp_lib.config import TrainConfig
from ddp_lib.errors import UserError
from ddp_lib.failure import as_exit_status
from ddp_lib.network import port_number
from ddp_lib.stop import AGENT

USAGE = """usage: ddp-launch {train,plot} ...

  train   train on this machine or on several: ddp-launch train --help
  plot    draw a run's losses, accuracy and speed: ddp-launch plot --help
"""
# What ranks get before they are killed; they leave by themselves one second sooner (stop.py).
SHUTDOWN_S = 5


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
class PlotOptions:
    """What to draw."""

    run_dir: Annotated[str, tyro.conf.Positional]
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
    options, _ = parse(tuple[LaunchOptions, TrainConfig], args, "ddp-launch train")
    names = {"--" + field.name for field in dataclasses.fields(LaunchOptions)}
    ours, theirs = _split(args, names)
    if not ours and _placed_from_outside():
        from ddp_lib.train import main as rank_main

        return rank_main(theirs)
    return start_agent(options, [sys.executable, "-u", "-m", "ddp_lib.train", *theirs])


def _split(args: list[str], names: set[str]) -> tuple[list[str], list[str]]:
    """The launcher's flags with their values, and all others, which go to the ranks as they are."""
    ours: list[str] = []
    theirs: list[str] = []
    rest = iter(args)
    for word in rest:
        flag, has_value, _ = word.partition("=")
        if flag.replace("_", "-").replace("--", "--") in {n.replace("_", "-") for n in names}:
            ours.append(word)
            if not has_value:
                ours.append(next(rest))
        else:
            theirs.append(word)
    return ours, theirs


def _placed_from_outside() -> bool:
    """Whether somebody else (docker run -e, srun, torchrun) has given this process its rank."""
    env = os.environ
    return bool({"RANK", "WORLD_SIZE", "MASTER_ADDR"} & env.keys()) or (
        "SLURM_PROCID" in env and "SLURM_STEP_ID" in env and env.get("SLURM_NTASKS") != "1"
    )


def start_agent(options: LaunchOptions, command: list[str]) -> int:
    """Runs `command` as this machine's ranks; returns 0, or the status of the first that failed."""
    nodes = _nodes(options.nnodes)
    if options.max_restarts < 0:
        raise UserError(f"--max-restarts is {options.max_restarts}: give a number of at least 0")
    _check_endpoint(options.rdzv_endpoint, nodes[1])
    nproc = _nproc(options.nproc_per_node)
    alone = nodes[1] == 1 and not options.rdzv_endpoint
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // nproc)))
    # With the agent's store shared, a restart of the ranks meets the keys of those that died.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    os.environ[AGENT] = str(os.getpid())

    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if "LOGLEVEL" not in os.environ:  # torch's own variable for its agent's log
        logging.disable(logging.ERROR)
    settings: dict[str, Any] = {"shutdown_timeout": SHUTDOWN_S}
    known = {field.name for field in dataclasses.fields(LaunchConfig)}
    config = LaunchConfig(
        min_nodes=nodes[0],
        max_nodes=nodes[1],
        nproc_per_node=nproc,
        run_id=options.rdzv_id,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0" if alone else options.rdzv_endpoint,
        local_addr="127.0.0.1" if alone else None,
        max_restarts=options.max_restarts,
        logs_specs=DefaultLogsSpecs(),
        **{name: value for name, value in settings.items() if name in known},
    )
    where = "" if alone else f", {options.nnodes} machine(s), meeting at {options.rdzv_endpoint}"
    print(
        f"ddp-launch: starting {nproc} rank(s) on {socket.gethostname()}{where}; "
        f"{os.environ['OMP_NUM_THREADS']} thread(s) a rank",
        flush=True,
    )
    try:
        elastic_launch(config, command[0])(*command[1:])
        return 0
    except ChildFailedError as failed:
        rank, failure = _cause(failed.failures)
        text = _describe(failure)
        print(f"ddp-launch: error: rank {rank} on {failed_host(failed)}: {text}", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    except RendezvousError as error:
        raise UserError(
            f"the machines did not meet at {options.rdzv_endpoint or 'this machine'} "
            f"({' '.join(str(error).split())[:200]}): check --rdzv-endpoint and --nnodes"
        ) from error
    finally:
        _end_leftovers()


def failed_host(_: Any) -> str:
    # The agent knows the failures of its own machine only.
    return socket.gethostname()


def _cause(failures: dict[int, Any]) -> tuple[int, Any]:
    """The failure that came first and is not the consequence of another's."""

    def order(item: tuple[int, Any]) -> tuple[bool, float]:
        message = item[1].message
        extra = message.get("extraInfo", {}) if isinstance(message, dict) else {}
        return bool(extra.get("secondary")), float(extra.get("time", item[1].timestamp))

    return min(failures.items(), key=order)


def _describe(failure: Any) -> str:
    if isinstance(failure.message, dict):
        return str(failure.message["message"])
    if failure.exitcode < 0:
        return f"died of {failure.signal_name()}"
    return f"ended with status {failure.exitcode}"


def _end_leftovers() -> None:
    """Ends what the agent, interrupted while it shut down, may have left running."""
    import psutil

    for process in psutil.Process().children(recursive=True):
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def _nodes(text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    try:
        nodes = int(low), int(high or low)
    except ValueError:
        nodes = (0, 0)
    if not 1 <= nodes[0] <= nodes[1]:
        raise UserError(f"--nnodes {text!r}: give a number of machines, such as 2, or a range, 1:2")
    return nodes


def _nproc(text: str) -> int:
    if text == "auto":
        import torch

        return max(1, torch.cuda.device_count())
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--nproc-per-node {text!r}: give a number of ranks from 1, or auto")
    return int(text)


def _check_endpoint(endpoint: str, most_nodes: int) -> None:
    if not endpoint:
        if most_nodes > 1:
            raise UserError(
                f"--nnodes {most_nodes} needs --rdzv-endpoint HOST:PORT: name one of the machines, "
                "such as 192.168.1.10:29500, and the same on all"
            )
        return
    host, _, port = endpoint.rpartition(":")
    if not host or (":" in host and not host.startswith("[")):
        raise UserError(
            f"--rdzv-endpoint {endpoint!r}: write HOST:PORT, such as master:29500, "
            "and brackets around an IPv6 address, [fd77::10]:29500"
        )
    port_number("--rdzv-endpoint's port", port)


if __name__ == "__main__":
    sys.exit(main())
