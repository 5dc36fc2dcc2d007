"""What the course's notebooks have in common: a folder to work in, and exercises that check themselves."""

import functools
import os
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path
from traceback import extract_tb
from typing import Any

from ddp_lib.errors import text_of
from ddp_lib.notebook.errors import RankError, readable
from ddp_lib.processes.stacks import own_lines
from ddp_lib.processes.temporary import remove_with_this_process, temporary_folder

NOTEBOOKS = Path.cwd()  # where the kernel was when it imported this, before `work_folder`

_right: dict[int, bool] = {}  # by number, of the exercises that were checked


def work_folder() -> Path:
    """Enters a folder that goes with this kernel; it is the same one at each call. The kernel's temporary
    files, and those of its ranks and commands, go there too."""
    folder = temporary_folder()
    remove_with_this_process(folder)
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    work = folder / "work"
    work.mkdir(exist_ok=True)
    os.chdir(work)
    return work


def exercise(check: Callable[[Any], bool | str]) -> Callable[[Any], None]:
    """Decorates check_N, which returns whether an answer is right, or a hint if it is not.

    check_N(answer) then prints "N: right", or "N: not yet: " and the hint. If the answer raises an exception,
    here or on a rank, the hint is the exception and the answer's line.
    """
    number = int(check.__name__.removeprefix("check_"))

    @functools.wraps(check)
    def print_result(answer: Any) -> None:
        try:
            result = check(answer)
        except Exception as error:
            result = _in_one_line(error, getattr(answer, "__name__", ""))
        hint = f": {result}" if isinstance(result, str) else ""
        _right[number] = bool(result) and not hint
        print(f"{number}:", "right" if _right[number] else f"not yet{hint}")

    return print_result


def _in_one_line(error: Exception, function: str) -> str:
    """The exception, and the line of `function` that it came through, or else another one of the reader's own
    code. Of ranks that hang: their stacks, in several lines."""
    if isinstance(error, RankError):
        text, lines = error.text, error.lines
    else:
        text = f"{type(error).__name__}: {text_of(error)}".rstrip(": ")
        lines = own_lines(extract_tb(error.__traceback__))
    if not lines:
        return text
    where = [line for line in lines if f" in {function}:" in line] or lines
    return f"{textwrap.shorten(readable(text), 300, placeholder=' ...')}, {where[-1]}"


def right_so_far(of: int) -> None:
    """Prints how many of the notebook's exercises, `of` in all, were right when last checked."""
    print(sum(_right.values()), "of", of, "right")
