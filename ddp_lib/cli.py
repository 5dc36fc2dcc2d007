"""Command lines from dataclasses: their docstrings are the help, and errors are one line."""

import io
import os
import sys
from contextlib import redirect_stderr
from itertools import pairwise, takewhile
from typing import Any

import tyro

from ddp_lib.errors import UserError


def parse(dataclass: Any, argv: list[str] | None, prog: str) -> Any:
    """An instance of the dataclass `dataclass` (or a tuple of instances) from command-line arguments.

    argv: None means the arguments of this process. A ~ that begins a value is this user's home. Raises
    UserError if a flag or value is wrong, and SystemExit(0) after `--help` has printed the help.
    """
    argv = [_expand_home(word) for word in (sys.argv[1:] if argv is None else argv)]
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff)
    stderr = io.StringIO()
    try:
        with redirect_stderr(stderr):
            return tyro.cli(dataclass, args=argv, prog=prog, config=config)
    except SystemExit as exit_request:
        if not exit_request.code:
            raise
        raise UserError(f"{_one_line(stderr.getvalue())}; see {prog} --help") from None


def _expand_home(word: str) -> str:
    """The word as a shell would give it: no shell expands --flag=~/x, and a job file has no shell."""
    flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    path = os.path.expanduser(value)
    if path.startswith("~"):
        raise UserError(f"{word}: {path.partition('/')[0]} is no home directory here: write the path in full")
    return flag + equals + path


def _one_line(box: str) -> str:
    """What is wrong, and the flag that was probably meant, from the box of lines that tyro prints."""
    rows = [row.strip("│╭╮╰╯─ \n") for row in box.splitlines()[1:]]
    text = " ".join(takewhile(bool, rows)).rstrip(".")
    for row, below in pairwise(rows):
        if row.startswith("Perhaps you meant"):
            return f"{text} (did you mean {below.split()[0]}?)"
    return text
