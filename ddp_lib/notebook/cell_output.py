"""CellOutput: what several ranks print and draw in one cell, as one text that is the same at every run.

Ranks print at the same time, in an order that differs from run to run. So the text is put together from the
ranks' own sequences of lines: a line that several ranks print is shown once, and lines of one rank alone come
in rank order between those.
"""

import json
import os
import re
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import IO, Any

# Begins a line of a rank's output that is a picture, or something else for the notebook to display.
DISPLAY = "\x1e"
# Of each rank's lines: how many of the first and of the last are shown, and how much of each line.
_LINES, _CHARACTERS = 500, 2_000
_CHUNK = 1 << 20
# Between two looks of a person who watches; each may send the whole text again.
_REFRESH_S = 0.3

Item = str | tuple[Any, Any]  # a line, or data and metadata of something to display


class RankOutput:
    """The items of one rank, read from the file that it appends to."""

    def __init__(self, rank: int, file: IO[bytes]) -> None:
        self._prefix, self._file, self._position = f"[rank {rank}] ", file, 0
        self._first: list[bytes] = []
        self._last: deque[bytes] = deque(maxlen=_LINES)
        self._count, self._unfinished = 0, b""

    def read(self) -> bool:
        """Reads what is new, and says whether there was something."""
        start = self._position
        while chunk := os.pread(self._file.fileno(), _CHUNK, self._position):
            self._position += len(chunk)
            *lines, rest = (self._unfinished + chunk).split(b"\n")
            self._unfinished = rest if DISPLAY.encode() in rest else rest[-_CHUNK:]
            self._count += len(lines)
            space = max(0, _LINES - len(self._first))
            self._first += lines[:space]
            self._last.extend(lines[space:][-_LINES:])
        return self._position > start

    def items(self) -> list[Item]:
        left_out = self._count - len(self._first) - len(self._last)
        middle = [f"... {left_out:,} lines left out ...".encode()] if left_out else []
        rest = [self._unfinished] if self._unfinished else []
        return [item for line in [*self._first, *middle, *self._last, *rest] for item in self._item(line)]

    def _item(self, line: bytes) -> Iterator[Item]:
        text, mark, display = line.decode(errors="replace").partition(DISPLAY)
        # As a terminal shows it: a progress bar goes back to the start of its line.
        text = text.rstrip().rpartition("\r")[2]
        if text or not mark:
            yield text.removeprefix(self._prefix)[:_CHARACTERS]
        if mark:
            try:
                data, metadata = json.loads(display)
                yield data, metadata
            except ValueError:
                yield display[:_CHARACTERS]


def fold(sequences: dict[int, list[Item]]) -> Iterator[tuple[list[int], Item]]:
    """The items of all ranks in one order that depends on nothing else, each with its ranks.

    The item that comes next is the lowest rank's of those that no other rank has yet to come to.
    """
    lines = {rank: [item for item in items if isinstance(item, str)] for rank, items in sequences.items()}
    to_come = {rank: Counter(own) for rank, own in lines.items()}
    position = dict.fromkeys(sequences, 0)

    def head(rank: int) -> Item:
        return sequences[rank][position[rank]]

    while left := sorted(rank for rank in sequences if position[rank] < len(sequences[rank])):

        def awaited(rank: int) -> bool:
            item = head(rank)
            return isinstance(item, str) and any(to_come[r][item] for r in left if head(r) != item)

        first = next((rank for rank in left if not awaited(rank)), left[0])
        item = head(first)
        same = [rank for rank in left if isinstance(item, str) and head(rank) == item] or [first]
        for rank in same:
            position[rank] += 1
            if isinstance(item, str):
                to_come[rank][item] -= 1
        yield same, item


def ranks_text(ranks: Iterable[int]) -> str:
    """`rank 1`, `ranks 0-3`, `ranks 0,2-3`."""
    runs = [
        [r for _, r in run] for _, run in groupby(enumerate(sorted(ranks)), lambda pair: pair[1] - pair[0])
    ]
    texts = [f"{run[0]}-{run[-1]}" if run[1:] else str(run[0]) for run in runs]
    return f"rank{'s' if len(runs) > 1 or runs[0][1:] else ''} {','.join(texts)}"


class CellOutput:
    """Shows the ranks' items below the cell; while a person watches also before the cell has ended, as far as
    they have come. files: each rank's output."""

    def __init__(self, files: dict[int, IO[bytes]]) -> None:
        for file in files.values():
            os.ftruncate(file.fileno(), 0)
        self._ranks = {rank: RankOutput(rank, file) for rank, file in files.items()}
        self._shown: list[Item] = []
        self._next_s = time.monotonic() + _REFRESH_S
        self._watched, self._news = _somebody_watches(), False

    def refresh(self, now: bool = False) -> None:
        """Shows what is new, if it is time to."""
        for output in self._ranks.values():
            self._news |= output.read()
        if now or (self._news and self._watched and time.monotonic() > self._next_s):
            self._show()
            self._news, self._next_s = False, time.monotonic() + _REFRESH_S

    def forget(self) -> None:
        """Shows everything again the next time, in place of what stands below the cell."""
        self._shown = ["forgotten"]

    def _show(self) -> None:
        from IPython.display import clear_output, display

        items: list[Item] = []
        for ranks, item in fold({rank: output.items() for rank, output in self._ranks.items()}):
            who = f"[{ranks_text(ranks)}]"
            if isinstance(item, str):
                items.append(f"{who} {item}".rstrip())
            else:
                first = re.match(r".*", str(item[0].get("text/plain", "")))
                items += [f"{who} {first[0] if first else ''}".rstrip(), item]
        before, self._shown = self._shown, items  # first of all: an interrupt may come at each step
        if items[: len(before)] != before:
            clear_output(wait=True)
            before = []
        for text, group in groupby(items[len(before) :], lambda item: isinstance(item, str)):
            if text:
                print(*group, sep="\n", flush=True)
            else:
                for item in group:
                    display(item[0], metadata=item[1], raw=True)


def _somebody_watches() -> bool:
    """Whether a front end that can ask a person executes the cell: it can also clear what is below it.
    Programs that execute notebooks, such as nbval, only collect that."""
    from IPython import get_ipython

    return bool(getattr(getattr(get_ipython(), "kernel", None), "_allow_stdin", False))
