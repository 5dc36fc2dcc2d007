"""The ranks that an agent of a test has started."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.lab.processes import wait_until

Start = Callable[..., "subprocess.Popen[str]"]


def ranks(folder: Path, count: int = 2) -> list[psutil.Process]:
    """The ranks, once each has noted its process number."""
    wait_until(lambda: all((folder / f"pid{rank}").exists() for rank in range(count)))
    return [psutil.Process(int((folder / f"pid{rank}").read_text())) for rank in range(count)]


FAILS = "with as_exit_status() as outcome:\n    {}\nsys.exit(outcome.status)"
