"""watch: what each rank of a run does now, in a notebook's cell or on a terminal, until the run ends.

It reads the files in the run's folder and nothing else. So the run may have been started anywhere, and
neither notices the other's end.
"""

import base64
import io
import math
import os
import sys
import textwrap
import time
from pathlib import Path
from typing import Any, Protocol

from ddp_lib.errors import UserError
from ddp_lib.report.live_log import RECENT, RankLog
from ddp_lib.report.live_run import LiveRun
from ddp_lib.run_dir.log import read_events

LOOK_S = 0.5  # between two looks
DRAWING = 0.15  # of a core, at most
_LINE_EVERY_S = 10.0  # where lines are appended: between two that say how far the run is
_NEW_S = 30.0  # a warning that has not held for so long is new
_COLUMNS, _ROWS = 80, 24  # of a table in a notebook
_BARS, _CURVE = "▁▂▃▄▅▆▇█", 20  # on a terminal: how low and high losses look, and characters of a curve
# A job that was killed leaves its signature in the folder: then silence lasts this many times as long.
_WITH_JOB = 10


def watch(folder: str | Path, *, wait_s: float = 60.0) -> None:
    """Shows the run in `folder` until it ends: of each rank the step, loss, images/s and part of the time
    that it waits for others; the mean loss and the test accuracy; and warnings: a rank that is silent or
    slow, losses that drift apart or are not finite, parameters that differ. In a notebook also as a picture,
    the last of which stays.

    It may begin before the run. An interrupt (Ctrl-C, the notebook's stop button) ends it and not the run. A
    program that you start from a notebook hears Jupyter's interrupt too, unless it has a session of its own
    (`subprocess.Popen(..., start_new_session=True)`).

    wait_s: seconds without a new line after which a run that no job has is taken to have ended. UserError if
    by then no rank has written a line.
    """
    if not wait_s > 0:
        raise UserError(f"wait_s is {wait_s}: give a number of seconds above 0")
    run, began_s = LiveRun(folder), time.monotonic()
    view = _make_view(run)
    try:
        while not (why := _why_over(run, wait_s)):
            new = run.look()
            if not run.logs and (run.folder.is_file() or time.monotonic() - began_s > wait_s):
                read_events(folder)  # raises
            view.show(new)
            if not run.ended:
                time.sleep(LOOK_S)
    except KeyboardInterrupt:
        why = "no longer watched; the run is not touched"
    finally:
        lasting = [warning.text for warning in run.warnings() if warning.lasting]
        view.close([f"{folder}: {why}", *lasting] if why else [])


def watch_once(folder: str | Path) -> None:
    """Prints one line per rank, as name=value pairs. UserError if `folder` holds no log."""
    run = LiveRun(folder)
    run.look()
    if not run.logs:
        read_events(folder)  # raises
    warnings = run.warnings()
    for rank in run.ranks:
        log = run.logs[rank]
        kinds = [w.kind.replace(" ", "-") for w in warnings if rank in w.ranks]
        state = log.ended.replace(" ", "-") or "running"
        print(
            f"rank={rank} step={log.step} loss={log.loss:.4g} images/s={log.images_per_s:.0f} "
            f"waiting={run.waiting.get(rank, math.nan):.2f} state={state} warnings={','.join(kinds) or '-'}"
        )


def _why_over(run: LiveRun, wait_s: float) -> str:
    """In one sentence why there is nothing left to watch; "" while there is."""
    ranks = len(run.ranks)
    count = f"{ranks} rank{'s' * (ranks != 1)}, {run.step + 1:,} steps"
    # The lines of other machines may come last, or never.
    if run.ended and (not run.missing or run.silent_s > 10 * LOOK_S):
        return f"{run.ended}, {count}"
    if run.silent_s > wait_s * (_WITH_JOB if run.has_job else 1):
        silent_s = f"{wait_s * (_WITH_JOB if run.has_job else 1):g}"
        return f"no line for {silent_s} s, {count}: it failed or was killed, see its output, or it hangs"
    return ""


def table(run: LiveRun, rows: int, bars: str = "") -> list[str]:
    """The run in lines of at most 80 columns, with at most `rows` ranks: those with warnings first.

    bars: characters that draw the losses of the whole run, from low to high.
    """
    name, ranks = run.folder.resolve().name, len(run.ranks)
    if run.step < 0:
        return [f"{name}: waiting for the first step"]
    parts = [f"{name}: {ranks} rank{'s' * (ranks != 1)}", f"step {run.step:,}"]
    epoch = max((run.logs[rank].epoch for rank in run.ranks), default=0)
    parts.append(f"epoch {epoch + 1}{f' of {run.epochs}' if run.epochs else ''}")
    parts.append(f"loss {run.loss:.4f}")
    if not math.isnan(run.test_accuracy):
        parts.append(f"test accuracy {run.test_accuracy:.1%}")
    lines = textwrap.wrap(", ".join(parts), _COLUMNS)
    heading = f"(means of {RECENT} steps)" if not bars else "loss until now"
    lines.append(f"rank      step      loss  images/s  waiting  {heading}")
    warnings = run.warnings()
    named = {rank for warning in warnings for rank in warning.ranks}
    first = sorted(sorted(run.ranks, key=lambda rank: rank not in named)[:rows])
    curves = _draw_curves([run.logs[rank] for rank in first], bars)
    for rank, curve in zip(first, curves, strict=True):
        log, waiting = run.logs[rank], run.waiting.get(rank, math.nan)
        waits = "-" if math.isnan(waiting) else f"{waiting:.0%}"
        mark = " !" if rank in named else ""
        row = (
            f"{rank:4} {log.step:9,} {log.loss:9.4f} {log.images_per_s:9,.0f} {waits:>8}  {curve}{log.ended}"
        )
        lines.append(f"{row}{mark}".rstrip()[:_COLUMNS])
    if hidden := ranks - len(first):
        lines.append(f"     and {hidden} more ranks")
    if run.missing:
        lines.append(f"     {run.missing} more have no log here yet")
    for warning in warnings:
        lines += textwrap.wrap(f"! {warning.text}", _COLUMNS, subsequent_indent="  ")
    return lines


def _draw_curves(logs: list[RankLog], bars: str) -> list[str]:
    """Each rank's losses in the same scale, as characters of `bars`; "" without."""
    if not bars:
        return [""] * len(logs)
    curves = [log.curve(_CURVE) for log in logs]
    seen = [loss for curve in curves for loss in curve if math.isfinite(loss)]
    low, high = min(seen, default=0.0), max(seen, default=0.0)

    def bar(loss: float) -> str:
        if not math.isfinite(loss):
            return "!"
        return bars[int((loss - low) / (high - low) * (len(bars) - 1) + 0.5) if high > low else 0]

    return ["".join(map(bar, curve)).ljust(_CURVE + 2) for curve in curves]


class _View(Protocol):
    """Where a run is shown."""

    def show(self, new: bool) -> None:
        """new: whether the logs have grown since the last call."""

    def close(self, last: list[str]) -> None:
        """last: the lines that stay; the first says how the run ended."""


def kernel() -> Any:
    """The notebook's kernel that this process is; None if it is none."""
    ipython = sys.modules.get("IPython")
    return getattr(ipython.get_ipython(), "kernel", None) if ipython is not None else None


def _make_view(run: LiveRun) -> _View:
    if kernel() is not None:
        return Cell(run)
    if sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
        return _Terminal(run)
    return _Lines(run)


class _Lines:
    """Appends: how far the run is, now and then, and each warning when it is new or holds again."""

    def __init__(self, run: LiveRun) -> None:
        self.run = run
        self._seen_s: dict[tuple[str, tuple[int, ...]], float] = {}  # when each warning last held
        self._next_s = -math.inf
        self._line = ""

    def show(self, new: bool) -> None:
        first = table(self.run, 0)[0]
        if first != self._line and time.monotonic() >= self._next_s:
            self._line, self._next_s = first, time.monotonic() + _LINE_EVERY_S
            print(first, flush=True)
        for warning in self.run.warnings():
            key, now = (warning.kind, warning.ranks), time.monotonic()
            if now - self._seen_s.get(key, -math.inf) > _NEW_S:
                print(f"! {warning.text}", flush=True)
            self._seen_s[key] = now

    def close(self, last: list[str]) -> None:
        print(*last, sep="\n", flush=True)


class _Terminal:
    """Draws on the whole screen; at the end what stood there comes back, and below it the last table."""

    def __init__(self, run: LiveRun) -> None:
        from rich.live import Live

        self.run, self._live = run, Live(screen=True, auto_refresh=False)
        self._live.start()

    def show(self, new: bool) -> None:
        from rich.text import Text

        console = self._live.console
        rows = max(1, console.height - 6 - 2 * len(self.run.warnings()))
        lines = table(self.run, rows, "_.-=^" if console.options.ascii_only else _BARS)
        text = Text("\n".join(lines), no_wrap=True, overflow="crop")
        text.highlight_regex(r"(?m)^! .*| !$", "bold red")
        self._live.update(text, refresh=True)

    def close(self, last: list[str]) -> None:
        self.show(True)
        self._live.stop()
        self._live.console.print(self._live.get_renderable())
        print(*last[:1], flush=True)  # the table has the others


class Cell:
    """A notebook's cell: while the run goes on the table, then a picture, which stays, then the last lines.

    What changes by the moment is in outputs that start and end with the same text, so that nbval compares
    equal things: it reads neither later versions of an output nor pictures.
    """

    def __init__(self, run: LiveRun, drawing: float = DRAWING) -> None:
        from IPython.display import display

        self.run, self.drawing = run, drawing
        self._table: Any = display({"text/plain": ""}, raw=True, display_id=True)
        self._picture: Any = display(self._bundle(None), raw=True, display_id=True)
        self._text = ""
        self._stale, self._next_s = False, -math.inf

    def _bundle(self, png: bytes | None) -> dict[str, str]:
        text = {"text/plain": f"<the run {self.run.folder}>"}
        return text if png is None else {"image/png": base64.b64encode(png).decode(), **text}

    def show(self, new: bool) -> None:
        if (text := "\n".join(table(self.run, _ROWS))) != self._text:
            self._text = text
            self._table.update({"text/plain": text}, raw=True)
        self._stale |= new
        if self._stale and time.monotonic() >= self._next_s and not self.run.ended:
            began_s = time.thread_time()
            self._draw()
            # The first picture also imports what draws, which is not counted.
            spent_s = time.thread_time() - began_s if self._next_s > 0 else 0.0
            self._stale, self._next_s = False, time.monotonic() + spent_s * (1 / self.drawing - 1)

    def _draw(self) -> None:
        from ddp_lib.report.plots import draw_steps

        steps, events, width = self.run.table()
        if not steps.empty:
            title = f"{self.run.folder.resolve().name}: step {self.run.step:,}"
            self._update(draw_steps(steps, events, title, width))

    def _update(self, figure: Any) -> None:
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=72)  # small: below the table of some ranks on one screen
        self._picture.update(self._bundle(file.getvalue()), raw=True)

    def close(self, last: list[str], whole: bool = True) -> None:
        """whole: reads the logs once more, for the picture that `ddp-launch plot` draws."""
        from ddp_lib.report.plots import draw_run

        self._table.update({"text/plain": ""}, raw=True)
        if whole and any(log.step >= 0 for log in self.run.logs.values()):
            self._update(draw_run(self.run.folder))
        elif not whole:
            self._draw()
        if last:
            print(*last, sep="\n", flush=True)
