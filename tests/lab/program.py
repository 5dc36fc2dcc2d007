"""A command that runs on a machine of a lab."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from tests.lab.namespaces import TIMEOUT_S
from tests.lab.project import ROOT

if TYPE_CHECKING:
    from tests.lab.machines import Machine


class Program:
    """A command on a machine; its output, both streams, goes to the file `log`."""

    def __init__(
        self,
        machine: "Machine",
        command: list[str],
        cwd: Path,
        environment: dict[str, str],
        number: int,
    ) -> None:
        self.command, self.log = command, machine.folder / f"program{number}.log"
        beside = Path(sys.executable).parent
        head = {"python": [sys.executable, "-u"], "torchrun": [str(beside / "torchrun")]}
        head["ddp-launch"] = [sys.executable, "-u", "-m", "ddp_lib.launch"]
        full = [*head.get(command[0], command[:1]), *command[1:]]
        inside = f"nsenter --target {machine.namespaces.pid} --net --uts --mount --pid -- env -C"
        with open(self.log, "wb") as log:
            self._process = subprocess.Popen(
                [*inside.split(), str(cwd), *full],
                env={**plain_environment(), **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a machine is nobody's job at a terminal
            )

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait_for(self, pattern: str, timeout_s: float) -> str:
        """The first line of the output in which the regular expression is found, once it is there.

        AssertionError with the output if it does not come in time, or if the program has ended.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            ended = self._process.poll() is not None  # before reading: nothing comes after the end
            for line in self.output.splitlines():
                if re.search(pattern, line):
                    return line
            assert not ended, f"ended without {pattern!r}:\n{self.output}"
            assert time.monotonic() < deadline, f"no {pattern!r} in {timeout_s} s:\n{self.output}"
            time.sleep(0.02)

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def wait(self, timeout_s: float) -> int:
        """Exit status, -n after signal n. AssertionError, with the output, after `timeout_s`."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still runs after {timeout_s} s:\n{self.output}") from None

    def processes(self) -> list[psutil.Process]:
        """The command's own process, then all that it started, and they."""
        deadline = time.monotonic() + TIMEOUT_S
        while not self.ended:  # nsenter, outside, starts the command inside
            family = psutil.Process(self._process.pid).children(recursive=True)
            if family:
                return family
            assert time.monotonic() < deadline
            time.sleep(0.005)
        return []

    def resume(self) -> None:
        """nsenter, outside, stops with the command inside."""
        self._process.send_signal(signal.SIGCONT)

    def signal(self, number: signal.Signals) -> None:
        """Sends the signal to the command's own process, and to no child."""
        for process in self.processes()[:1]:
            process.send_signal(number)

    def end(self) -> None:
        """SIGKILL to the command and all that it started."""
        kill_all(self.processes())
        self.wait(TIMEOUT_S)


def kill_all(processes: list[psutil.Process]) -> None:
    """SIGKILL; returns when all are gone."""
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    _, alive = psutil.wait_procs(processes, timeout=TIMEOUT_S)
    assert not alive, alive


def plain_environment() -> dict[str, str]:
    """This process's, without what would say which rank it is or choose an interface."""
    ours = re.compile(
        "(RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|GROUP_RANK|MASTER_.*|OMP_NUM_THREADS|LOGLEVEL"
        "|(SLURM|PET|TORCH|TORCHELASTIC|GLOO|NCCL|DDP_LIB|PMI|OMPI)_.*)"
    )
    kept = {name: value for name, value in os.environ.items() if not ours.fullmatch(name)}
    # Programs import the package of this tree, wherever they run.
    return {**kept, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
