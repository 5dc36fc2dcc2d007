"""The step lines of a log as columns of numbers, thousands of lines at a time.

json.loads takes some 6 microseconds per line, which is minutes for the log of many ranks. Here numpy works on
all numbers of a block at once: on the digits, eight at a time, as words of 64 bits. A line that does not look
exactly as RunLog.step writes it is left to json.loads.
"""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

# As RunLog.step writes them.
INTEGERS, FLOATS = ("epoch", "step", "samples"), ("loss", "lr", "data_s", "compute_s", "step_s", "time")
_NAMES = (*INTEGERS, *FLOATS)
# What stands before each number, since the comma before it.
_KEYS = tuple(f', "{name}": '.encode() if name != "epoch" else b'{"epoch": ' for name in _NAMES)
_TIME = 10  # digits before the point of the last one, the time; the others usually have one

_FRONT, _BACK = b" " * 32, b" " * 40  # so that words may be read around every number
_ZEROS, _NINES, _HIGH = (np.uint64(int.from_bytes([byte] * 8)) for byte in (0x30, 0x76, 0x80))
_JOIN = [
    (np.uint64(8), np.uint64(10), np.uint64(0x00FF00FF00FF00FF)),
    (np.uint64(16), np.uint64(100), np.uint64(0x0000FFFF0000FFFF)),
    (np.uint64(32), np.uint64(10000), np.uint64(0xFFFFFFFF)),
]
_MOST = 22  # powers of ten up to this one are floats without an error
_TEN = 10.0 ** np.arange(_MOST + 1)
_SPLIT = 134217729.0  # 2**27 + 1: halves a float into two of 26 bits, whose products have no error
_TEN_HIGH = _TEN * _SPLIT - (_TEN * _SPLIT - _TEN)
_TEN_LOW = _TEN - _TEN_HIGH
_INTEGER_TEN = 10 ** np.arange(19, dtype=np.int64)

_BLOCK = 2**20  # bytes read at once
COLUMNS = ("start", *_NAMES)
TYPES = {name: "float64" if name in FLOATS else "int64" for name in COLUMNS}

Columns: TypeAlias = dict[str, NDArray[Any]]  # by name, see COLUMNS
Bools: TypeAlias = NDArray[np.bool_]
Integers: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float64]


def read_steps(path: Path) -> tuple[Columns, list[dict[str, Any]]]:
    """The steps of a log, in its order, and its "start" lines."""
    start, starts, count = 0, [], 0
    parts: list[Columns] = [_columns([])]
    numbers: list[Integers] = [np.empty(0, np.int64)]  # of the lines that are in parts
    others: dict[int, dict[str, Any]] = {}  # steps that are not, by their lines' numbers
    for block in _blocks(path):
        lines = Lines(block)
        (good,) = np.nonzero(lines.good)
        of_start = np.full(len(good), start)
        for number in np.flatnonzero(~lines.good).tolist():
            line = parse(block[lines.begins[number] : lines.ends[number]])
            if line.get("event") == "start":
                start = int(line.get("start", 0))
                starts.append(line)
                of_start[good > number] = start
            elif "event" not in line and line.keys() >= set(_NAMES):
                others[count + number] = {**line, "start": start}
        parts.append(dict(zip(COLUMNS, [of_start, *lines.integers, *lines.floats], strict=True)))
        numbers.append(count + good)
        count += len(lines.good)
    if others:
        parts.append(_columns([*others.values()]))
        order = np.argsort(np.concatenate([*numbers, [*others]]), kind="stable")
    columns = {name: np.concatenate([part[name] for part in parts]) for name in COLUMNS}
    return {name: column[order] if others else column for name, column in columns.items()}, starts


def _columns(steps: list[dict[str, Any]]) -> Columns:
    import pandas as pd

    table = pd.DataFrame(steps, columns=list(COLUMNS)).astype(TYPES)
    return {name: table[name].to_numpy() for name in COLUMNS}


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """The event lines of a log. They are few: no step has a v, and looking for one takes no time."""
    for block in _blocks(path):
        place = -1
        while (place := block.find(b"v", place + 1)) >= 0:
            begin, end = block.rfind(b"\n", 0, place) + 1, block.index(b"\n", place)
            place = end
            if "event" in (line := parse(block[begin:end])):
                yield line


def parse(text: bytes) -> dict[str, Any]:
    """A line; empty if a kill or a full disk left it half-written."""
    with suppress(ValueError):  # also raised for bytes that are not UTF-8
        line = json.loads(text)
        return line if isinstance(line, dict) else {}
    return {}


def _blocks(path: Path) -> Iterator[bytes]:
    """Whole lines, each with its end, between _FRONT and _BACK."""
    rest = b""
    with open(path, "rb") as file:
        while piece := file.read(_BLOCK):
            end = piece.rfind(b"\n") + 1
            if end:
                yield b"".join((_FRONT, rest, memoryview(piece)[:end], _BACK))
                rest = b""
            rest += piece[end:]
    if rest:
        yield b"".join((_FRONT, rest, b"\n", _BACK))


class Lines:
    """The lines of a block: `good` says which could be read; `integers` and `floats` are columns of those.

    block: as `_blocks` yields it. begins, ends: where each line is in it.
    """

    def __init__(self, block: bytes) -> None:
        self._bytes = np.frombuffer(block, np.uint8)
        self._words = np.ndarray(len(block) - 7, "<u8", block, strides=(1,))  # one begins at each byte
        stops = np.flatnonzero((self._bytes == ord(",")) | (self._bytes == ord("\n")))
        last = np.flatnonzero(self._bytes[stops] == ord("\n"))
        self.ends = stops[last]
        self.begins = np.concatenate(([len(_FRONT)], self.ends[:-1] + 1))
        self.good = np.diff(last, prepend=-1) == len(_NAMES)
        # From here on a row per name, a column per line.
        stops = stops[last[self.good] + np.arange(1 - len(_NAMES), 1)[:, None]]
        keys = np.concatenate((self.begins[None, self.good], stops[:-1]))
        starts = keys + np.array([[len(key)] for key in _KEYS])
        stops[-1] -= 1  # the bracket
        right = self._bytes[stops[-1]] == ord("}")
        for at, key in zip(keys, _KEYS, strict=True):
            for place in {0, len(key) - 8}:
                word = np.uint64(int.from_bytes(key[place : place + 8], "little"))
                right &= self._words[at + place] == word
        whole = slice(len(INTEGERS))
        self.integers, right_integers = self._read_integers(starts[whole], stops[whole])
        right &= right_integers.all(0)
        self.floats = np.empty((len(FLOATS), len(right)))
        for rows, before in ((slice(-1), 1), (slice(-1, None), _TIME)):
            fields = starts[len(INTEGERS) :][rows], stops[len(INTEGERS) :][rows]
            self.floats[rows], right_floats = self._read_floats(*fields, before)
            right &= right_floats.all(0)
        if not right.all():
            self.integers, self.floats = self.integers[:, right], self.floats[:, right]
            self.good[self.good] = right

    def _digits(self, stops: Integers, count: Integers) -> tuple[Integers, Bools]:
        """The number in the last `count` of the eight bytes before `stops`, and whether they are digits."""
        clear = 64 - 8 * count
        np.minimum(np.maximum(clear, 0, out=clear), 64, out=clear)
        word, clear = self._words[stops - 8], clear.view(np.uint64)
        word ^= _ZEROS
        word >>= clear
        word <<= clear
        right = (((word + _NINES) | word) & _HIGH) == 0
        for bits, factor, mask in _JOIN:  # digits to pairs, pairs to fours, fours to eight
            next_ones = word >> bits
            word *= factor
            word += next_ones
            word &= mask
        return word.view(np.int64), right

    def _read_integers(self, starts: Integers, stops: Integers) -> tuple[Integers, Bools]:
        count = stops - starts
        numbers, right = self._digits(stops, count)
        right &= (count == 1) | ((count > 1) & (count <= 8) & (self._bytes[starts] != ord("0")))
        return numbers, right

    def _read_floats(self, starts: Integers, stops: Integers, guess: int) -> tuple[Floats, Bools]:
        """Each number is the float that float() makes of its text."""
        texts, nan = (starts, stops), None
        negative = self._bytes[starts] == ord("-")
        if negative.any():
            starts = starts + negative
        exponent = self._bytes[stops - 4] == ord("e")
        power = np.zeros_like(stops)
        wrong = np.zeros(stops.shape, bool)
        if exponent.any():
            at = stops[exponent]
            power[exponent], right = self._digits(at, np.full_like(at, 2))
            wrong[exponent] = ~right | (self._bytes[at - 3] != ord("-"))
            stops = stops - 4 * exponent
        before = np.full_like(stops, guess)
        for other in (1, 2, 3, 10):
            missing = self._bytes[starts + before] != ord(".")
            if not missing.any():
                break
            before[missing] = other
        else:
            missing = self._bytes[starts + before] != ord(".")
            before[missing] = (stops - starts)[missing]  # no point
        after = np.maximum(stops - starts - before - 1, 0)
        points = starts + before
        whole, right = self._digits(points, before)
        right &= (before == 1) | (self._bytes[starts] != ord("0"))
        if before.max(initial=0) > 8:
            high, right_high = self._digits(points - 8, before - 8)
            whole += 10**8 * high
            right &= right_high
        digits = np.zeros_like(whole)
        for place in range(min(3, -(-int(after.max(initial=0)) // 8))):
            part, right_part = self._digits(stops - 8 * place, after - 8 * place)
            right &= right_part
            if place == 2:  # before that, a number of 64 bits has room for it
                right &= part < 100
            digits += 10 ** (8 * place) * part
        power += after
        right &= (before >= 1) & (before <= 16) & (after <= 24) & (power <= _MOST) & ~wrong
        right &= (whole == 0) | (before + after <= 18)
        right &= (after >= 1) | (points == stops)
        digits += whole * _INTEGER_TEN[np.where(whole == 0, 0, np.minimum(after, 18))]
        numbers, sure = _divide(digits, np.minimum(power, _MOST))
        right &= sure
        if not right.all():
            begins, ends = texts
            at = ends - begins == 3
            nan = at & (self._words[begins] & np.uint64(0xFFFFFF) == int.from_bytes(b"NaN", "little"))
            numbers[nan], right = np.nan, right | nan
        return np.negative(numbers, out=numbers, where=negative), right


def _divide(digits: Integers, power: Integers) -> tuple[Floats, Bools]:
    """digits / 10**power to the nearest float, and whether it surely is the nearest."""
    high = digits.astype(np.float64)
    low = (digits - high.astype(np.int64)).astype(np.float64)
    ten, ten_high, ten_low = _TEN[power], _TEN_HIGH[power], _TEN_LOW[power]
    quotient = high / ten
    scaled = quotient * _SPLIT
    quotient_high = scaled - (scaled - quotient)
    quotient_low = quotient - quotient_high
    product = quotient * ten
    # product + error is quotient * ten
    error = quotient_high * ten_high
    error -= product
    error += quotient_high * ten_low
    error += quotient_low * ten_high
    error += quotient_low * ten_low
    high -= product
    high -= error
    high += low
    high /= ten
    nearest = quotient + high
    rest = high - (nearest - quotient)
    return nearest, nearest + rest * 1.0001 == nearest
