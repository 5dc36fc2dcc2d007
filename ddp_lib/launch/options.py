"""The launcher's own flags, as torchrun names them, and torchrun's PET_* variables behind them."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from ddp_lib.distributed.addresses import Endpoint, port_number
from ddp_lib.distributed.device import usable_cores
from ddp_lib.errors import UserError


@dataclass(frozen=True)
class LaunchOptions:
    """Which ranks to start; named as torchrun names them."""

    nproc_per_node: str = "auto"
    """Ranks on this machine: a number, gpu (one per GPU), cpu (one per core), or auto: one per GPU, and
    one if there is none."""
    nnodes: str = "1"
    """Machines: a number, or MIN:MAX for an elastic job."""
    rdzv_endpoint: str = ""
    """HOST:PORT of the machine where all meet, the master; the same on every machine. [address]:PORT for
    IPv6."""
    node_rank: str = ""
    """This machine's number, 0 on the master, if ranks must not depend on which machine comes first."""
    rdzv_id: str = "ddp"
    """Name of the job, the same on every machine."""
    max_restarts: int = 0
    """How often the ranks are started again after one has failed; they resume."""
    dry_run: Annotated[int, tyro.conf.UseCounterAction] = 0
    """Print the torchrun command that does the same on this machine, with its environment; start nothing."""


@dataclass(frozen=True)
class CheckOptions:
    """What to check besides the network."""

    data: str = ""
    """The training's --data; if it is given, its content is compared."""
    data_dir: str = "data"
    """The training's --data-dir."""
    run_dir: str = "runs/default"
    """The training's --run-dir: its disk must have room."""
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """The training's --backend."""
    timeout_s: float = 30.0
    """Ends within so many seconds, whatever happens."""


@dataclass(frozen=True)
class Launch:
    """LaunchOptions, read and checked. nodes: least and most machines; endpoint None: one machine."""

    nproc: str
    nodes: tuple[int, int]
    endpoint: Endpoint | None
    node_rank: int | None
    job: str
    max_restarts: int

    @property
    def nodes_text(self) -> str:
        low, high = self.nodes
        return str(low) if low == high else f"{low}:{high}"


def has_pet_variables() -> bool:
    """Whether a variable is set that gives the number of machines, or where they meet."""
    return not {"PET_NNODES", "PET_RDZV_ENDPOINT", "PET_MASTER_ADDR"}.isdisjoint(os.environ)


def read_launch(options: LaunchOptions, environ: Mapping[str, str] = os.environ) -> Launch:
    """The flags, then PET_* variables, then the defaults. UserError if they are wrong.

    torchrun takes its flags' defaults from these variables; Kubeflow's operator sets them.
    """
    values, named = {}, {}
    for field, value in vars(options).items():
        values[field], named[field] = str(value), "--" + field.replace("_", "-")
        variable = f"PET_{field.upper()}"
        if value == getattr(LaunchOptions, field) and environ.get(variable, "").strip():
            values[field], named[field] = environ[variable].strip(), variable
    if not values["rdzv_endpoint"] and environ.get("PET_MASTER_ADDR"):
        host, port = environ["PET_MASTER_ADDR"].strip(), environ.get("PET_MASTER_PORT", "29500")
        values["rdzv_endpoint"] = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        named["rdzv_endpoint"] = "PET_MASTER_ADDR"
    nodes = _nodes(named["nnodes"], values["nnodes"])
    job = values["rdzv_id"].strip()
    if not job:
        raise UserError("--rdzv-id is empty: give the job a name, the same on every machine")
    endpoint = None
    if values["rdzv_endpoint"] and (nodes[1] > 1 or named["rdzv_endpoint"].startswith("--")):
        endpoint = _endpoint(named["rdzv_endpoint"], values["rdzv_endpoint"])
    if endpoint is None and nodes[1] > 1:
        raise UserError(
            f"{named['nnodes']} {nodes[1]} needs --rdzv-endpoint HOST:PORT: name one of the machines, "
            "such as 192.168.1.10:29500, and the same on all"
        )
    restarts = _whole(named["max_restarts"], values["max_restarts"], 0, "restarts")
    if values["nproc_per_node"] not in ("auto", "gpu", "cpu"):
        _whole(named["nproc_per_node"], values["nproc_per_node"], 1, "ranks, or auto, gpu or cpu")
    node_rank = None
    if values["node_rank"] and nodes[1] > 1:
        node_rank = _whole(named["node_rank"], values["node_rank"], 0, "machines before this one")
        if node_rank >= nodes[1]:
            raise UserError(
                f"{named['node_rank']} is {node_rank}, but {named['nnodes']} is {values['nnodes']}: "
                f"give 0 to {nodes[1] - 1}"
            )
    return Launch(values["nproc_per_node"], nodes, endpoint, node_rank, job, restarts)


def _whole(flag: str, text: str, least: int, what: str) -> int:
    if not text.isdecimal() or int(text) < least:
        raise UserError(f"{flag} is {text!r}: give a number of {what}, at least {least}")
    return int(text)


def _nodes(flag: str, text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    high = high or low
    if not (low.isdecimal() and high.isdecimal() and 1 <= int(low) <= int(high)):
        raise UserError(f"{flag} {text!r}: give a number of machines, such as 2, or a range, 1:2")
    return int(low), int(high)


def _endpoint(flag: str, text: str) -> Endpoint:
    host, _, port = text.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    if not bare or (":" in bare) != host.startswith("[") or host.startswith("[") != host.endswith("]"):
        raise UserError(
            f"{flag} {text!r}: write HOST:PORT, such as master:29500, "
            "and brackets around an IPv6 address, [fd77::10]:29500"
        )
    return Endpoint(bare, port_number(f"{flag}'s port", port), flag)


def count_ranks(nproc: str) -> int:
    """Ranks on this machine for `Launch.nproc`; loads torch only to count GPUs."""
    if nproc.isdecimal():
        return int(nproc)
    if nproc == "cpu":
        return usable_cores()
    import torch

    gpus = torch.cuda.device_count()
    if nproc == "gpu" and not gpus:
        raise UserError("--nproc-per-node gpu: this machine has no GPU that torch can use")
    return max(1, gpus)
