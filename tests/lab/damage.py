"""What goes wrong on several machines, made on purpose.

Every fault is a function in the table FAULTS: it makes its training on machines of the lab, lets it
run to the gate in the middle of an epoch (see `training.Training` and `models.Gated`), does the
damage, and returns an Outcome once the training is through. It asserts what must hold on the way.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from ddp_lib.run_dir.log import read_events
from tests.lab.machines import Lab, Machine
from tests.lab.training import TIMEOUT_S, Outcome, Training

# The collectives' timeout if the fault is to last longer: enough for a step on a busy computer.
SHORT_S = 8


def rank_on(machine: Machine) -> psutil.Process:
    """The rank's process on this machine."""
    (rank,) = [p for p in machine.processes() if p.name().startswith("ddp-rank")]
    return rank


# Each takes the lab, the images and the unbroken run's weights.
FAULTS: dict[str, Callable[[Lab, Path, bytes], Outcome]] = {}


def fault(
    name: str,
) -> Callable[[Callable[[Lab, Path, bytes], Outcome]], Callable[[Lab, Path, bytes], Outcome]]:
    def add(function: Callable[[Lab, Path, bytes], Outcome]) -> Callable[..., Outcome]:
        FAULTS[name] = function
        return function

    return add


@fault("a rank killed (SIGKILL), `--max-restarts 1`")
def rank_killed(lab: Lab, images: Path, whole: bytes) -> Outcome:
    training = Training(lab, images, "--max-restarts", "1")
    training.start(*lab.machines[:2])
    training.until_gate()
    rank_on(lab.machines[1]).kill()
    training.open()
    training.end()
    return training.outcome("the ranks start again, and go on", whole)


@fault("a machine dies and returns, `--nnodes 1:2 --max-restarts 3`")
def machine_returns(lab: Lab, images: Path, whole: bytes) -> Outcome:
    m0, m1 = lab.machines[:2]
    training = Training(lab, images, "--max-restarts", "3", nnodes="1:2")
    (first, _) = training.start(m0, m1)
    training.until_gate()
    began_s = training.fault_s
    m1.end_all()
    training.open()
    training.until_gate(size=1)
    (back,) = training.start(m1)
    training.end(0, [first, back])
    training.fault_s = began_s
    worlds = read_events(training.disk(m0)).query("event == 'start' and rank == 0")
    assert list(worlds["world_size"]) == [2, 1, 2]
    return training.outcome("the other goes on alone, then with it again", None)


@fault("the master dies")
def master_dies(lab: Lab, images: Path, whole: bytes) -> Outcome:
    m0, m1 = lab.machines[:2]
    training = Training(lab, images)
    (_, other) = training.start(m0, m1)
    training.until_gate()
    m0.end_all()
    training.open()
    seconds = training.fail(other)
    training.end(0, training.start(m0, m1))
    return training.outcome("ends everywhere; started again, it resumes", whole, seconds)


@fault("the master dies for good; rank 0 moves to another machine")
def master_is_replaced(lab: Lab, images: Path, whole: bytes) -> Outcome:
    m0, m1, m2 = lab.machines
    training = Training(lab, images)
    (_, other) = training.start(m0, m1)
    training.until_gate()
    m0.end_all()
    training.open()
    seconds = training.fail(other)
    training.master = m1
    training.end(0, training.start(m1, m2))
    # What rank 0 did before lies on the dead machine's disk: to be counted, it is put in front.
    log, old = (training.disk(machine) / "rank0.jsonl" for machine in (m1, m0))
    log.write_bytes(old.read_bytes() + log.read_bytes())
    return training.outcome("ends; started on a third machine, it resumes", whole, seconds)


@fault("link down for 3 s, less than `--timeout-s`")
def link_down_shortly(lab: Lab, images: Path, whole: bytes) -> Outcome:
    training = Training(lab, images)
    training.start(*lab.machines[:2])
    training.until_gate()
    lab.machines[1].cut()
    training.open()
    time.sleep(3)  # the fault itself
    lab.machines[1].plug()
    training.end()
    return training.outcome("waits, and goes on", whole)


@fault(f"link down for longer than `--timeout-s {SHORT_S}`, `--max-restarts 1`")
def link_down_long(lab: Lab, images: Path, whole: bytes) -> Outcome:
    training = Training(lab, images, "--timeout-s", str(SHORT_S), "--max-restarts", "1")
    (master, _) = training.start(*lab.machines[:2])
    training.until_gate()
    lab.machines[1].cut()
    training.open()
    # The other machine's launcher asks the store at the master, and waits for the link to return.
    master.wait_for("starting the ranks again", TIMEOUT_S)
    lab.machines[1].plug()
    training.end()
    return training.outcome("times out, meets again, and goes on", whole)


@fault("a slow link, 4 Mbit/s")
def slow_link(lab: Lab, images: Path, whole: bytes) -> Outcome:
    training = Training(lab, images)
    training.start(*lab.machines[:2])
    training.until_gate()
    lab.machines[1].limit_rate("4mbit")
    training.open()
    training.end()
    return training.outcome("goes on, slower", whole)


@fault("a rank frozen (SIGSTOP) for 3 s")
def frozen_shortly(lab: Lab, images: Path, whole: bytes) -> Outcome:
    training = Training(lab, images)
    training.start(*lab.machines[:2])
    training.until_gate()
    rank = rank_on(lab.machines[1])
    rank.suspend()
    training.open()
    time.sleep(3)  # the fault itself
    rank.resume()
    training.end()
    return training.outcome("waits, and goes on", whole)


@fault(f"a rank frozen for good, `--timeout-s {SHORT_S}`, `--max-restarts 1`")
def frozen_for_good(lab: Lab, images: Path, whole: bytes) -> Outcome:
    training = Training(lab, images, "--timeout-s", str(SHORT_S), "--max-restarts", "1")
    training.start(*lab.machines[:2])
    training.until_gate()
    rank = rank_on(lab.machines[1])
    rank.suspend()
    training.open()
    training.end()
    assert not rank.is_running()
    return training.outcome("times out; it is ended, all start again", whole)


@fault(f"a rank frozen for good, `--timeout-s {SHORT_S}`, no restarts")
def frozen_without_restarts(lab: Lab, images: Path, whole: bytes) -> Outcome:
    training = Training(lab, images, "--timeout-s", str(SHORT_S))
    programs = training.start(*lab.machines[:2])
    training.until_gate()
    rank_on(lab.machines[0]).suspend()
    training.open()
    seconds = training.fail(*programs)
    assert lab.machines[0].left() == lab.machines[1].left() == []
    training.end(0, training.start(*lab.machines[:2]))
    return training.outcome("ends everywhere; started again, it resumes", whole, seconds)


@fault("disk full on a machine that is not the master")
def disk_full(lab: Lab, images: Path, whole: bytes) -> Outcome:
    return fill_disk(Training(lab, images), lab.machines[:2], whole)


@fault("disk full on a machine with two ranks")
def disk_full_with_two_ranks(lab: Lab, images: Path, whole: bytes) -> Outcome:
    return fill_disk(Training(lab, images, nnodes="1", nproc=2), lab.machines[:1], whole)


def fill_disk(training: Training, machines: list[Machine], whole: bytes) -> Outcome:
    """The disk of the last machine."""
    machine, disk = machines[-1], training.disk(machines[-1])
    disk.mkdir(parents=True)
    machine.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)])
    programs = training.start(*machines)
    training.until_gate()
    # Room for some lines of the log, and not for a checkpoint.
    fill = f"dd if=/dev/zero of={disk}/filler bs=64k; truncate -s -64k {disk}/filler; ls {disk}"
    listed = machine.run(["sh", "-c", fill])
    assert "checkpoint.pt" in listed
    training.open()
    seconds = training.fail(*programs)
    assert all("No space left on device" in program.output for program in programs)
    machine.run(["rm", f"{disk}/filler"])
    training.end(0, training.start(*machines))
    # Only this machine sees the small disk: what it holds goes to the one below it.
    machine.run(["sh", "-c", f"cp -r {disk} {disk}.copy; umount {disk}; cp {disk}.copy/* {disk}"])
    return training.outcome("ends everywhere; started again, it resumes", whole, seconds)


@fault("the master's disk becomes read-only")
def read_only(lab: Lab, images: Path, whole: bytes) -> Outcome:
    m0, m1 = lab.machines[:2]
    training = Training(lab, images)
    disk = str(training.disk(m0))
    programs = training.start(m0, m1)
    training.until_gate()
    m0.run(["mount", "--bind", disk, disk])
    m0.run(["mount", "-o", "remount,bind,ro", disk])
    training.open()
    seconds = training.fail(*programs)
    assert all("Read-only file system" in program.output for program in programs)
    m0.run(["umount", disk])
    training.end(0, training.start(m0, m1))
    return training.outcome("ends everywhere; started again, it resumes", whole, seconds)


def power_cut(lab: Lab, images: Path) -> Training:
    """Both machines die at the gate."""
    training = Training(lab, images)
    training.start(*lab.machines[:2])
    training.until_gate()
    for machine in lab.machines[:2]:
        machine.end_all()
    training.open()
    return training


@fault("all machines die; the master's checkpoint is truncated")
def truncated(lab: Lab, images: Path, whole: bytes) -> Outcome:
    training = power_cut(lab, images)
    path = training.disk(training.master) / "checkpoint.pt"
    os.truncate(path, path.stat().st_size // 2)
    (first, _) = again = training.start(*lab.machines[:2])
    training.end(0, again)
    assert "checkpoint.pt is damaged" in first.output
    return training.outcome("started again, it takes the other machine's copy", whole)


@fault("all machines die; a bit of the master's checkpoint is flipped")
def bit_flipped(lab: Lab, images: Path, whole: bytes) -> Outcome:
    training = power_cut(lab, images)
    path = training.disk(training.master) / "checkpoint.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    (first, _) = again = training.start(*lab.machines[:2])
    training.end(0, again)
    assert "checkpoint.pt is damaged" in first.output
    return training.outcome("started again, it takes the other machine's copy", whole)


@fault("a second job takes one of the machines' folders")
def second_job(lab: Lab, images: Path, whole: bytes) -> Outcome:
    m0, m1, m2 = lab.machines
    training = Training(lab, images)
    training.start(m0, m1)
    training.until_gate()
    second = Training.__new__(Training)
    second.__dict__.update(training.__dict__, master=m2, programs=[])
    seconds = second.fail(*second.start(m2, m1))
    refused = f"{training.disk(m1)!s}' is in use by another job"
    assert all(refused in program.output for program in second.programs)
    training.open()
    training.end()
    return training.outcome("the second is refused, the first goes on", whole, seconds)
