"""The launcher's own flags, as torchrun names them, and torchrun's PET_* variables behind them."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from ddp_lib.distributed.addresses import Endpoint, parse_endpoint
from ddp_lib.distributed.device import require_threads, usable_cores
from ddp_lib.distributed.environment import RankEnv, has_rank, read_rank_env, size_variable
from ddp_lib.errors import UserError, require_seconds

_MOST_NODES, _MOST_RESTARTS = 100_000, 1_000_000

# A flag without a value. tyro would call it repeatable in the help.
Switch = Annotated[int, tyro.conf.UseCounterAction, tyro.conf.arg(help_behavior_hint="")]


@dataclass(frozen=True)
class LaunchOptions:
    """Which ranks to start; named as torchrun names them."""

    nproc_per_node: str = "auto"
    """Ranks on this machine: a number, gpu (one per GPU), cpu (one per core), or auto: one per GPU, and
    one if there is none."""
    nnodes: str = "1"
    """Machines: a number, or MIN:MAX for an elastic job, which goes on with fewer machines."""
    rdzv_endpoint: str = ""
    """HOST:PORT of the machine where all meet, the master; the same on every machine. [address]:PORT for
    IPv6."""
    node_rank: str = ""
    """This machine's number, 0 on the master. Give it if ranks must have the same numbers at every start."""
    rdzv_id: str = ""
    """Name of the job, the same on every machine: another job on the same port is refused. Default: that of
    the run's folder, or of the script."""
    max_restarts: int = 0
    """How many times to start the ranks again after one has failed. They resume if the program does so."""
    grace_s: float = 30.0
    """Seconds that the ranks have after SIGTERM or Ctrl-C to save and end."""
    no_check: Switch = 0
    """Do not compare the machines, nor try their connections, before the ranks start."""
    dry_run: Switch = 0
    """Print the nearest torchrun command for this machine, with its environment; start nothing."""

    def __post_init__(self) -> None:
        require_seconds("--grace-s", self.grace_s)
        _whole("--max-restarts", str(self.max_restarts), 0, "restarts", _MOST_RESTARTS)


@dataclass(frozen=True)
class ScriptOptions:
    """What becomes of a script's output, and how long to wait."""

    log_dir: str = "logs"
    """Folder for the ranks' output. Each start makes a folder in it, with a file per rank: rank0.log."""
    local_ranks_filter: str = ""
    """Which ranks of this machine to show here, by local rank, such as 0 or 0,1; all if not given."""
    tee: Literal[0, 3] = 3
    """3: show the ranks' output here too; 0: write it to their files only. torchrun's numbers."""
    join_timeout_s: float = 60.0
    """Seconds to wait for the master and the other machines at the start."""
    timeout_s: float = 120.0
    """Timeout of a collective, in scripts that use World.join; others give PyTorch their own."""

    def __post_init__(self) -> None:
        for name in ("join_timeout_s", "timeout_s"):
            require_seconds("--" + name.replace("_", "-"), getattr(self, name))
        self.shown()

    def shown(self) -> set[int] | None:
        """The local ranks whose output is shown; None: all."""
        if self.tee == 0:
            return set()
        words = self.local_ranks_filter.split(",") if self.local_ranks_filter else []
        if not all(word.strip().isdecimal() for word in words):
            raise UserError(
                f"--local-ranks-filter is {self.local_ranks_filter!r}: give local ranks, such as 0 or 0,1"
            )
        return {int(word) for word in words} or None


@dataclass(frozen=True)
class CheckOptions:
    """What to check besides the network."""

    gpus: Switch = 0
    """Instead, start the ranks of a training, one per GPU, and measure the all-reduce between them."""

    data: str = ""
    """The training's --data; if it is given, its content is compared."""
    data_dir: str = "data"
    """The training's --data-dir."""
    image_size: int = 32
    """The training's --image-size."""
    run_dir: str = "runs/default"
    """The training's --run-dir: its disk must have room."""
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """The training's --backend."""
    timeout_s: float = 30.0
    """Ends within so many seconds, whatever happens; with --gpus, that of each wait."""


@dataclass(frozen=True)
class Launch:
    """LaunchOptions, read and checked. nodes: least and most machines; endpoint None: one machine."""

    nproc: str
    nodes: tuple[int, int]
    endpoint: Endpoint | None
    node_rank: int | None
    job: str
    max_restarts: int
    check: bool = True  # whether to compare the machines before the ranks start
    grace_s: float = 30.0
    timeout_s: float = 120.0  # of a collective, in the ranks
    local: tuple[int, int] | None = None  # local rank and number of local ranks, if variables give them
    hint: str = ""  # ends a message about machines that do not come

    def __post_init__(self) -> None:
        # torch's store takes no bytes that are no UTF-8, as of a folder that is named in Latin-1.
        object.__setattr__(self, "job", self.job.encode(errors="backslashreplace").decode())

    @property
    def nodes_text(self) -> str:
        low, high = self.nodes
        return str(low) if low == high else f"{low}:{high}"


def read_launch(options: LaunchOptions, environ: Mapping[str, str] = os.environ, job: str = "ddp") -> Launch:
    """The flags, then PET_* variables, then the defaults. UserError if they are wrong.

    job: its name, if no --rdzv-id is given.

    torchrun takes its flags' defaults from PET_* variables; Kubeflow's operator sets them. If neither says
    where the machines meet, but other variables say which rank this process is (RANK, WORLD_SIZE, MASTER_ADDR
    and MASTER_PORT, or SLURM's), it counts as a machine of one rank, and `Launch.local` is set. UserError
    if flags contradict the variables.
    """
    require_threads(environ)
    by_pet = not {"PET_NNODES", "PET_RDZV_ENDPOINT", "PET_MASTER_ADDR"}.isdisjoint(environ)
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
    restarts = _whole(named["max_restarts"], values["max_restarts"], 0, "restarts", _MOST_RESTARTS)
    nproc = read_nproc(named["nproc_per_node"], values["nproc_per_node"])
    if not by_pet and not values["rdzv_endpoint"] and has_rank(environ):
        run_id = environ.get("TORCHELASTIC_RUN_ID", "")
        return _of_rank(read_rank_env(environ), options, restarts, job, run_id)
    if not by_pet:
        _require_size(nodes, values["nnodes"], nproc, environ)
    job = values["rdzv_id"].strip() or job
    endpoint = None
    if values["rdzv_endpoint"] and (nodes[1] > 1 or named["rdzv_endpoint"].startswith("--")):
        endpoint = parse_endpoint(named["rdzv_endpoint"], values["rdzv_endpoint"])
    if endpoint is None and nodes[1] > 1:
        raise UserError(
            f"{named['nnodes']} {nodes[1]} needs --rdzv-endpoint HOST:PORT: name one of the machines, "
            "such as 192.168.1.10:29500, and the same on all"
        )
    node_rank = None
    if values["node_rank"] and nodes[1] > 1:
        node_rank = _whole(
            named["node_rank"], values["node_rank"], 0, "machines before this one", _MOST_NODES
        )
        if node_rank >= nodes[1]:
            raise UserError(
                f"{named['node_rank']} is {node_rank}, but {named['nnodes']} is {values['nnodes']}: "
                f"give 0 to {nodes[1] - 1}"
            )
    return Launch(
        nproc,
        nodes,
        endpoint,
        node_rank,
        job,
        restarts,
        check=not options.no_check,
        grace_s=options.grace_s,
    )


def _of_rank(env: RankEnv, options: LaunchOptions, restarts: int, job: str, run_id: str) -> Launch:
    """The launch of a process whose variables say which rank it is: a machine of this one rank.

    run_id: torchrun's name of the job, if torchrun has started this process.
    """
    machines = env.world_size // env.local_world_size
    torchrun = f"TORCHELASTIC_RUN_ID={run_id}"
    for flag, given, agrees, variables in (
        ("--nproc-per-node", options.nproc_per_node, {"auto", "1"}, env.variables),
        ("--nnodes", options.nnodes, {"1", str(env.world_size), str(machines)}, env.variables),
        ("--node-rank", options.node_rank, {"", str(env.rank), str(env.node)}, env.variables),
        ("--rdzv-id", options.rdzv_id, {"", run_id or options.rdzv_id}, torchrun),
        ("--max-restarts", str(restarts), {"0", "0" if run_id else str(restarts)}, torchrun),
    ):
        if given not in agrees:
            raise UserError(
                f"{flag} is {given}, but {variables}: this process is one rank of {env.world_size}; leave "
                "the flag out, or unset these variables and start one ddp-launch per machine, with --nnodes "
                "and --rdzv-endpoint"
            )
    one = env.world_size == 1
    return Launch(
        nproc="1",
        nodes=(env.world_size, env.world_size),
        endpoint=None if one else env.endpoint,
        node_rank=None if one else env.rank,
        job=options.rdzv_id or job,
        max_restarts=restarts,
        check=not options.no_check,
        grace_s=options.grace_s,
        local=(env.local_rank, env.local_world_size),
        hint=env.hint,
    )


def _require_size(nodes: tuple[int, int], text: str, nproc: str, environ: Mapping[str, str]) -> None:
    """UserError if a variable contradicts --nnodes: each rank or task that it counts would start a launcher.
    WORLD_SIZE may also count the ranks of all machines."""
    name, size = size_variable(environ) or ("", nodes[0])
    ranks = nodes[1] * int(nproc) if nproc.isdecimal() else size
    counts_ranks = name == "WORLD_SIZE" and size == ranks and nodes[1] > 1
    if not (nodes[0] <= size <= nodes[1] or counts_ranks):
        raise UserError(
            f"--nnodes is {text}, but {name}={size}: start one ddp-launch per machine, and give --nnodes "
            f"their number, or unset {name}"
        )


def _whole(flag: str, text: str, least: int, what: str, most: int) -> int:
    if not _is_number(text, least, most):
        raise UserError(f"{flag} is {text!r}: give a number of {what}, from {least} to {most}")
    return int(text)


def _is_number(text: str, least: int, most: int) -> bool:
    # int() raises an error of its own for thousands of digits.
    return text.isdecimal() and len(text) < 20 and least <= int(text) <= most


def _nodes(flag: str, text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    high = high or low
    if not (_is_number(high, 1, _MOST_NODES) and _is_number(low, 1, int(high))):
        raise UserError(f"{flag} {text!r}: give a number of machines, such as 2, or a range, 1:2")
    return int(low), int(high)


def read_nproc(flag: str, text: str) -> str:
    """What `count_ranks` takes; UserError if it is something else."""
    if text not in ("auto", "gpu", "cpu"):
        _whole(flag, text, 1, "ranks, or auto, gpu or cpu", 1024)
    return text


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
