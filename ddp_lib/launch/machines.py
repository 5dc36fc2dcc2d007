"""Before the ranks start: are the machines equal in what matters, and can they reach each other?

What differs here would show only later, and badly: another version of torch as a hang, an old copy of the
script as a wrong result.
"""

import os
import platform
import socket
import subprocess
import sys
import time
from contextlib import suppress
from itertools import takewhile
from typing import Any

import torch
import torch.distributed as dist

from ddp_lib.distributed.handshake import require_connections
from ddp_lib.distributed.nics import listening
from ddp_lib.distributed.placement import why_no_gpu
from ddp_lib.distributed.store_group import StoreGroup
from ddp_lib.errors import TransientError, UserError, first_line
from ddp_lib.launch.peers import Peers
from ddp_lib.launch.ranks import Ranks

Machine = dict[str, Any]
_NO_CHECK = "or leave this out with --no-check"


def describe_machine(ranks: Ranks, nproc: int, elastic: bool) -> Machine:
    """What the other machines have to know of this one, as plain values."""
    gpus = torch.cuda.device_count()
    return {
        "host": socket.gethostname(),
        "equal": {
            "Python": platform.python_version(),
            "torch": str(torch.__version__),
            "NCCL": ".".join(map(str, torch.cuda.nccl.version())) if dist.is_nccl_available() else "",
        },
        "ranks": nproc,
        "gpus": gpus,
        "model": _gpu_model() if gpus else "",
        "no_gpu": "" if gpus else why_no_gpu(os.environ),
        "program": ranks.equal(elastic),
    }


def _gpu_model() -> str:
    """The name of the first GPU. torch would have to start CUDA for it, which takes memory on the GPU."""
    with suppress(OSError, subprocess.TimeoutExpired):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        names = subprocess.run(query, capture_output=True, text=True, timeout=10).stdout.splitlines()
        return names[0].strip() if names else ""
    return ""


def compare_machines(peers: Peers, ranks: Ranks, nproc: int, timeout_s: float) -> None:
    """As `_compare`; TransientError if the launcher that hosts the store is lost meanwhile."""
    try:
        _compare(peers, ranks, nproc, timeout_s)
    except dist.DistError as error:
        raise TransientError(
            f"lost the launcher at {peers.launch.endpoint} ({first_line(error)}): see that machine's output"
        ) from error


def _compare(peers: Peers, ranks: Ranks, nproc: int, timeout_s: float) -> None:
    """Compares the launchers' machines, and connects them to each other on ports that the system picks.

    All of an elastic job's minimum of machines take part; a later machine only compares itself. UserError, on
    every machine, if they differ in a version, the script or its flags, or cannot connect. Prints a line if
    they differ in GPUs.
    """
    launch = peers.launch
    if not launch.check:
        return
    mine = describe_machine(ranks, nproc, launch.nodes[0] < launch.nodes[1])
    if launch.endpoint is None:
        require_gpus([mine], ranks.needs_gpus)
        return
    size = launch.nodes[0]
    group = StoreGroup(
        dist.PrefixStore("machines", peers.store), 0 if peers.hosts else None, size, peers.hosts
    )
    with listening(peers.address) as probes:
        mine |= probes
        deadline = time.monotonic() + timeout_s

        def conclude(machines: list[Machine]) -> tuple[Machine, list[Machine]]:
            came = [machine for machine in machines if machine]
            if len(came) < size:
                raise TransientError(peers.who_came(timeout_s))
            for other in came[1:]:
                require_equal(came[0], other)
            require_gpus(came, ranks.needs_gpus)
            needed = ("host", "probe", "nics", "gpus", "model")
            return came[0], [{name: machine[name] for name in needed} for machine in came]

        first, machines = group.exchange(
            "machines", mine, timeout_s, conclude, deadline=deadline, complete=False
        )
        if (number := group.rank or 0) >= size:  # one more of an elastic job, or a launcher started again
            require_equal(first, mine)
            require_gpus([first, mine], ranks.needs_gpus)
            machines = [*machines, mine]
        else:
            require_connections(group, machines, number, timeout_s)
    gpus = {(machine["gpus"], machine["model"]) for machine in machines}
    if len(gpus) > 1:
        have = ", ".join(f"{m['host']} has {m['gpus']} x {m['model'] or 'GPU'}" for m in machines)
        print(f"ddp-launch: the machines' GPUs differ: {have}", file=sys.stderr, flush=True)


def require_gpus(machines: list[Machine], needed: bool) -> None:
    """UserError if a machine has fewer GPUs than ranks that want one each, unless no machine has any: all
    then compute on the CPU."""
    having = next((machine for machine in machines if machine["gpus"]), None)
    if not needed or having is None:
        return
    for machine in machines:
        gpus, why = machine["gpus"], f" ({machine['no_gpu']})" if machine["no_gpu"] else ""
        if not gpus:
            raise UserError(
                f"{machine['host']} has no GPU that torch can use{why}, but {having['host']} has "
                f"{having['gpus']}: make them work there, or hide the GPUs on every machine with "
                f"CUDA_VISIBLE_DEVICES= (empty), {_NO_CHECK}"
            )
        if gpus < machine["ranks"]:
            raise UserError(
                f"{machine['host']} has {gpus} GPU(s) for {machine['ranks']} ranks: lower --nproc-per-node, "
                f"or hide the GPUs with CUDA_VISIBLE_DEVICES= (empty) on every machine, {_NO_CHECK}"
            )


def require_equal(first: Machine, other: Machine) -> None:
    """UserError, with the cause and the cure, if two machines would not run the same program."""
    here, there = other["host"], first["host"]
    for name, value in other["equal"].items():
        if value != first["equal"][name]:
            raise UserError(
                f"{name} is {value or 'not there'} on {here}, but {first['equal'][name] or 'not there'} on "
                f"{there}: install the same on every machine, {_NO_CHECK}"
            )
    files, theirs = other["program"].get("files", {}), first["program"].get("files", {})
    for path in [*theirs, *files]:
        if files.get(path) != theirs.get(path):
            missing = here if path not in files else there if path not in theirs else ""
            what = f"is missing on {missing}" if missing else f"differs between {here} and {there}"
            raise UserError(f"{path} {what}: copy the same files to every machine, {_NO_CHECK}")
    mine, theirs = _unlike(other["program"].get("flags", []), first["program"].get("flags", []))
    if mine != theirs:
        raise UserError(
            f"the flags differ: {mine or 'none'} on {here}, but {theirs or 'none'} on {there}: give every "
            f"machine the same, {_NO_CHECK}"
        )
    data, their_data = other["program"].get("data"), first["program"].get("data")
    if data != their_data:
        raise UserError(
            f"the data differs: its digest is {data} on {here}, but {their_data} on {there}: copy the same "
            f"data to every machine, {_NO_CHECK}"
        )


def _unlike(words: list[str], others: list[str]) -> tuple[str, str]:
    """The two, without what both begin and end with; a value keeps its flag."""
    begin = _count_equal(words, others)
    end = _count_equal(words[begin:][::-1], others[begin:][::-1])
    if begin and words[begin - 1].startswith("-"):
        begin -= 1
    return " ".join(words[begin : len(words) - end]), " ".join(others[begin : len(others) - end])


def _count_equal(words: list[str], others: list[str]) -> int:
    """How many words both begin with."""
    return len([*takewhile(lambda pair: pair[0] == pair[1], zip(words, others, strict=False))])
