"""The lines of a log, thousands at a time: steps as columns of numbers, events as dictionaries."""

import json
from collections.abc import Iterator
from contextlib import suppress
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

Int32 = Annotated[int, msgspec.Meta(ge=-(2**31), lt=2**31)]


class Step(msgspec.Struct, gc=False):
    """A line, as RunLog.step writes it."""

    epoch: Int32
    step: Int32
    samples: Int32
    loss: float
    lr: float
    data_s: float
    compute_s: float
    step_s: float
    time: float


TYPES = {"start": "int32"} | {
    name: "float64" if kind is float else "int32" for name, kind in Step.__annotations__.items()
}
_STEPS = msgspec.json.Decoder(Step)
_BLOCK = 2**20  # bytes read at once

Columns: TypeAlias = dict[str, NDArray[Any]]  # by name, see TYPES
Steps: TypeAlias = tuple[Columns, list[dict[str, Any]]]  # and the "start" lines


def read_steps(path: Path) -> Steps:
    """The steps of a log, in its order, and its "start" lines."""
    start, starts = 0, []
    parts: list[Columns] = [_columns([], 0)]
    for lines in _runs(path):
        if isinstance(lines, dict):
            if lines["event"] == "start":
                start = int(lines.get("start", 0))
                starts.append(lines)
        else:
            parts.append(_columns(_decode(lines), start))
    return {name: np.concatenate([part[name] for part in parts]) for name in TYPES}, starts


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """The event lines of a log."""
    return (lines for lines in _runs(path) if isinstance(lines, dict))


def _parse(text: bytes) -> dict[str, Any]:
    """A line; empty if a kill or a full disk left it half-written."""
    with suppress(ValueError):  # also raised for bytes that are not UTF-8
        line = json.loads(text)
        return line if isinstance(line, dict) else {}
    return {}


def _decode(lines: bytes) -> list[Step]:
    with suppress(msgspec.DecodeError, UnicodeDecodeError):
        return _STEPS.decode_lines(lines)
    steps = []  # one is half-written, or holds a NaN
    for line in lines.split(b"\n"):
        with suppress(msgspec.ValidationError):
            steps.append(msgspec.convert(_parse(line), Step))
    return steps


def _columns(steps: list[Step], start: int) -> Columns:
    columns = {
        name: np.fromiter(map(attrgetter(name), steps), kind, len(steps))
        for name, kind in TYPES.items()
        if name != "start"
    }
    return {"start": np.full(len(steps), start, TYPES["start"]), **columns}


def _runs(path: Path) -> Iterator[bytes | dict[str, Any]]:
    """The lines of a log, in order: each event, and between two of them the steps in pieces."""
    for block in _blocks(path):
        begin = place = 0
        while (place := block.find(b'"event"', place)) >= 0:
            first, place = block.rfind(b"\n", 0, place) + 1, block.index(b"\n", place)
            if "event" in (line := _parse(block[first:place])):
                if first > begin:
                    yield block[begin:first]
                yield line
                begin = place + 1
        if begin < len(block):
            yield block[begin:]


def _blocks(path: Path) -> Iterator[bytes]:
    """Whole lines, each with its end."""
    rest = b""
    with open(path, "rb") as file:
        while piece := file.read(_BLOCK):
            end = piece.rfind(b"\n") + 1
            if end:
                yield rest + piece[:end]
                rest = b""
            rest += piece[end:]
    if rest:
        yield rest + b"\n"
