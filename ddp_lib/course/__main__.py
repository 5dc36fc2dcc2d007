"""python -m ddp_lib.course copy | class | site | buttons | grade: what `make` does with the notebooks."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ddp_lib.cli import parse
from ddp_lib.course.buttons import write_buttons
from ddp_lib.course.classroom import write_class
from ddp_lib.course.copy import copy_course
from ddp_lib.course.grade import grade, table
from ddp_lib.course.site import write_site
from ddp_lib.errors import UserError, require_seconds


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


@dataclass(frozen=True)
class Class:
    """Writes the course for a class: student/ without solutions, teacher/ with them and a plan, slides/."""

    out: Annotated[Path, tyro.conf.Positional]
    """folder to write"""
    course: Path = Path("notebooks")
    """folder of the course's notebooks"""
    plan: Path = Path("docs/teaching.md")
    """the teacher's plan"""


@dataclass(frozen=True)
class Site:
    """Writes the course as a web site."""

    out: Annotated[Path, tyro.conf.Positional]
    """folder to write"""
    course: Path = Path("notebooks")
    """folder of the course's notebooks"""


@dataclass(frozen=True)
class Buttons:
    """Writes buttons that open the course elsewhere into README.md and the notebooks.

    From the address `Repository` of [project.urls] in pyproject.toml; without it they are removed.
    """

    project: Path = Path(".")
    """folder of the project"""


@dataclass(frozen=True)
class Grade:
    """Says which exercises are right in the notebooks of a class.

    Runs each answer that was changed, in a kernel with a time limit, an empty home and no secrets in its
    environment. It is no sandbox.
    """

    folder: Annotated[Path, tyro.conf.Positional]
    """holds a folder with notebooks per reader, or notebooks"""
    course: Path = Path("notebooks")
    """folder of the course's notebooks"""
    timeout_s: float = 120.0
    """time for an answer"""


def main() -> int:
    command, *args = sys.argv[1:] or [""]
    try:
        if command == "copy":
            copy = parse(Copy, args, "python -m ddp_lib.course copy")
            lines = copy_course(copy.course, copy.work, copy.fresh)
        elif command == "class":
            new = parse(Class, args, "python -m ddp_lib.course class")
            lines = write_class(new.course, new.plan, new.out)
        elif command == "site":
            site = parse(Site, args, "python -m ddp_lib.course site")
            lines = write_site(site.course, site.out)
        elif command == "buttons":
            lines = write_buttons(parse(Buttons, args, "python -m ddp_lib.course buttons").project)
        elif command == "grade":
            grades = parse(Grade, args, "python -m ddp_lib.course grade")
            require_seconds("--timeout-s", grades.timeout_s)
            lines = table(grade(grades.course, grades.folder, grades.timeout_s))
        else:
            raise UserError(f"{command!r} is no command: use copy, class, site, buttons or grade")
        print("\n".join(lines))
    except UserError as error:
        print(f"ddp_lib.course: error: {error}", file=sys.stderr)
        return error.status
    return 0


if __name__ == "__main__":
    sys.exit(main())
