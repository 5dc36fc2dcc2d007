"""What the logs of a run's ranks say beside each other: who waits, and what a person should look at."""

import math
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from ddp_lib.report.live_log import RankLog, ratio

_FEWEST = 20  # steps of which a rank is judged at all
# A rank is slow if it works this many times as long as the others, and this many seconds longer.
_SLOW, _SLOW_S = 1.1, 0.002
# Losses drift apart if a rank's differs from the others' by this many standard errors, and this part of them.
_DRIFT_ERRORS, _DRIFT = 6.0, 0.1

Logs = Mapping[int, RankLog]  # by rank


class Warn(NamedTuple):
    """Something that a person should look at. lasting: it follows from the log alone, not from the moment."""

    kind: str  # silent, slow, drift, not finite, digest
    ranks: tuple[int, ...]
    text: str
    lasting: bool = False


class Times(NamedTuple):
    """A rank's, over the recent steps that all ranks have done."""

    work_s: float  # median per step without waiting; NaN if there are few steps
    waiting: float  # the part of the time, 0 to 1


def common_steps(logs: Logs) -> list[int]:
    """The recent steps that every rank has done."""
    first, *others = (log.recent.keys() for log in logs.values()) if logs else [()]
    return sorted(set(first).intersection(*others))


def times(logs: Logs) -> dict[int, Times]:
    """How long each rank works and waits; empty if the ranks have no step in common.

    Ranks wait for each other inside backward(), so within compute_s. The rank that waits for nobody shows how
    long computing takes; what others have above it is waiting.
    """
    steps = common_steps(logs)
    least = {step: min(log.recent[step].compute_s for log in logs.values()) for step in steps}
    result = {}
    for rank, log in logs.items() if steps else ():
        wait_s = [log.recent[step].compute_s - least[step] for step in steps]
        step_s = [log.recent[step].step_s for step in steps]
        waiting = ratio(sum(wait_s), sum(step_s))
        # NaN: a script that does not measure data_s.
        work_s = step_s if math.isnan(waiting) else [a - b for a, b in zip(step_s, wait_s, strict=True)]
        result[rank] = Times(statistics.median(work_s) if len(steps) >= _FEWEST else math.nan, waiting)
    return result


def silent(logs: Logs, sync_s: float = 0.0) -> Iterator[Warn]:
    """Ranks that should have written again by now, and have not said that they are at the end.

    sync_s: seconds between two copies of the lines of other machines than rank 0's.
    """
    now, late = time.time(), {}
    here = logs[min(logs)].start.get("host") if logs else None
    for rank, log in logs.items():
        patience_s = log.silent_after_s + (2 * sync_s if log.start.get("host") != here else 0.0)
        if log.step >= 0 and not log.ended and now - log.written > patience_s:
            late[rank] = now - log.written
    if late:
        usual_s = statistics.median(logs[rank].usual_step_s for rank in late)
        text = (
            f"{_name(late)}: no line for {max(late.values()):.0f} s, a step usually takes {usual_s:.2g} s; "
            "ddp-launch stacks says where a rank stands"
        )
        yield Warn("silent", tuple(late), text)


def slow(times_by_rank: Mapping[int, Times]) -> Iterator[Warn]:
    """Ranks that work longer per step than the median of the others."""
    for rank, (work_s, _) in times_by_rank.items():
        others = [their.work_s for other, their in times_by_rank.items() if other != rank]
        usual_s = statistics.median(others) if others else math.inf
        if work_s > max(_SLOW * usual_s, usual_s + _SLOW_S):
            text = (
                f"rank {rank} is slow: it works {work_s * 1000:.1f} ms per step, the others' median is "
                f"{usual_s * 1000:.1f} ms"
            )
            yield Warn("slow", (rank,), text)


def drifting(logs: Logs) -> Iterator[Warn]:
    """The rank whose losses differ most from the others', if by more than their noise; both, of two ranks."""
    steps, ranks = common_steps(logs), [*logs]
    totals = [sum(log.recent[step].loss for log in logs.values()) for step in steps]
    if len(steps) < _FEWEST or len(ranks) < 2 or not all(map(math.isfinite, totals)):
        return
    apart = []
    for rank, log in logs.items():
        # Compared step by step, so that a loss that falls, equally on all ranks, does not count.
        own = [log.recent[step].loss for step in steps]
        others = [(total - loss) / (len(ranks) - 1) for total, loss in zip(totals, own, strict=True)]
        gaps = [a - b for a, b in zip(own, others, strict=True)]
        gap, error = abs(statistics.fmean(gaps)), statistics.stdev(gaps) / math.sqrt(len(gaps))
        if gap > _DRIFT_ERRORS * error and gap > _DRIFT * abs(statistics.fmean(others)):
            apart.append((gap, rank))
    if apart:
        gap, rank = max(apart)
        who = "the two ranks' differ" if len(ranks) == 2 else f"rank {rank}'s differ from the others'"
        text = (
            f"losses drift apart: {who} by {gap:.2g} over {len(steps)} steps; compare the replicas, and how "
            "the data is divided"
        )
        yield Warn("drift", tuple(ranks) if len(ranks) == 2 else (rank,), text, True)


def not_finite(logs: Logs) -> Iterator[Warn]:
    """Ranks with a loss that is not a number, or infinite."""
    for rank, log in logs.items():
        if log.not_finite is not None:
            text = (
                f"the loss of rank {rank} is not finite at step {log.not_finite}: lower the learning rate, "
                "or look for bad values in the data"
            )
            yield Warn("not finite", (rank,), text, True)


def differing(logs: Logs, at_end: Iterable[str]) -> Iterator[Warn]:
    """Ranks whose parameters are not those of the first rank, by their digests: those of the last step for
    which two logs have one, or `at_end`, in rank order."""
    steps = [step for log in logs.values() for step in log.digests]
    last = max((step for step in set(steps) if steps.count(step) > 1), default=-1)
    digests = {rank: log.digests[last] for rank, log in logs.items() if last in log.digests}
    for when, by_rank in ((f"before step {last}", digests), ("at the end", dict(enumerate(at_end)))):
        first = next(iter(by_rank), 0)
        if differ := [rank for rank, digest in by_rank.items() if digest != by_rank[first]]:
            text = (
                f"the parameters of {_name(differ)} differ from rank {first}'s {when}: something other than "
                "DDP changed them"
            )
            yield Warn("digest", tuple(differ), text, True)
            return


def _name(ranks: Iterable[int]) -> str:
    names = [str(rank) for rank in ranks]
    return f"rank{'s' if len(names) > 1 else ''} {', '.join(names)}"
