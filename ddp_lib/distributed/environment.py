"""Which rank this process is, read from flags and environment before any socket opens."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ddp_lib.distributed.addresses import Endpoint, host_part, port_number
from ddp_lib.errors import UserError


@dataclass(frozen=True)
class RankEnv:
    """Rank and world size, both local and global, this machine's number (`node`), and where the master is."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    node: int = 0
    master_addr: str = ""
    master_port: int = 0
    source: str = "alone"

    @property
    def one_machine(self) -> bool:
        return self.local_world_size == self.world_size

    @property
    def variables(self) -> str:
        """The variables that say which rank this is, for a message."""
        names = ("SLURM_PROCID", "SLURM_NTASKS") if self.source == "SLURM" else ("RANK", "WORLD_SIZE")
        return f"{names[0]}={self.rank} and {names[1]}={self.world_size}"

    @property
    def hint(self) -> str:
        """Ends a message about ranks that do not come: a shell or notebook inside an allocation may have
        SLURM's variables without being meant as a rank."""
        if self.source != "SLURM":
            return ""
        return (
            f"; {self.variables} are set here: start all ranks with srun, or `unset SLURM_PROCID` to train "
            "alone (in a notebook: del os.environ['SLURM_PROCID'])"
        )

    @property
    def endpoint(self) -> Endpoint:
        """Where rank 0 hosts the store."""
        return Endpoint(self.master_addr, self.master_port)


# Variables in which other launchers say how many processes or machines there are: Open MPI, MPICH and Intel
# MPI, MVAPICH2, jsrun, Flux, scripts. Each: its variable for this one's number.
_OTHERS = {
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",
    "PMI_SIZE": "PMI_RANK",
    "MV2_COMM_WORLD_SIZE": "MV2_COMM_WORLD_RANK",
    "JSM_NAMESPACE_SIZE": "JSM_NAMESPACE_RANK",
    "FLUX_JOB_SIZE": "FLUX_TASK_RANK",
    "NNODES": "NODE_RANK",
}
_SLURM_SIZES = ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")


def has_rank(environ: Mapping[str, str]) -> bool:
    """Whether variables say, or half say, which of several ranks this process is. srun of one task, as for a
    launcher per job, does not."""
    rank = {"RANK", "WORLD_SIZE", "MASTER_ADDR"} & environ.keys()
    return bool(rank or _slurm_size(environ) not in ("", "1") or _other_launcher(environ))


def size_variable(environ: Mapping[str, str]) -> tuple[str, int] | None:
    """The variable that gives the number of ranks or machines, with its value; None if there is none."""
    names = ["WORLD_SIZE", *(_SLURM_SIZES if _slurm_size(environ) not in ("", "1") else ()), *_OTHERS]
    texts = ((name, environ.get(name, "").strip()) for name in names)
    # int() raises an error of its own for thousands of digits.
    return next(((name, int(text)) for name, text in texts if text.isdecimal() and len(text) < 20), None)


def _slurm_size(environ: Mapping[str, str]) -> str:
    """The number of tasks of the job step that this process is in; empty outside of one."""
    if not environ.keys() >= {"SLURM_PROCID", "SLURM_STEP_ID"}:
        return ""
    return next((environ[name] for name in _SLURM_SIZES if name in environ), "not set")


def _other_launcher(environ: Mapping[str, str]) -> str:
    """The variable in which another launcher says that this process is not alone; empty if there is none."""
    if _slurm_size(environ):
        return ""
    for size, number in _OTHERS.items():
        if environ.get(size, "").strip() not in ("", "1"):
            return size
        if number == "NODE_RANK" and size not in environ and environ.get(number, "").strip():
            return number
    return ""


def read_rank_env(environ: Mapping[str, str], **flags: int | str | None) -> RankEnv:
    """The rank from the flags (`rank=`, `world_size=`, ...), else RANK etc., else SLURM's variables.

    A process with none of them is alone. Raises UserError, with the variable, its value and the cure, if they
    are incomplete or contradict each other, or if only another launcher's say that there are more.
    """
    env = {**environ, **{name.upper(): str(value) for name, value in flags.items() if value is not None}}
    if "RANK" in env or "WORLD_SIZE" in env:
        return _from_rank(env)
    if "SLURM_PROCID" in env and "SLURM_STEP_ID" in env:
        return _from_slurm(env)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name in env:
            raise UserError(
                f"{name}={env[name]!r} is set, but RANK and WORLD_SIZE are not: "
                f"set them too (RANK=0 on the master), or unset {name} to train alone"
            )
    if other := _other_launcher(env):
        example = f" (RANK=${_OTHERS[other]} WORLD_SIZE=${other})" if other in _OTHERS else ""
        raise UserError(
            f"{other}={env[other]!r} is set, but RANK and WORLD_SIZE are not: set RANK, WORLD_SIZE, "
            f"MASTER_ADDR and MASTER_PORT for each process{example}, or give ddp-launch --nnodes and "
            f"--rdzv-endpoint on each machine, or unset {other} to train alone"
        )
    return RankEnv()


def _number(env: Mapping[str, str], name: str, cure: str, default: int | None = None) -> int:
    text = env.get(name, "")
    if not text.strip():
        if default is not None and name not in env:
            return default
        raise UserError(f"{name} is {'empty' if name in env else 'not set'}: {cure}")
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{name}={text!r} is not a whole number: {cure}") from None


def seconds_of(env: Mapping[str, str], name: str, default: float) -> float:
    """The seconds that the variable `name` gives. UserError if it is no number."""
    try:
        return float(env.get(name, default))
    except ValueError:
        raise UserError(f"{name}={env[name]!r} is no number of seconds: correct it, or unset it") from None


def _check_range(name: str, value: int, count_name: str, count: int, first: int = 0) -> None:
    last = first + count - 1
    if not first <= value <= last:
        raise UserError(f"{name}={value} is out of range for {count_name}={count}: give {first} to {last}")


def _from_rank(env: Mapping[str, str]) -> RankEnv:
    world_size = _number(env, "WORLD_SIZE", "set it to the number of ranks in all, 1 or more")
    if world_size < 1:
        raise UserError(f"WORLD_SIZE={world_size} is too small: set the number of ranks in all, 1 or more")
    rank = _number(env, "RANK", f"set it to this process's number, 0 to {world_size - 1}; 0 on the master")
    _check_range("RANK", rank, "WORLD_SIZE", world_size)
    # Without LOCAL_RANK there is one process per machine, as with `docker run -e RANK=...`.
    local_world_size = _number(env, "LOCAL_WORLD_SIZE", "set the number of ranks on this machine", 1)
    _check_range("LOCAL_WORLD_SIZE", local_world_size, "WORLD_SIZE", world_size, first=1)
    local_rank = _number(env, "LOCAL_RANK", "set this process's number on its machine, from 0", 0)
    _check_range("LOCAL_RANK", local_rank, "LOCAL_WORLD_SIZE", local_world_size)
    node = _number(env, "GROUP_RANK", "set the machine's number, from 0", rank // local_world_size)
    address, port_text = env.get("MASTER_ADDR", "").strip(), env.get("MASTER_PORT")
    if world_size > 1 and not address:
        raise UserError("MASTER_ADDR is not set: set it to the address or name of rank 0's machine")
    if world_size > 1 and port_text is None:
        raise UserError("MASTER_PORT is not set: set the same free port on every machine, such as 29500")
    address = host_part("MASTER_ADDR", address)
    port = 0 if port_text is None else port_number("MASTER_PORT", port_text)
    return RankEnv(rank, world_size, local_rank, local_world_size, node, address, port, "environment")


def _from_slurm(env: Mapping[str, str]) -> RankEnv:
    cure = "start the ranks with srun"
    size_name = next((name for name in _SLURM_SIZES if name in env), _SLURM_SIZES[-1])
    world_size = _number(env, size_name, cure)
    if world_size < 1:
        raise UserError(f"{size_name}={world_size} is too small: {cure}")
    rank = _number(env, "SLURM_PROCID", cure)
    _check_range("SLURM_PROCID", rank, size_name, world_size)
    node = _number(env, "SLURM_NODEID", cure, 0)
    tasks = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE")
    per_node = tasks_per_node(tasks or str(world_size))
    local_world_size = per_node[min(node, len(per_node) - 1)]
    local_rank = _number(env, "SLURM_LOCALID", cure)
    _check_range("SLURM_LOCALID", local_rank, "SLURM_STEP_TASKS_PER_NODE", local_world_size)
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST")
    address = host_part("MASTER_ADDR", env.get("MASTER_ADDR", "").strip() or first_host(nodes or ""))
    if world_size > 1 and not address:
        raise UserError("SLURM_JOB_NODELIST is not set: set MASTER_ADDR to rank 0's machine")
    if "MASTER_PORT" in env:
        port = port_number("MASTER_PORT", env["MASTER_PORT"])
    else:
        # Two jobs on one machine need different ports, below the range that systems pick from.
        job = _number(env, "SLURM_JOB_ID", cure, 0) * 17 + _number(env, "SLURM_STEP_ID", cure, 0)
        port = 20000 + job % 10000
    return RankEnv(rank, world_size, local_rank, local_world_size, node, address, port, "SLURM")


def tasks_per_node(text: str) -> list[int]:
    """SLURM's "2(x3),1" as [2, 2, 2, 1]."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"([1-9]\d{0,5})(?:\(x([1-9]\d{0,5})\))?", part.strip())
        if not match:
            raise UserError(f"SLURM_TASKS_PER_NODE={text!r} is not understood: start the ranks with srun")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def first_host(nodelist: str) -> str:
    """First name of SLURM's "gpu[07-09,12],login1": "gpu07"."""
    return re.sub(r"\[([^],-]*)[^]]*\]?", r"\1", nodelist).partition(",")[0]
