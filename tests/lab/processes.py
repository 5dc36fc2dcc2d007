"""Processes that tests start on this machine: `ddp-launch`, and small programs."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.lab.project import ROOT

HOST = socket.gethostname()

TRAIN = (sys.executable, "-m", "ddp_lib.launch", "train")

TIMEOUT_S = 60  # for what takes seconds on an idle machine; torch's agent alone imports for two


def clean_environment() -> dict[str, str]:
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "LOGLEVEL")
    kept = {k: v for k, v in os.environ.items() if k not in names and not k.startswith("SLURM")}
    return {**kept, "PYTHONPATH": str(ROOT)}


def start_piped(command: list[str], cwd: Path) -> "subprocess.Popen[str]":
    """Starts a command in a clean environment; its two streams are read by `end`."""
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=clean_environment(),
    )


def end(process: "subprocess.Popen[str]") -> tuple[int, str, list[str]]:
    """Exit status, stdout, lines of stderr; the agent has ended by itself."""
    out, err = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, out, err.splitlines()


def first_line(process: "subprocess.Popen[str]") -> str:
    """What it prints first; a process that prints nothing is ended at the limit."""
    limit = threading.Timer(TIMEOUT_S, process.kill)
    limit.start()
    try:
        return process.stdout.readline().strip()
    finally:
        limit.cancel()


def wait_until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def all_gone(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=TIMEOUT_S / 4)
    return not alive


def python(code: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-u", "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=clean_environment(),
    )
