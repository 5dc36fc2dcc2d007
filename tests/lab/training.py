"""A training on several machines that waits at a gate, and what a fault at the gate costs by the logs."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ddp_lib import read_run
from ddp_lib.run_dir.log import read_events
from tests.lab.images import write_images
from tests.lab.machines import Lab, Machine
from tests.lab.program import Program
from tests.lab.project import ROOT

TIMEOUT_S = 600  # for what takes some ten seconds on an idle computer

TRAIN, TEST, GLOBAL_BATCH = 315, 63, 52

EPOCHS, STEPS_PER_EPOCH, GATE = 4, TRAIN // GLOBAL_BATCH, 14  # two steps into the third epoch

STEPS = EPOCHS * STEPS_PER_EPOCH


@dataclass(frozen=True)
class Outcome:
    """course: what happened, in words. seconds: from the fault until a step was done again, or all
    had ended. bits: whether the final parameters are the unbroken run's; None: other world size."""

    course: str
    seconds: float
    steps_redone: int
    samples_lost: int
    samples_repeated: int
    bits: bool | None


def make_images(folder: Path) -> Path:
    """The training's data set."""
    return write_images(folder, TRAIN, TEST)


class Training:
    """One training by ddp-launch on machines that share no disk, one rank on each."""

    def __init__(
        self,
        lab: Lab,
        images: Path,
        *flags: str,
        nnodes: str = "2",
        nproc: int = 1,
        gate: int = GATE,
        variables: bool = False,
    ):
        """variables: started by RANK, WORLD_SIZE and MASTER_*, and not by the launcher's flags."""
        self.lab, self.nnodes, self.variables = lab, nnodes, variables
        self.master = lab.machines[0]
        self.gate = lab.folder / "gate"
        self.gate.mkdir(exist_ok=True)
        self.environment = {"GATE": str(self.gate), "GATE_STEP_2": str(gate), "GATE_STEP_1": "2"}
        self.environment["OMP_NUM_THREADS"] = "1"  # the machines share this computer's cores
        self.flags = [
            *flags, *([] if variables else ["--nproc-per-node", str(nproc)]), "--data", str(images),
            "--data-dir", str(images.parent / "decoded"), "--model", "tests.lab.models:Gated",
            "--epochs", str(EPOCHS), "--global-batch-size", str(GLOBAL_BATCH), "--lr", "0.05",
            "--precision", "fp32", "--checkpoint-every-s", "1000",
        ]  # fmt: skip
        self.programs: list[Program] = []
        self.fault_s = 0.0

    def disk(self, machine: Machine) -> Path:
        """The run's folder on this machine's own disk."""
        return self.lab.folder / f"disk{machine.number}" / "run"

    def start(self, *machines: Machine) -> list[Program]:
        """The same line on each; returns what was started now."""
        started = []
        for machine in machines:
            environment = self.environment
            if self.variables:
                four = {"RANK": str(int(machine is not self.master)), "WORLD_SIZE": self.nnodes}
                four |= {"MASTER_ADDR": self.master.address, "MASTER_PORT": "29500"}
                environment = {**environment, **four}
            started.append(machine.start(self.command(machine), cwd=ROOT, **environment))
        self.programs += started
        return started

    def command(self, machine: Machine) -> list[str]:
        words = ["--nnodes", self.nnodes, "--rdzv-endpoint", f"{self.master.address}:29500"]
        here = ["--run-dir", str(self.disk(machine))]
        return ["ddp-launch", "train", *([] if self.variables else words), *here, *self.flags]

    def until_gate(self, size: int = 2) -> None:
        """Returns when all ranks of a world of `size` wait in the same step."""
        wait_until(
            lambda: len([*self.gate.glob(f"reached{size}.*")]) == size,
            lambda: "\n".join(program.output for program in self.programs),
        )
        self.fault_s = time.time()

    def open(self, size: int = 2) -> None:
        (self.gate / f"open{size}").touch()

    def end(self, status: int = 0, programs: list[Program] | None = None) -> None:
        """Waits for the end of all that was started; each must end with this exit status."""
        for program in programs or self.programs:
            assert program.wait(TIMEOUT_S) == status, program.output

    def fail(self, *programs: Program) -> float:
        """Waits for the end of programs that must fail, each with one line; the seconds that took."""
        for program in programs:
            assert program.wait(TIMEOUT_S) > 0, program.output
        seconds = time.time() - self.fault_s
        for program in programs:
            errors = [line for line in program.output.splitlines() if "error:" in line]
            assert len(errors) == 1 and "Traceback" not in program.output, program.output
            assert errors == [program.output.splitlines()[-1]], program.output
        return seconds

    def weights(self) -> bytes:
        return (self.disk(self.master) / "cifar_net.pth").read_bytes()

    def outcome(self, course: str, unbroken: bytes | None, seconds: float | None = None) -> Outcome:
        """By the logs on the master, which holds those of all ranks."""
        folder = self.disk(self.master)
        log = read_run(folder, superseded=True)
        if seconds is None:
            after = log[log["time"] > self.fault_s]
            seconds = after["time"].min() - self.fault_s
        kept = log[~log["superseded"]]
        seen = kept.groupby("step")["samples"].sum().reindex(range(STEPS), fill_value=0)
        ends = read_events(folder).query("event == 'end' and why == 'finished'")
        assert sorted(ends["rank"]) == [0, 1], "the master lacks a log's end"
        return Outcome(
            course,
            round(float(seconds), 1),
            int(log[log["superseded"]]["step"].nunique()),
            int((GLOBAL_BATCH - seen).clip(lower=0).sum()),
            int((seen - GLOBAL_BATCH).clip(lower=0).sum()),
            None if unbroken is None else self.weights() == unbroken,
        )


def wait_until(done: Callable[[], bool], state: Callable[[], str]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not done():
        assert time.monotonic() < deadline, state()
        time.sleep(0.02)


@cache
def unbroken(images: Path, folder: Path) -> bytes:
    """The weights that the training ends with when nothing goes wrong."""
    with Lab(2, folder) as lab:
        training = Training(lab, images, gate=STEPS)
        training.start(*lab.machines)
        training.end()
        outcome = training.outcome("", None)
        assert (outcome.steps_redone, outcome.samples_lost, outcome.samples_repeated) == (0, 0, 0)
        return training.weights()
