"""A run while it goes on, from the files in its folder."""

import json
import math
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ddp_lib.config import TrainConfig
from ddp_lib.errors import UserError
from ddp_lib.report.compare_ranks import (
    Warn,
    differing,
    drifting,
    not_finite,
    silent,
    slow,
    times,
)
from ddp_lib.report.live_log import RankLog, ratio
from ddp_lib.run_dir.log import CONFIG, SIGNATURE, SUMMARY, logs_in
from ddp_lib.run_dir.step_lines import read_events as read_event_lines

if TYPE_CHECKING:
    import pandas as pd

_PIECE = 2**20  # bytes read at once
# If there are more bytes at the first look, so many are read of them, in pieces from all over each log.
_AT_FIRST, _SAMPLE = 2**25, 2**14


class LiveRun:
    """The run in `folder`, which `look` brings up to date. Writes nothing and locks nothing.

    Of logs that are long already, the first look reads only their beginning, their end, and pieces between;
    of the first rank all events.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.epochs, self.sync_s = 0, TrainConfig.log_sync_s  # of config.json, if there is one
        self._forget()

    def _forget(self) -> None:
        self.logs: dict[int, RankLog] = {}
        self._read: dict[int, tuple[int, int]] = {}  # each log's inode, and the bytes read
        self.waiting: dict[int, float] = {}  # the part of its time that a rank waits for others, 0 to 1
        self._judged: list[Warn] = []  # when the logs last grew

    def look(self) -> bool:
        """Reads what is new; returns whether anything is. UserError if a log cannot be read."""
        try:
            return self._look()
        except FileNotFoundError:  # moved away just now, to make place for a new run
            return False
        except OSError as error:
            raise UserError(f"cannot read {error.filename} ({error.strerror}): make it readable") from None

    def _look(self) -> bool:
        paths = logs_in(self.folder)
        stats = {rank: path.stat() for rank, path in paths.items()}
        for rank, (inode, size) in self._read.items():
            # Another file: begun afresh, or fetched from another machine. Both are rare: read all again.
            if rank not in stats or stats[rank].st_ino != inode or stats[rank].st_size < size:
                self._forget()
                break
        new = False
        unread = sum(stats[rank].st_size for rank in paths if rank not in self._read)
        for rank, path in paths.items():
            done = self._read.get(rank, (0, 0))[1]
            if stats[rank].st_size == done:
                continue
            log = self.logs.setdefault(rank, RankLog())
            samples = rank not in self._read and unread > _AT_FIRST
            with open(path, "rb") as file:
                if samples:
                    done = _sample(log, file, stats[rank].st_size, _AT_FIRST // len(paths))
                file.seek(done)
                while piece := file.read(_PIECE):
                    log.feed(piece)
                    done += len(piece)
            if samples and rank == min(paths):
                log.replace_events(read_event_lines(path))
            log.written = stats[rank].st_mtime
            self._read[rank] = (stats[rank].st_ino, done)
            new = True
        if new:
            config = _json(self.folder / CONFIG)
            self.epochs = config.get("epochs", self.epochs)
            self.sync_s = config.get("log_sync_s", self.sync_s)
            self._judge()
        return new

    def _judge(self) -> None:
        logs = self.newest
        # An earlier summary stays while a run goes on for more epochs.
        digests = _json(self.folder / SUMMARY).get("weights_sha256", []) if self.ended else []
        by_rank = times(logs)
        self.waiting = {rank: of_rank.waiting for rank, of_rank in by_rank.items()}
        self._judged = [*slow(by_rank), *drifting(logs), *not_finite(logs), *differing(logs, digests)]

    @property
    def newest(self) -> dict[int, RankLog]:
        """The logs of the newest start's ranks, in rank order."""
        size = self.logs[0].start.get("world_size", math.inf) if 0 in self.logs else math.inf
        return {rank: self.logs[rank] for rank in sorted(self.logs) if rank < size}

    @property
    def ranks(self) -> list[int]:
        """Those of the newest start that have a log here."""
        return [*self.newest]

    @property
    def missing(self) -> int:
        """How many ranks have no log here (yet)."""
        size = self.logs[0].start.get("world_size", 0) if 0 in self.logs else 0
        return max(0, size - len(self.ranks))

    @property
    def ended(self) -> str:
        """Why the run has ended, as every rank here says; "" while it has not."""
        whys = [log.ended for log in self.newest.values()]
        return min(whys) if whys and all(whys) else ""

    @property
    def has_job(self) -> bool:
        """Whether a job has signed the folder as its own; a job that was killed leaves its signature."""
        return (self.folder / SIGNATURE).exists()

    @property
    def silent_s(self) -> float:
        """Seconds since any rank wrote; 0 if none has."""
        return max(0.0, time.time() - max((log.written for log in self.logs.values()), default=math.inf))

    @property
    def step(self) -> int:
        """The last step that every rank has done."""
        return min((log.step for log in self.newest.values()), default=-1)

    @property
    def test_accuracy(self) -> float:
        """After the last epoch that has ended; NaN if none has."""
        events = (event for log in self.newest.values() for event in reversed(log.events))
        return next((float(e["test_accuracy"]) for e in events if "test_accuracy" in e), math.nan)

    @property
    def loss(self) -> float:
        """The mean over all images of the recent steps."""
        steps = [step for log in self.newest.values() for step in log.recent.values()]
        return ratio(sum(s.samples * s.loss for s in steps), sum(s.samples for s in steps))

    def warnings(self) -> list[Warn]:
        """What a person should look at now."""
        return [*silent(self.newest, self.sync_s), *self._judged]

    def table(self) -> "tuple[pd.DataFrame, pd.DataFrame, int]":
        """Steps that all ranks have done, and events, as read_run and read_events give them; and how many
        steps a row stands for."""
        import pandas as pd

        width = max((self.logs[rank].width for rank in self.ranks), default=1)
        rows, events = [], []
        for rank in self.ranks:
            log = self.logs[rank]
            log.widen(width)
            events += [{**event, "rank": rank, "start": event.get("start", 0)} for event in log.events]
            for number, (samples, loss, seconds) in sorted(log.bins.items()):
                if samples and number * width <= self.step:
                    rows.append((rank, number * width, samples, loss / samples, seconds))
        steps = pd.DataFrame(rows, columns=["rank", "step", "samples", "loss", "step_s"])
        first = ["event", "rank", "start"]
        others = dict.fromkeys(name for event in events for name in event if name not in first)
        return steps, pd.DataFrame(events, columns=[*first, *others]), width


def _sample(log: RankLog, file: BinaryIO, size: int, most: int) -> int:
    """Feeds `log` about `most` bytes of the first `size` of its file; returns where the last piece begins."""
    last = max(0, size - _SAMPLE)
    count = max(2, most // _SAMPLE)
    for number in range(count - 1):
        file.seek(last * number // (count - 1))
        log.feed(file.read(_SAMPLE))
        log.skip()
    return last


def _json(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        value = json.loads(path.read_text())
        return value if isinstance(value, dict) else {}
    return {}
