"""Command lines from dataclasses: help from their docstrings, errors in one line."""

import io
import sys
from contextlib import redirect_stderr
from typing import Any

import tyro

from ddp_lib.errors import UserError


def parse(what: Any, argv: list[str] | None, prog: str) -> Any:
    """An instance of the dataclass `what` (or a tuple of instances) from command-line arguments.

    argv None: those of this process. UserError in one line for a wrong flag or value; `--help`
    prints and raises SystemExit(0).
    """
    screen = io.StringIO()
    try:
        with redirect_stderr(screen):
            return tyro.cli(
                what,
                args=sys.argv[1:] if argv is None else argv,
                prog=prog,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff),
            )
    except SystemExit as leaving:
        if not leaving.code:
            raise
        raise UserError(f"{_one_line(screen.getvalue())}; see {prog} --help") from None


def _one_line(box: str) -> str:
    """What is wrong, and the flag that was perhaps meant, from tyro's box of several lines."""
    rows = [row.strip("│╭╮╰╯─ \n") for row in box.splitlines()[1:]]
    wrong: list[str] = []
    for row in rows:
        if not row:
            break
        wrong.append(row)
    text = " ".join(wrong).rstrip(".")
    meant = next((i for i, row in enumerate(rows) if row.startswith("Perhaps you meant")), None)
    if meant is not None and meant + 1 < len(rows):
        text += f" (did you mean {rows[meant + 1].split()[0]}?)"
    return text
