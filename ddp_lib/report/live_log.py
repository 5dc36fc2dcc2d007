"""One rank's log while it grows: it keeps sums and the last steps, and reads each byte once."""

import json
import math
import statistics
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

RECENT = 50  # steps that speeds and warnings are judged by
_POINTS = 512  # of the curve, at most: then two become one

# A rank is silent after this many seconds, this many of its usual steps, or this many times its longest pause
# so far, whichever is longest: a validation is such a pause.
_SILENT_S, _SILENT_STEPS, _SILENT_PAUSES = 5.0, 20.0, 2.0


class Step(NamedTuple):
    """A step of a rank, as RunLog.step writes it."""

    samples: int
    loss: float
    data_s: float
    compute_s: float
    step_s: float


@dataclass
class RankLog:
    """A rank's log, fed with its bytes as they come."""

    start: dict[str, Any] = field(default_factory=dict)  # the newest "start" line
    events: list[dict[str, Any]] = field(default_factory=list)  # "start" and "epoch" lines
    ended: str = ""  # why, if the last line says that the run is at its end
    step: int = -1
    epoch: int = 0
    written: float = 0.0  # when the file was last written (Unix time)
    recent: dict[int, Step] = field(default_factory=dict)  # the last RECENT steps
    longest_pause_s: float = 0.0  # between two lines of one start
    not_finite: int | None = None  # the first step whose loss is not
    digests: dict[int, str] = field(default_factory=dict)  # of the parameters, by step
    bins: dict[int, list[float]] = field(default_factory=dict)  # samples, samples * loss, seconds
    width: int = 1  # steps per bin, a power of two
    _rest: bytes = b""  # a line whose end has not come yet
    _last: float = math.nan  # the time that the last line gives

    def feed(self, data: bytes) -> None:
        """The log's next bytes, cut anywhere. Skips lines that are not whole, and unknown ones."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for text in lines:
            with suppress(
                ValueError, TypeError, KeyError, AttributeError
            ):  # half-written, or somebody else's
                self._line(json.loads(text))

    def skip(self) -> None:
        """What comes next is not the continuation: lines between are left out."""
        self._rest, self._last = b"", math.nan

    def replace_events(self, lines: Iterable[dict[str, Any]]) -> None:
        """lines: all events of this log; those between the pieces that were fed are new."""
        self.events = [line for line in lines if line["event"] in ("start", "epoch")]
        self.start = next((line for line in reversed(self.events) if line["event"] == "start"), self.start)

    def _line(self, line: dict[str, Any]) -> None:
        match line.get("event"):
            case None:
                self._step(line)
            case "start":
                self._restart(line)
            case "epoch":
                self.events.append(line)
            case "digest":
                self.digests[int(line["step"])] = str(line["sha256"])
            case "end":
                self.ended = str(line["why"])
        if line.get("event") != "start":
            self.longest_pause_s = max(self.longest_pause_s, line["time"] - self._last)
        self._last = line["time"]

    def _restart(self, line: dict[str, Any]) -> None:
        """Steps from here on come again; what they said does not count any more."""
        step = int(line.get("step", 0))
        self.start, self.ended, self._last = line, "", math.nan
        self.events.append(line)
        self.step = min(self.step, step - 1)
        self.recent.clear()
        # A bin in whose middle the restart lies keeps both attempts, which are usually equal.
        self.bins = {number: sums for number, sums in self.bins.items() if number * self.width < step}
        self.digests = {at: digest for at, digest in self.digests.items() if at <= step}
        if self.not_finite is not None and self.not_finite >= step:
            self.not_finite = None

    def _step(self, line: dict[str, Any]) -> None:
        step = Step(*(line[name] for name in Step._fields))
        self.step, self.epoch, self.ended = int(line["step"]), int(line["epoch"]), ""
        self.recent[self.step] = step
        if len(self.recent) > RECENT:
            del self.recent[next(iter(self.recent))]
        if self.not_finite is None and not math.isfinite(step.loss):
            self.not_finite = self.step
        self._add(self.step // self.width, step.samples, step.samples * step.loss, step.step_s)
        if len(self.bins) > _POINTS:
            self.widen(2 * self.width)

    def _add(self, number: int, samples: float, loss: float, seconds: float) -> None:
        sums = self.bins.setdefault(number, [0.0, 0.0, 0.0])
        sums[0] += samples
        sums[1] += loss
        sums[2] += seconds

    def widen(self, width: int) -> None:
        """Makes bins of `width` steps, a power of two, unless they are as wide."""
        if width > self.width:
            narrow, self.bins = self.bins, {}
            for number, sums in narrow.items():
                self._add(number * self.width // width, *sums)
            self.width = width

    def curve(self, points: int) -> list[float]:
        """The losses until now as at most `points` means, from the first step to the last."""
        bins = [sums for _, sums in sorted(self.bins.items())]
        size = -(-len(bins) // points) or 1
        parts = (bins[begin : begin + size] for begin in range(0, len(bins), size))
        return [ratio(sum(loss for _, loss, _ in part), sum(n for n, _, _ in part)) for part in parts]

    @property
    def loss(self) -> float:
        """Mean over the images of the recent steps."""
        return ratio(sum(s.samples * s.loss for s in self.recent.values()), self._samples())

    @property
    def images_per_s(self) -> float:
        return ratio(self._samples(), sum(s.step_s for s in self.recent.values()))

    def _samples(self) -> float:
        return sum(s.samples for s in self.recent.values())

    @property
    def usual_step_s(self) -> float:
        return statistics.median(s.step_s for s in self.recent.values()) if self.recent else 0.0

    @property
    def silent_after_s(self) -> float:
        """Seconds after which the rank should have written again."""
        pauses = _SILENT_PAUSES * self.longest_pause_s
        return max(_SILENT_S, _SILENT_STEPS * self.usual_step_s, pauses)


def ratio(total: float, by: float) -> float:
    """NaN by zero."""
    return total / by if by else math.nan
