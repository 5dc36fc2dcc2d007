"""Which rank did not come to a collective, from the dumps of torch's flight recorder.

If a collective times out under NCCL, each rank writes what it has called to a file, and its watchdog ends it.
No single dump says who is to blame. torchfrtrace reads the files too.
"""

import json
import os
import pickle
import time
from collections.abc import Iterable
from contextlib import suppress
from traceback import FrameSummary
from typing import Any, BinaryIO

import torch.distributed as dist

from ddp_lib.distributed.addresses import wait_until_true
from ddp_lib.processes.stacks import describe, is_library

# torch appends the rank's number to the file's name. Its own defaults may change.
_FILE, _OLD_FILE = "TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"
_DEFAULTS = {"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
# How long a launcher waits for what the others tell.
_SHARE_S = 3.0
# Collectives to which each rank must bring a tensor of the same size.
_EQUAL_SIZES = ("all_reduce", "allreduce", "broadcast")

# Of each group, by its name: number of the first collective that is not done, or of the last one; whether it
# is done; what it is; and where it was called.
Calls = dict[str, tuple[int, bool, str, str]]


def name_dumps(env: dict[str, str], prefix: str) -> None:
    """Adds to `env` that a rank writes its dump to `prefix` and its number, unless the user chose."""
    if not {_FILE, _OLD_FILE} & os.environ.keys():
        env[_FILE] = prefix
    env.update({name: value for name, value in _DEFAULTS.items() if name not in os.environ})


def read_calls(prefix: str, ranks: Iterable[int]) -> dict[int, Calls]:
    """Where each of the ranks stands, of those that have written a dump."""
    calls = {}
    for rank in ranks:
        try:
            with open(f"{prefix}{rank}", "rb") as file:
                calls[rank] = summarize(_Plain(file).load()["entries"])
        except (OSError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError):
            continue  # none, or not whole
    return calls


class _Plain(pickle.Unpickler):
    """Reads dictionaries, lists, texts and numbers only."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name}")


def summarize(entries: list[dict[str, Any]]) -> Calls:
    """Where the rank with these entries, oldest first, stands."""
    calls: Calls = {}
    for entry in entries:
        group = str(entry["process_group"][0])
        if entry.get("is_p2p") or (group in calls and not calls[group][1]):
            continue
        done = bool(entry.get("retired") or entry.get("state") == "completed")
        what = str(entry["profiling_name"]).rpartition(":")[2]
        if any(what.startswith(name) for name in _EQUAL_SIZES):
            what += f" of {entry['input_sizes']}"
        frames = (FrameSummary(f["filename"], f["line"], f["name"]) for f in entry.get("frames") or ())
        own = next((frame for frame in frames if not is_library(frame.filename)), None)
        where = f" at {describe(own)}" if own else ""  # none in DDP's backward
        calls[group] = (int(entry["collective_seq_id"]), done, what, where)
    return calls


def share_calls(store: dist.Store, machines: int, calls: dict[int, Calls]) -> dict[int, Calls]:
    """Those of all machines' ranks. Their launchers call this at the same time: if one rank writes a dump,
    all do. A launcher that does not, within _SHARE_S, is left out."""
    everybody = dict(calls)
    with suppress(RuntimeError):
        store.set(f"calls/{store.add('calls', 1)}", json.dumps([*calls.items()]))
        keys = [f"calls/{number}" for number in range(1, machines + 1)]
        wait_until_true(lambda: store.check(keys), time.monotonic() + _SHARE_S, 0.1)
        for key in (key for key in keys if store.check([key])):
            everybody.update(json.loads(store.get(key)))
    return everybody


def who_is_behind(calls: dict[int, Calls]) -> str:
    """The line that names the ranks for which the others wait, and the collective; empty if all did the same,
    or nothing is known."""
    for group in sorted({group for of_rank in calls.values() for group in of_rank}):
        stands = {rank: of_rank[group] for rank, of_rank in sorted(calls.items()) if group in of_rank}
        waiting = {rank: call for rank, call in stands.items() if not call[1]}
        if not waiting or len(stands) < 2:
            continue
        number, _, what, where = stands[first := min(waiting, key=lambda rank: waiting[rank][0])]
        # A rank that has done a later one is of another group with this name, or its number is not known.
        behind = {rank: call for rank, call in stands.items() if call[1] and call[0] < number}
        other = {r: call for r, call in waiting.items() if call[0] == number and call[2] != what}
        text = f"collective number {number}, {what}, which rank {first} called{where}"
        if behind:
            rank, (last, _, its, at) = next(iter(behind.items()))
            names = ", ".join(map(str, behind))
            return f"rank(s) {names} did not come to {text}: rank {rank}'s last was number {last}, {its}{at}"
        if other:
            rank, (_, _, its, at) = next(iter(other.items()))
            return f"the ranks' collectives differ: {text}, is {its} on rank {rank}{at}"
    return ""
