"""A run's log: one JSON line per step and rank, written so that a kill loses at most the last line.

rank<R>.jsonl holds step lines, which have no "event", and event lines: "start" (each time the run starts or
resumes), "epoch", "digest" (of the rank's parameters), "checkpoint", "end". Numbers that JSON lacks are
written as Python's json module does: NaN, Infinity, -Infinity.
"""

import errno
import json
import math
import os
import re
import time
from collections.abc import Collection, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddp_lib.distributed.device import usable_cores
from ddp_lib.errors import TransientError, UserError, limit_reached
from ddp_lib.processes.forkserver import context, no_main_module
from ddp_lib.run_dir import step_lines
from ddp_lib.run_dir.export import Export

if TYPE_CHECKING:
    import pandas as pd

# Other files of the folder: two of the package's training, the same in runs of version 1.0, and one that
# names the job that has the folder, and the rank that writes there.
CONFIG, SUMMARY, SIGNATURE = "config.json", "summary.json", ".job"
# Bytes of logs that one core reads in about a second.
_LONG = 2**28
LogSize = list[int]  # of a log: its rank, number of starts, bytes; a list, since it is sent as JSON


@contextmanager
def name_disk_errors(path: Path, kept: str) -> Iterator[None]:
    """Turns an OSError into a UserError that names `path` and ends with `kept`: what is not lost."""
    try:
        yield
    except OSError as error:
        if limit := limit_reached(error):
            raise TransientError(f"cannot write {path}: {limit}, and start again; {kept}") from None
        wrong = isinstance(error, (PermissionError, NotADirectoryError, IsADirectoryError))
        kind = UserError if wrong else TransientError
        raise kind(
            f"cannot write {path} ({error.strerror}): free or unlock the disk and start again; {kept}"
        ) from None


class RunLog(AbstractContextManager["RunLog"]):
    """Appends to `folder`/rank<R>.jsonl. Each line is a single unbuffered write: it survives a kill of the
    process, and costs some 10 microseconds. In a folder with a Checkpoint, write after its load().

    with RunLog("runs/mine", world.rank) as log:
        log.start(step=step, **world.describe())
        log.step(epoch, step, samples=len(x), loss=loss.item())   # in each step
        log.epoch(epoch, step, test_accuracy=right / count)       # on rank 0
    """

    def __init__(self, folder: str | Path, rank: int = 0, export: str = "none") -> None:
        """export: tensorboard or wandb, which get the lines too. UserError if it is not installed."""
        self.path, self.rank = log_path(folder, rank), rank
        self._export = None if export == "none" else Export(export, Path(folder), rank)
        self._stepped_s = time.perf_counter()

    @cached_property
    def _file(self) -> FileIO:
        """Opened by the first line: before it, Checkpoint.load may fetch a newer log from another machine."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = open(self.path, "a+b", buffering=0)  # noqa: SIM115
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # a half line, which a kill or a full disk left
                file.write(b"\n")
        return file

    def start(self, **fields: Any) -> None:
        """The first line of every start; numbers the starts of this rank from 0."""
        fields = {"time": time.time(), **fields, "rank": self.rank}
        lines = step_lines.read_events(self.path) if self.path.exists() else ()
        earlier = sum(line["event"] == "start" for line in lines)
        self.write(event="start", start=earlier, **fields)
        self.start_timer()

    def step(
        self,
        epoch: int,
        step: int,
        *,
        samples: int,
        loss: float,
        lr: float = math.nan,
        data_s: float = math.nan,
        step_s: float | None = None,
    ) -> None:
        """A step of this rank. step: counted through all epochs, from 0. samples: of this rank. loss: their
        mean. data_s: seconds that the batch took; step_s: of the whole step, since the step before if not
        given."""
        now = time.perf_counter()
        step_s = now - self._stepped_s if step_s is None else step_s
        self._stepped_s = now
        times = {"data_s": data_s, "compute_s": step_s - data_s, "step_s": step_s, "time": time.time()}
        self.write(epoch=epoch, step=step, samples=samples, loss=loss, lr=lr, **times)

    def epoch(self, epoch: int, step: int, **results: Any) -> None:
        """The end of an epoch, before step number `step`. results: test_accuracy (0 to 1) gets plotted."""
        self.write(event="epoch", epoch=epoch, step=step, **results, time=time.time())
        self.start_timer()

    def has_epoch(self, epoch: int) -> bool:
        """Whether the end of this epoch, from 0, is in the log."""
        lines = step_lines.read_events(self.path) if self.path.exists() else ()
        return any(line["event"] == "epoch" and line.get("epoch") == epoch for line in lines)

    def digest(self, step: int, sha256: str) -> None:
        """Of this rank's parameters before step number `step`: equal on all ranks while replicas agree."""
        self.write(event="digest", step=step, sha256=sha256, time=time.time())
        self.start_timer()

    def start_timer(self) -> None:
        """After a pause, such as a validation: the next step's step_s counts from here."""
        self._stepped_s = time.perf_counter()

    def end(self, step: int, why: str) -> None:
        """The last line of a run that is finished or was stopped by a signal."""
        self.write(event="end", step=step, why=why, time=time.time())

    def write(self, **fields: Any) -> None:
        """Writes a line of plain values (numbers, strings, lists). UserError if the disk refuses."""
        line = json.dumps(fields).encode() + b"\n"
        with name_disk_errors(self.path, "the same command goes on from the last checkpoint"):
            if self._file.write(line) < len(line):  # a disk that fills up refuses only the next line
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self._export is not None:
            self._export.write(fields)

    def close(self) -> None:
        if self._export is not None:
            self._export.close()
        if "_file" in vars(self):
            self._file.close()

    def __exit__(self, *error: object) -> None:
        self.close()


def read_run(folder: str | Path, superseded: bool = False) -> "pd.DataFrame":
    """All steps of all ranks as a table, sorted by rank and step.

    Columns: rank, start, epoch, step, samples (integers); loss, lr, data_s, compute_s, step_s, time (floats,
    seconds; time is Unix time). A resumed run repeats the steps after its checkpoint, so the table has only
    the last row of each rank and step. `superseded` keeps the earlier rows too, marked in a column
    `superseded`. Skips half-written lines. UserError if `folder` holds no log, or a process that reads one
    is ended, as for want of memory.
    """
    import numpy as np
    import pandas as pd

    names = ["rank", *step_lines.TYPES, *(["superseded"] if superseded else [])]
    types = {"rank": "int32", "superseded": "bool", **step_lines.TYPES}
    table = {name: np.empty(0, types[name]) for name in names}
    restarts: list[dict[str, Any]] = []
    logs = _require_logs(folder)
    with _map_files(logs.values()) as read:
        for rank, (log, starts) in zip(logs, read, strict=True):
            restarts = starts if rank == 0 else restarts
            log = {"rank": np.full(len(log["step"]), rank, "int32"), **_in_order(rank, log, restarts)}
            if not superseded and log["superseded"].any():
                log = {name: column[~log["superseded"]] for name, column in log.items()}
            for name, column in table.items():
                rows = len(column)
                # In place: the table may be most of what memory there is.
                column.resize(rows + len(log[name]), refcheck=False)
                column[rows:] = log[name]
    return pd.DataFrame(table, copy=False)


@contextmanager
def _map_files(paths: Collection[Path]) -> Iterator[Iterator[step_lines.Steps]]:
    """read_steps of each; on all cores if that takes seconds."""
    if sum(path.stat().st_size for path in paths) < _LONG:
        yield map(step_lines.read_steps, paths)
        return
    try:
        with no_main_module(), ProcessPoolExecutor(usable_cores(), context()) as pool:
            yield pool.map(step_lines.read_steps, paths)
    except BrokenProcessPool:  # so the system ends a process that takes too much
        raise TransientError(
            "a process that read the logs was ended, perhaps for want of memory: free some, and try again"
        ) from None


def _in_order(rank: int, log: step_lines.Columns, restarts: list[dict[str, Any]]) -> step_lines.Columns:
    """A rank's steps in order, with a column `superseded`. restarts: the starts of rank 0."""
    import numpy as np
    import pandas as pd

    step, old = log["step"], np.zeros(len(log["step"]), bool)
    ordered = (step[1:] > step[:-1]).all()
    if not ordered:
        old = pd.Series(step).duplicated(keep="last").to_numpy()
    for restart in restarts:
        # Resumed on fewer ranks: the ranks that are gone cannot repeat their steps.
        if rank >= restart.get("world_size", float("inf")):
            old = old | ((step >= restart.get("step", 0)) & (log["time"] < restart["time"]))
    log = {**log, "superseded": old}
    order = slice(None) if ordered else np.lexsort((log["start"], step))
    return {name: column[order] for name, column in log.items()}


def read_events(folder: str | Path) -> "pd.DataFrame":
    """All events of all ranks as a table: columns event, rank, start (which start of this rank) and every
    field that any event has, NaN if an event lacks it. Sorted by rank, in written order. UserError if
    `folder` holds no log."""
    import pandas as pd

    events = []
    for rank, path in _require_logs(folder).items():
        start = 0
        for line in step_lines.read_events(path):
            if line["event"] == "start":
                start = int(line.get("start", 0))
            events.append({**line, "rank": rank, "start": start})
    first = ["event", "rank", "start"]
    others = dict.fromkeys(name for line in events for name in line if name not in first)
    return pd.DataFrame(events, columns=[*first, *others])


def log_path(folder: str | Path, rank: int) -> Path:
    return Path(folder) / f"rank{rank}.jsonl"


def logs_in(folder: str | Path) -> dict[int, Path]:
    """The ranks' logs in `folder`, in rank order."""
    matches = (re.fullmatch(r"rank(\d+)\.jsonl", path.name) for path in Path(folder).glob("rank*"))
    ranks = sorted(int(match[1]) for match in matches if match)
    return {rank: log_path(folder, rank) for rank in ranks}


def log_sizes(folder: Path) -> list[LogSize]:
    """The sizes of the logs in `folder`, to compare with other machines."""
    logs = ((rank, path.read_bytes()) for rank, path in logs_in(folder).items())
    return [[rank, log.count(b'"event": "start"'), len(log)] for rank, log in logs]


def _require_logs(folder: str | Path) -> dict[int, Path]:
    logs = logs_in(folder)
    if not logs:
        what = "holds no rank<R>.jsonl" if Path(folder).is_dir() else "is not a folder"
        raise UserError(f"{folder} {what}: name the folder of a run, such as runs/demo")
    return logs
