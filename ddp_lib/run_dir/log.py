"""A run's log: one JSON line per step and rank, written so that a kill loses at most the last line.

rank<R>.jsonl holds step lines, which have no "event", and event lines: "start" (each time the run
starts or resumes), "epoch", "checkpoint", "end". Numbers that JSON lacks are written as Python's json
module does: NaN, Infinity, -Infinity.
"""

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddp_lib.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

_WHOLE = ("rank", "start", "epoch", "step", "samples")
_REAL = ("loss", "lr", "data_s", "compute_s", "step_s", "time")
# Of a log: its rank, its number of starts, its bytes. A list, since it is sent as JSON.
LogSize = list[int]
_IN_STEP_LINE = frozenset(_WHOLE[2:] + _REAL)


class RunLog:
    """Appends to `folder`/rank<R>.jsonl. Each line is a single unbuffered write: it survives a kill of
    the process, and costs some 10 microseconds."""

    def __init__(self, folder: Path, rank: int) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = path = log_path(folder, rank)
        self.rank = rank
        self._earlier_starts = 0
        half_line = False
        if path.exists():
            self._earlier_starts = sum(line.get("event") == "start" for line in _lines(path))
            half_line = _ends_in_half_line(path)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        if half_line:
            self._file.write(b"\n")

    def start(self, **fields: Any) -> None:
        """The first line of every start; numbers the starts of this rank from 0."""
        fields = {"time": time.time(), **fields, "rank": self.rank}
        self.write(event="start", start=self._earlier_starts, **fields)

    def end(self, step: int, why: str) -> None:
        """The last line of a run that is finished or was stopped by a signal."""
        self.write(event="end", step=step, why=why, time=time.time())

    def write(self, **fields: Any) -> None:
        """Writes a line of plain values (numbers, strings, lists). UserError if the disk refuses."""
        line = json.dumps(fields).encode() + b"\n"
        try:
            # A disk that fills up accepts part of the line, and refuses only the next.
            why = None if self._file.write(line) == len(line) else "No space left on device"
        except OSError as error:
            why = error.strerror
        if why:
            raise UserError(
                f"cannot write {self.path} ({why}): free or unlock the disk and start again; the "
                "same command goes on from the last checkpoint"
            )

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read_run(folder: str | Path, superseded: bool = False) -> "pd.DataFrame":
    """All steps of all ranks as a table, sorted by rank and step.

    Columns: rank, start, epoch, step, samples (integers); loss, lr, data_s, compute_s, step_s, time
    (floats, seconds; time is Unix time). A resumed run repeats the steps after its checkpoint, so the
    table has only the last row of each rank and step. `superseded` keeps the earlier rows too, marked
    in a column `superseded`. Skips half-written lines. UserError if `folder` holds no log.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    restarts: list[dict[str, Any]] = []  # rank 0's
    for line in _numbered_lines(folder):
        if line.get("event") == "start" and line["rank"] == 0:
            restarts.append(line)
        elif "event" not in line and line.keys() >= _IN_STEP_LINE:
            rows.append({name: line[name] for name in _WHOLE + _REAL})
    table = pd.DataFrame(rows, columns=list(_WHOLE + _REAL))
    table = table.astype({**dict.fromkeys(_WHOLE, "int64"), **dict.fromkeys(_REAL, "float64")})
    old = table.duplicated(["rank", "step"], keep="last")
    for restart in restarts:
        # Resumed on fewer ranks: the ranks that are gone cannot repeat their steps.
        gone = table["rank"] >= restart.get("world_size", float("inf"))
        old |= gone & (table["step"] >= restart.get("step", 0)) & (table["time"] < restart["time"])
    table["superseded"] = old
    table = table.sort_values(["rank", "step", "start"], kind="stable", ignore_index=True)
    if superseded:
        return table
    kept = table[~table["superseded"]]
    return kept.drop(columns="superseded").reset_index(drop=True)


def read_events(folder: str | Path) -> "pd.DataFrame":
    """All events of all ranks as a table: columns event, rank, start (which start of this rank) and
    every field that any event has, NaN if an event lacks it. Sorted by rank, in written order.
    UserError if `folder` holds no log."""
    import pandas as pd

    events = [line for line in _numbered_lines(folder) if "event" in line]
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
    return [
        [rank, path.read_bytes().count(b'"event": "start"'), path.stat().st_size]
        for rank, path in logs_in(folder).items()
    ]


def _numbered_lines(folder: str | Path) -> Iterator[dict[str, Any]]:
    """Every whole line of all ranks, in rank order, with `rank` and `start` filled in."""
    logs = logs_in(folder)
    if not logs:
        what = "holds no rank<R>.jsonl" if Path(folder).is_dir() else "is not a folder"
        raise UserError(f"{folder} {what}: name the folder of a run, such as runs/demo")
    for rank, path in logs.items():
        start = 0
        for line in _lines(path):
            if line.get("event") == "start":
                start = int(line.get("start", 0))
            yield {**line, "rank": rank, "start": start}


def _ends_in_half_line(path: Path) -> bool:
    with open(path, "rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a file; skips lines that a kill or a full disk left half-written."""
    with open(path, "rb") as file:
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:  # also raised for bytes that are not UTF-8
                continue
            if isinstance(line, dict):
                yield line
