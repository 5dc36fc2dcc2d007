"""Command lines from dataclasses: their docstrings are the help, and errors are one line."""

import io
import sys
from contextlib import redirect_stderr
from typing import Any

import tyro

from ddp_lib.errors import UserError


def parse(dataclass: Any, argv: list[str] | None, prog: str) -> Any:
    """An instance of the dataclass `dataclass` (or a tuple of instances) from command-line arguments.

    argv: None means the arguments of this process. Raises UserError if a flag or value is wrong, and
    SystemExit(0) after `--help` has printed the help.
    """
    stderr = io.StringIO()
    try:
        with redirect_stderr(stderr):
            return tyro.cli(
                dataclass,
                args=sys.argv[1:] if argv is None else argv,
                prog=prog,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff),
            )
    except SystemExit as exit_request:
        if not exit_request.code:
            raise
        raise UserError(f"{_one_line(stderr.getvalue())}; see {prog} --help") from None


def _one_line(box: str) -> str:
    """What is wrong, and the flag that was probably meant, from the box of lines that tyro prints."""
    rows = [row.strip("│╭╮╰╯─ \n") for row in box.splitlines()[1:]]
    message: list[str] = []
    for row in rows:
        if not row:
            break
        message.append(row)
    text = " ".join(message).rstrip(".")
    hint = next((i for i, row in enumerate(rows) if row.startswith("Perhaps you meant")), None)
    if hint is not None and hint + 1 < len(rows):
        text += f" (did you mean {rows[hint + 1].split()[0]}?)"
    return text
