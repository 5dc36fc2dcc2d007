"""fit's live view in a notebook: in the process that trains, or in the one that has started the ranks."""

import sys
import time
from contextlib import suppress
from pathlib import Path

from ddp_lib.errors import UserError
from ddp_lib.report.live_run import LiveRun
from ddp_lib.report.watch import DRAWING, LOOK_S, Cell, kernel

# Of a rank: the file in which it names the run's folder, for the notebook that has started it to show.
request: Path | None = None


def somebody_looks() -> bool:
    """Whether the output of the cell that runs now goes to a person: one whose page could answer input().

    Programs that run notebooks (nbval, nbconvert, papermill) cannot answer. They keep what is printed.
    """
    call = (kernel() and kernel().get_parent()) or {}
    return bool(call.get("content", {}).get("allow_stdin")) and hasattr(sys.stdout, "pub_thread")


class LiveCell:
    """The run that goes on while a cell runs. Nothing happens between the calls of `tick`, so that whoever
    trains or waits here is never disturbed in the middle of something.

    drawing: the part of the time that drawing may take.
    """

    def __init__(self, drawing: float = DRAWING) -> None:
        self.drawing = drawing
        self._run: LiveRun | None = None
        self._cell: Cell | None = None
        self._next_s = 0.0

    def show(self, folder: Path) -> None:
        """From now on this run."""
        if self._run is None or self._run.folder != folder:
            self.close()
            self._run = LiveRun(folder)

    def tick(self) -> None:
        """Shows what is new, at most twice a second."""
        if self._run is not None and time.monotonic() >= self._next_s:
            self._look(self._run)
            self._next_s = time.monotonic() + LOOK_S

    def _look(self, run: LiveRun) -> None:
        with suppress(UserError):  # of a log that cannot be read: whoever writes it will say so
            new = run.look()
            if self._cell is None and new:
                self._cell = Cell(run, self.drawing)
            if self._cell is not None:
                self._cell.show(new)

    def close(self) -> None:
        """Leaves the last picture, and what a person should look at."""
        if self._run is not None:
            self._look(self._run)
            if self._cell is not None:
                warnings = [f"! {w.text}" for w in self._run.warnings() if w.lasting]
                self._cell.close(warnings, whole=False)
        self._run = self._cell = None


def open_view(folder: Path) -> LiveCell | None:
    """The view of the run in `folder` if a notebook shows it, so that its steps need not be printed.

    In a rank of run_ranks it has no run, since the notebook's process shows it. None if nobody would see it,
    or if the caller has redirected what is printed.
    """
    view = LiveCell(DRAWING / 5)  # here, drawing holds up the training
    if somebody_looks():
        view.show(folder)
    elif request is not None and sys.stdout is sys.__stdout__:
        request.write_text(str(folder.resolve()))
    else:
        return None
    return view
