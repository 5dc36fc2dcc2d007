"""Input of all kinds, drawn at random: variables, flags, folders of images, models, folders of runs.

Each kind is a function (random, folder) that draws a case, tries it in `folder`, which is empty, and judges
the answer.
"""

import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import FrameType

from tests.lab.fuzz.commands import try_command, try_rank
from tests.lab.fuzz.images import try_images
from tests.lab.fuzz.runs import try_model, try_run_folder, try_start

CASE_S = 60  # no case may take longer
KINDS: dict[str, Callable[[Random, Path], None]] = {
    "command": try_command,
    "rank": try_rank,
    "images": try_images,
    "model": try_model,
    "run folder": try_run_folder,
    "start": try_start,
}


def try_case(kind: str, seed: int, number: int, folder: Path) -> None:
    """AssertionError, with what names the case, if its answer is no result and no line, or does not come."""

    def late(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"no answer within {CASE_S} s")

    old = signal.signal(signal.SIGALRM, late)
    signal.alarm(CASE_S)
    try:
        KINDS[kind](Random(f"{seed} {kind} {number}"), folder)
    except BaseException as error:
        error.add_note(f"the case: kind {kind!r}, seed {seed}, number {number}")
        raise
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
