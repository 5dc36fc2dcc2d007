"""Which devices a notebook's ranks choose, without a GPU: python record_devices.py NOTEBOOK...

A stand-in for machines with 1, 2 and 4 GPUs. Executes the notebooks' cells; `run_ranks` and `run_nodes` start
no processes, but call the function (or the script) of each rank here, once for each number of GPUs, up to the
moment when it joins: its choice is noted, and it goes no further. So nothing comes back from the ranks, and
what a statement does with it is passed over.

The ranks of `%ranks` have chosen when they join: their cells (`%%ranks`) are passed over.

Prints one line of JSON per launch: notebook, id of the cell, what was launched, and for each number of GPUs
the [backend, device] of every rank that joins. Ends with status 1 if a cell that launches ranks was not
reached.
"""

import ast
import contextlib
import io
import itertools
import json
import linecache
import os
import re
import resource
import runpy
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import matplotlib
import torch
import torch.distributed as dist

import ddp_lib
from ddp_lib import World
from ddp_lib.data import dataset
from ddp_lib.distributed import world
from ddp_lib.distributed.environment import RankEnv
from ddp_lib.distributed.placement import Place, Seen, place
from ddp_lib.distributed.store_group import StoreGroup
from ddp_lib.errors import UserError
from ddp_lib.notebook import hang_lab

GPUS = (1, 2, 4)
LAUNCHERS = ("run_ranks", "run_nodes", "hang_lab", "kept_ranks")
# A function that joins no group may compute for long.
LONGEST_S = 0.5

# A rank's environment, and what it runs.
Rank = tuple[dict[str, str], Callable[[], object]]


class Joined(BaseException):
    """Ends a rank that has chosen; not an Exception, which a cell may catch."""


class Nothing:
    """What a rank is said to have returned: also its items, attributes and calls are nothing."""

    __iter__ = None  # or it would have no end

    def __getattr__(self, name: str) -> "Nothing":
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __getitem__(self, key: object) -> "Nothing":
        return self

    def __call__(self, *args: object, **kwargs: object) -> "Nothing":
        return self


class Recorder:
    def __init__(self) -> None:
        self.launches: list[dict[str, Any]] = []
        self.where: dict[str, Any] = {}

    def launch(self, name: str, ranks: list[Rank]) -> None:
        """Calls each rank on a machine with each number of GPUs, and notes what it chooses."""
        chosen: dict[int, list[tuple[str, ...]]] = {gpus: [] for gpus in GPUS}
        for env, call in ranks:
            choice, asked = choose(env, call, GPUS[0])
            for gpus in GPUS:
                if asked and gpus != GPUS[0]:  # else it does the same, whatever GPUs there are
                    choice, _ = choose(env, call, gpus)
                chosen[gpus] += choice
        self.launches.append(self.where | {"launch": name, "chosen": chosen})

    def run_ranks(
        self, fn: Callable[..., object], nproc: int = 2, *args: object, **_: object
    ) -> list[Nothing]:
        name = args[0].__name__ if fn.__name__ == "in_group" else fn.__name__  # hang_lab's
        self.launch(name, [(rank_env(r, nproc, r, nproc), partial(fn, *args)) for r in range(nproc)])
        return [Nothing() for _ in range(nproc)]

    def kept_ranks(self, nproc: int) -> None:
        """`%ranks nproc`"""
        self.launch(f"%ranks {nproc}", [(rank_env(r, nproc, r, nproc), World.join) for r in range(nproc)])

    def run_nodes(
        self, command: list[str], nnodes: int = 2, env: dict[str, str] | None = None, **_: object
    ) -> list[Nothing]:
        ranks = []
        for node in range(nnodes):
            given = {name: fill(value, node, nnodes) for name, value in (env or {}).items()}
            ranks += command_ranks([fill(word, node, nnodes) for word in command], given, node, nnodes)
        self.launch(" ".join(command[:2]), ranks)
        return [Nothing() for _ in range(nnodes)]


def choose(env: dict[str, str], call: Callable[[], object], gpus: int) -> tuple[list[tuple[str, ...]], bool]:
    """What a rank chooses, as a list, empty if it does not join; and whether it has asked for GPUs."""
    choice: list[tuple[str, ...]] = []
    start = patch.object(BaseProcess, "start", end_rank)  # such as a DataLoader's worker
    with patch.dict(os.environ, env), start, gpu_machine(gpus) as asked:
        signal.setitimer(signal.ITIMER_REAL, LONGEST_S, LONGEST_S)  # again, if C++ swallows it
        try:
            call()
        except Joined as joined:
            choice = [joined.args] if joined.args else []
        except (Exception, SystemExit) as error:
            choice = [("refused", str(error))] if isinstance(error, UserError) else []
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    return choice, bool(asked)


def fill(text: str, node: int, nnodes: int) -> str:
    for name, value in dict(node=node, nnodes=nnodes, port=1, endpoint="127.0.0.1:1").items():
        text = text.replace("{" + name + "}", str(value))
    return text


def rank_env(rank: int, size: int, local_rank: int, local_size: int) -> dict[str, str]:
    numbers = dict(RANK=rank, WORLD_SIZE=size, LOCAL_RANK=local_rank, LOCAL_WORLD_SIZE=local_size)
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "TORCHELASTIC_RESTART_COUNT": "0"}
    return where | {name: str(value) for name, value in numbers.items()}


def command_ranks(words: list[str], env: dict[str, str], node: int, nnodes: int) -> list[Rank]:
    """The ranks that a command starts on one machine: their environment, and what they run."""
    flags = dict(itertools.pairwise(words))
    scripts = [word for word in words if word.endswith(".py")]
    if scripts:
        call: Callable[[], object] = partial(runpy.run_path, scripts[0], run_name="__main__")
    elif {"train", "ddp_lib.train"} & {*words} and "--dry-run" not in words:
        call = partial(World.join, backend=flags.get("--backend", "auto"))
    else:
        return []
    if env.keys() & {"RANK", "SLURM_PROCID"}:  # the command is a rank
        return [(env, call)]
    local = int(flags.get("--nproc-per-node", "1"))
    envs = [rank_env(node * local + r, nnodes * local, r, local) for r in range(local)]
    return [(env | rank, call) for rank in envs]


chosen: list[str] = []  # what the rank has called set_device with


@contextlib.contextmanager
def gpu_machine(gpus: int) -> Iterator[list[int]]:
    """Yields a list that is no longer empty when somebody has asked for GPUs."""
    asked: list[int] = []

    def count() -> int:
        asked.append(gpus)
        return gpus

    chosen.clear()
    with (
        patch.object(torch.cuda, "device_count", count),
        patch.object(torch.cuda, "get_device_properties", lambda n: SimpleNamespace(uuid=f"GPU-{n}")),
        patch.object(torch.cuda, "is_available", lambda: bool(count())),
        patch.object(torch.cuda, "set_device", lambda device: chosen.append(str(device))),
    ):
        yield asked


@cache
def load_again(name: str, folder: str) -> object:
    return dataset.load_dataset(name, folder, log=lambda line: None)


def load_once(name: str, folder: str = "data", **kwargs: object) -> object:
    """Every rank of a launch asks for the data, and the first must not be ended while it makes them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    try:
        return load_again(name, str(folder))
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})


def note_world(self: world.World) -> None:
    raise Joined(self.backend, str(self.device))


def meet_alike(group: StoreGroup, rank_env: RankEnv, seen: Seen, *_: object) -> Place:
    """The place of this rank among others that see the same: on each machine all its GPUs."""
    local = rank_env.local_world_size
    ranks = [
        replace(
            seen,
            machine=f"{n // local}",
            gpus=[f"{n // local} {gpu}" for gpu in seen.gpus],
            local_rank=n % local,
        )
        for n in range(rank_env.world_size)
    ]
    return place(ranks)[rank_env.rank]


def note_group(backend: str = "auto", *args: object, device_id: object = None, **kwargs: object) -> None:
    raise Joined(backend, str(device_id or (chosen or ["cpu"])[-1]))


def end_rank(*args: object, **kwargs: object) -> None:
    raise Joined


true_copy = shutil.copy


def copy_if_there(source: str, target: str) -> None:
    """A file that a rank would have written is not there."""
    with contextlib.suppress(FileNotFoundError):
        true_copy(source, target)


@contextlib.contextmanager
def stand_in(recorder: Recorder) -> Iterator[None]:
    signal.signal(signal.SIGALRM, end_rank)
    with (
        patch.object(world.World, "_init_process_group", note_world),
        patch.object(world.World, "_init_group_of_one", note_world),
        patch.object(world, "open_store", lambda *args: StoreGroup()),
        patch.object(world, "handshake", meet_alike),
        patch.object(ddp_lib, "load_dataset", load_once),
        patch.object(dist, "init_process_group", note_group),
        patch.object(dist, "TCPStore", end_rank),
        patch.object(shutil, "copy", copy_if_there),
        patch.object(resource, "setrlimit", end_rank),  # this process must not have a rank's limits
        patch.object(ddp_lib, "watch", end_rank),  # it would wait for a run that has not begun
        patch.object(ddp_lib, "run_ranks", recorder.run_ranks),
        patch.object(ddp_lib, "run_nodes", recorder.run_nodes),
        patch.object(hang_lab, "run_ranks", recorder.run_ranks),
    ):
        yield


def launching_cells(sources: list[ast.Module]) -> set[int]:
    """The cells that launch ranks, themselves or by a function of the notebook."""
    launchers, before = set(LAUNCHERS), 0
    while len(launchers) > before:
        before = len(launchers)
        for tree in sources:
            functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
            launchers |= {f.name for f in functions if calls(f) & launchers}
    doing = [[s for s in tree.body if not isinstance(s, ast.FunctionDef)] for tree in sources]
    return {n for n, body in enumerate(doing) if any(calls(statement) & launchers for statement in body)}


def calls(tree: ast.AST) -> set[str]:
    return {called(node) for node in ast.walk(tree) if isinstance(node, ast.Call)}


def called(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else ""


def launch_the_rest(statement: ast.stmt, file: str, names: dict[str, Any]) -> None:
    """Makes all launches of a statement that did not come to its end."""
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return
    for node in ast.walk(statement):
        if isinstance(node, ast.Call) and called(node) in LAUNCHERS:
            with contextlib.suppress(Exception):
                eval(compile(ast.Expression(node), file, "eval"), names)


def without_magics(source: str) -> str:
    if source.startswith("%%ranks"):
        return ""
    source = re.sub(r"^%ranks (\d+).*$", r"kept_ranks(\1)", source, flags=re.M)
    return re.sub(r"^%.*$", "", source, flags=re.M)


def record(path: Path, recorder: Recorder) -> set[str]:
    """Executes a notebook; returns the ids of the cells that should have launched ranks and did not."""
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    sources = [without_magics("".join(cell["source"])) for cell in cells]
    trees = [ast.parse(source) for source in sources]
    names: dict[str, Any] = {"__name__": "__main__", "display": lambda *args: None}
    names["kept_ranks"] = recorder.kept_ranks
    recorder.launches.clear()
    for cell, source, tree in zip(cells, sources, trees, strict=True):
        recorder.where, file = {"notebook": path.stem, "cell": cell["id"]}, f"{path.stem} {cell['id']}"
        linecache.cache[file] = (len(source), None, source.splitlines(True), file)  # for inspect.getsource
        for statement in tree.body:
            with contextlib.redirect_stdout(io.StringIO()):
                try:
                    exec(compile(ast.Module([statement], []), file, "exec"), names)
                except (Exception, Joined):  # TCPStore in the notebook's process
                    launch_the_rest(statement, file, names)
    # An exercise may need what a training left behind, before it launches ranks.
    exercises = {n for n, cell in enumerate(cells) if "exercise" in cell["metadata"].get("tags", [])}
    wanted = {cells[n]["id"] for n in launching_cells(trees) - exercises}
    return wanted - {launch["cell"] for launch in recorder.launches}


def main(notebooks: list[Path]) -> int:
    matplotlib.use("Agg")
    torch.set_num_threads(1)
    recorder, missed = Recorder(), False
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    for path in notebooks:
        path = path.resolve()
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), stand_in(recorder):
            sys.path.insert(0, "")
            not_reached = record(path, recorder)
        for launch in recorder.launches:
            print(json.dumps(launch), flush=True)
        if not_reached:
            print(f"{path.stem}: cells {sorted(not_reached)} launched no ranks", file=sys.stderr)
            missed = True
    return int(missed)


if __name__ == "__main__":
    sys.exit(main([Path(name) for name in sys.argv[1:]]))
