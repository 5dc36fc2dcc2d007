"""What `make lab` uses: `python -m ddp_lib.course copy`."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ddp_lib.cli import parse
from ddp_lib.course.copy import copy_course
from ddp_lib.errors import UserError


@dataclass(frozen=True)
class Copy:
    """Copies the course's notebooks to a folder of the reader's own.

    What is in the folder already stays as it is; a notebook that is missing there is copied.
    """

    course: Annotated[Path, tyro.conf.Positional]
    """folder of the course's notebooks"""
    work: Annotated[Path, tyro.conf.Positional]
    """the reader's folder"""
    fresh: bool = False
    """moves the reader's folder aside first, to work-1 or the next that is free"""


def main() -> int:
    command, *args = sys.argv[1:] or [""]
    try:
        if command != "copy":
            raise UserError(f"{command!r} is no command: use copy")
        options = parse(Copy, args, "python -m ddp_lib.course copy")
        print(*copy_course(options.course, options.work, options.fresh), sep="\n")
    except UserError as error:
        print(f"ddp_lib.course: error: {error}", file=sys.stderr)
        return error.status
    return 0


if __name__ == "__main__":
    sys.exit(main())
