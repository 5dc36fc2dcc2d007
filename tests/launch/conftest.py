"""ddp-launch around a program of some lines, instead of the training."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.lab.agent import Start
from tests.lab.processes import start_piped

# The agent as `ddp-launch train` starts it, around another program than the training.
AGENT = """
import sys
from ddp_lib.launch import main as launch
from ddp_lib.processes.exit_status import as_exit_status
options = launch.parse(launch.LaunchOptions, sys.argv[2:], "ddp-launch train")
# torch is all that the workers below need: half of what a training loads.
ranks = launch.ForkedRanks("tests.lab.rank_script:run", (sys.argv[1],), ["torch"])
with as_exit_status() as outcome:
    outcome.status = launch.start_agent(launch.read_launch(options), 20.0, ranks)
sys.exit(outcome.status)
"""

# What every worker below starts with: `note` leaves a file, `wait_for` waits for another's.
WORKER = """
import json, os, signal, sys, time
from pathlib import Path
from ddp_lib.errors import UserError
from ddp_lib.processes.exit_status import as_exit_status
from ddp_lib.processes.signals import StopSignal
here, rank = Path(__file__).parent, int(os.environ["RANK"])
def note(name, text=""):
    (here / "new").mkdir(exist_ok=True)
    path = here / "new" / f"{name}{rank}"
    path.write_text(text)
    path.replace(here / f"{name}{rank}")
def wait_for(name):
    while not (here / name).exists():
        time.sleep(0.02)
def for_ever():
    while True:
        time.sleep(0.05)
"""


@pytest.fixture
def start(tmp_path: Path, started: list[subprocess.Popen[str]]) -> Start:
    """Starts ddp-launch around a worker of these lines."""

    def run(lines: str, *flags: str) -> "subprocess.Popen[str]":
        script = tmp_path / "worker.py"
        script.write_text(WORKER + lines)
        process = start_piped([sys.executable, "-c", AGENT, str(script), *flags], tmp_path)
        started.append(process)
        return process

    return run
