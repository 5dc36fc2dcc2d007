"""No test of this room leaves a rank behind."""

import os

import psutil
import pytest


def ranks_left() -> list[psutil.Process]:
    """Processes below this one, except the fork server and Python's resource tracker."""
    return [
        p
        for p in psutil.Process().children(recursive=True)
        if p.ppid() != os.getpid() or "forkserver" not in " ".join(p.cmdline())
        if "resource_tracker" not in " ".join(p.cmdline())
    ]


@pytest.fixture(autouse=True)
def nothing_left():
    yield
    assert ranks_left() == []
