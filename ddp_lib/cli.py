"""Command lines from dataclasses: their docstrings are the help, and errors are one line."""

import io
import os
import shutil
import sys
from contextlib import redirect_stderr
from itertools import dropwhile, pairwise, takewhile
from operator import not_
from typing import Any

import tyro

from ddp_lib.errors import UserError

_LEAST_COLUMNS = 60


def parse(dataclass: Any, argv: list[str] | None, prog: str) -> Any:
    """An instance of the dataclass `dataclass` (or a tuple of instances) from command-line arguments.

    argv: None means the arguments of this process. A ~ that begins a value is this user's home. Raises
    UserError if a flag or value is wrong, and SystemExit(0) after `--help` has printed the help.
    """
    argv = [_expand_home(word) for word in (sys.argv[1:] if argv is None else argv)]
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff)
    stderr = io.StringIO()
    columns = os.environ.get("COLUMNS")
    try:
        # In a terminal of a few columns, tyro would never end.
        os.environ["COLUMNS"] = str(max(_LEAST_COLUMNS, shutil.get_terminal_size().columns))
        with redirect_stderr(stderr):
            return tyro.cli(dataclass, args=argv, prog=prog, config=config)
    except SystemExit as exit_request:
        if not exit_request.code:
            raise
        raise UserError(f"{_one_line(stderr.getvalue())}; see {prog} --help") from None
    finally:
        del os.environ["COLUMNS"]
        if columns is not None:
            os.environ["COLUMNS"] = columns


def _expand_home(word: str) -> str:
    """The word as a shell would give it: no shell expands --flag=~/x, and a job file has no shell."""
    flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    path = os.path.expanduser(value)
    if path.startswith("~"):
        raise UserError(f"{word}: {path.partition('/')[0]} is no home directory here: write the path in full")
    return flag + equals + path


def _one_line(box: str) -> str:
    """What is wrong, and the flag that was probably meant, from the box of lines that tyro prints."""
    # Where the locale has no UTF-8, the box is of spaces and hyphens.
    rows = [row.strip("│╭╮╰╯─ \n") for row in box.splitlines()[1:]]
    rows = [row if row.strip("-") else "" for row in rows]
    text = " ".join(takewhile(bool, dropwhile(not_, rows))).rstrip(".")
    for row, below in pairwise(rows):
        if row.startswith("Perhaps you meant"):
            return f"{text} (did you mean {below.split()[0]}?)"
    return text
