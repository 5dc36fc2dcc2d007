"""A run's folder: locked for one job, resumed from the newest checkpoint, and given the results.

Machines that share no disk each keep a copy. All resume from the newest undamaged checkpoint on any
machine, since rank 0 may have moved; the rank that has it sends it to all.
"""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import torch
from filelock import FileLock, Timeout

from ddp_lib.config import TrainConfig
from ddp_lib.distributed.collectives import broadcast_bytes
from ddp_lib.distributed.coordination import all_gather_results, broadcast_result
from ddp_lib.distributed.world import World
from ddp_lib.errors import UserError
from ddp_lib.run_dir import checkpoint
from ddp_lib.run_dir.log import LogSize, log_sizes
from ddp_lib.run_dir.log_sync import LogSync, copy_newest_logs

CONTAINER = "DDP_LIB_CONTAINER"  # set by our image
CONFIG = "config.json"
SUMMARY = "summary.json"
WEIGHTS = "cifar_net.pth"
SIGNATURE = ".job"  # names the job that has the folder, and the rank that writes there


@dataclass(frozen=True)
class Run:
    """An opened run."""

    folder: Path  # this machine's copy
    is_writer: bool  # whether this rank writes the checkpoint there
    began: float  # when the run first started (Unix time), its identity
    resumed: dict[str, Any] | None  # the checkpoint to continue from
    finished: dict[str, Any] | None  # the summary, if nothing is left to do
    log_sync: LogSync | None  # None if all machines share the folder

    def sync_logs(self) -> None:
        """Brings the master's copies of all ranks' logs up to date; all ranks call it."""
        if self.log_sync is not None:
            self.log_sync.send()


@contextmanager
def open_run(config: TrainConfig, world: World, total_steps: int) -> Iterator[Run]:
    """Opens the run's folder for this job on every rank, and decides where to start.

    UserError, on every rank, if another job has the folder, a checkpoint has another configuration
    (--resume auto), there is no checkpoint (--resume must), or a folder cannot be written.
    """
    folder, timeout_s = Path(config.run_dir), config.data_timeout_s
    warn_if_in_container(folder.resolve(), world)
    payload = b""

    def inspect_here() -> dict[str, Any]:
        nonlocal payload
        payload, here = inspect(folder, config, world) if is_writer else (b"", Copy(""))
        return asdict(here)

    with ExitStack() as stack:
        writers = lock_run_dir(folder, world, stack, timeout_s)
        is_writer = writers[world.rank] == world.rank
        copies = [Copy(**copy) for copy in all_gather_results(world, "inspect", inspect_here, timeout_s)]
        began = max(copy.began for copy in copies)
        if copies[world.rank].is_older_than(began):
            move_aside(folder, world, "of an earlier run than another machine's")
        copies = [Copy(copy.host) if copy.is_older_than(began) else copy for copy in copies]
        source = newest_checkpoint(copies, config)
        log_sync = resumed = finished = None
        if len(set(writers)) > 1:
            copy_newest_logs(folder, world, writers, [copy.logs for copy in copies])
            log_sync = LogSync(folder, world, writers)
        if source is not None:
            finished = copies[0].summary if copies[source].step >= total_steps else None
            if copies[world.rank].damage:
                world.say(f"warning: no whole checkpoint in {folder}: taking another machine's", True)
            payload = broadcast_bytes(world, payload, source)
            resumed = checkpoint.from_bytes(payload)
        if finished is None:
            began = began or broadcast_result(world, "began", time.time, timeout_s)

            def write() -> None:
                described = {**asdict(config), "versions": world.versions, "began": began}
                checkpoint.write_atomic(folder / CONFIG, f"{json.dumps(described, indent=2)}\n".encode())
                if resumed and copies[world.rank].step < resumed["step"]:
                    checkpoint.save(folder, payload)

            all_gather_results(world, "write", write if is_writer else lambda: None, timeout_s)
            if resumed:
                whose = f", the checkpoint of {copies[source].host}" if source else ""
                world.say(f"resuming {folder} at step {resumed['step']} of {total_steps}{whose}")
        yield Run(folder, is_writer, began, resumed, finished, log_sync)


@dataclass(frozen=True)
class Copy:
    """What a machine's copy of the folder holds, sent by its writer; other ranks send an empty Copy."""

    host: str
    began: float = 0.0  # when the run first started, Unix time (0: not known)
    step: int = -1  # of the newest undamaged checkpoint (-1: none)
    damage: str = ""  # what is wrong with a checkpoint
    logs: list[LogSize] = field(default_factory=list)
    summary: dict[str, Any] | None = None  # of a finished run

    def is_older_than(self, began: float) -> bool:
        """Whether this is left over from a run earlier than the run that began at `began`."""
        return self.began < began and (self.step >= 0 or bool(self.logs))


def inspect(folder: Path, config: TrainConfig, world: World) -> tuple[bytes, Copy]:
    """The bytes of this folder's newest undamaged checkpoint (empty if none), and what else it holds.
    UserError if the checkpoint has another configuration."""
    host = socket.gethostname()
    for half_written in folder.glob(".*.tmp"):  # by processes that were killed
        half_written.unlink(missing_ok=True)
    if config.resume == "never":
        move_aside(folder, world, "--resume never")
        return b"", Copy(host)
    payload, step, began, damage, summary = None, -1, 0.0, "", None
    with suppress(OSError, ValueError, KeyError, TypeError):
        began = float(json.loads((folder / CONFIG).read_text())["began"])
    try:
        payload = checkpoint.find(folder, lambda line: world.say(line, True))
    except UserError as error:
        damage = str(error)  # not raised yet: another machine may have an undamaged checkpoint
    if payload is not None:
        state = checkpoint.from_bytes(payload)
        if differences := config.differences(state["config"]):
            raise UserError(
                f"{folder} holds a run of another configuration ({'; '.join(differences)}): "
                "name another --run-dir, give the same flags, or --resume never to start again"
            )
        began, step = state.get("began", began), state["step"]
    if (folder / SUMMARY).exists() and (folder / WEIGHTS).exists():
        summary = json.loads((folder / SUMMARY).read_text())
    return payload or b"", Copy(host, began, step, damage, log_sizes(folder), summary)


def newest_checkpoint(copies: list[Copy], config: TrainConfig) -> int | None:
    """The rank with the newest checkpoint, the lowest such rank; None: a fresh start. `copies` are of one
    run. UserError if all are damaged, or if --resume must finds no checkpoint."""
    rank = max(range(len(copies)), key=lambda rank: copies[rank].step)
    if copies[rank].step >= 0:
        return rank
    for copy in copies:
        if copy.damage:
            raise UserError(copy.damage)
    if config.resume == "must":
        raise UserError(
            f"--resume must: {config.run_dir} holds no checkpoint; check --run-dir, or use --resume auto"
        )
    return None


def move_aside(folder: Path, world: World, why: str) -> None:
    if target := checkpoint.move_aside(folder):
        world.say(f"{why}: what {folder} held is now in {target}", every_node=True)


def write_results(folder: Path, weights: dict[str, torch.Tensor], summary: dict[str, Any]) -> None:
    """Writes the model before the summary, so that a run with a summary has its model too."""
    checkpoint.write_atomic(folder / WEIGHTS, checkpoint.to_bytes(weights))
    checkpoint.write_atomic(folder / SUMMARY, f"{json.dumps(summary, indent=2)}\n".encode())


def warn_if_in_container(folder: Path, world: World) -> None:
    """Rank 0 warns if the run's folder is inside a container and not on a volume."""
    if not world.is_main or CONTAINER not in os.environ:
        return
    mounts = {Path(partition.mountpoint) for partition in psutil.disk_partitions(all=True)}
    if not mounts & {folder, *folder.parents} - {Path("/")}:
        world.say(
            f"{folder} lies inside this container: with --rm the model will be lost; "
            f"keep it with -v FOLDER_OF_YOURS:{folder.parent}"
        )


def lock_run_dir(folder: Path, world: World, stack: ExitStack, timeout_s: float) -> list[int]:
    """Locks `folder` for this job until `stack` closes; returns each rank's writer.

    The writer of a rank is the rank that writes the checkpoint into the folder that both see. Finds out
    which machines share a disk. Rank 0, then the first rank of each machine, tries to lock the folder.
    A rank that gets the lock signs a file in it, and all ranks that read the same signature share the
    folder. The last signature counts, so this also works if locks hold only within a machine.

    UserError, on every rank, if another job has the folder on any machine, or if it is not writable.
    """
    in_use = UserError(
        f"--run-dir {str(folder)!r} is in use by another job: wait for it, or name another folder"
    )

    def sign_first() -> str:
        job = uuid4().hex
        if not _try_lock(folder, stack, f"{job} 0"):
            raise in_use
        return job

    job = broadcast_result(world, "job", sign_first, timeout_s)

    def sign() -> None:
        if world.local_rank == 0 and not world.is_main:
            _try_lock(folder, stack, f"{job} {world.rank}")

    def read_writer() -> int:
        signature = ""
        with suppress(OSError):
            signature = (folder / SIGNATURE).read_text()
        signed_by, _, rank = signature.partition(" ")
        if signed_by != job:
            raise in_use
        return int(rank)

    all_gather_results(world, "lock", sign, timeout_s)
    return all_gather_results(world, "writer", read_writer, timeout_s)


def _try_lock(folder: Path, stack: ExitStack, signature: str) -> bool:
    """Whether this process now has the folder, which is created if missing."""
    path = folder / SIGNATURE

    def remove() -> None:
        with suppress(OSError):  # the disk may be read-only now; the next job overwrites the file
            path.unlink()

    problem, cure = "made", ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        problem, cure = "written", "free the disk, or "
        stack.enter_context(FileLock(folder / ".lock", timeout=0))
        path.write_text(signature)
        stack.callback(remove)
    except Timeout:
        return False
    except OSError as error:
        raise UserError(
            f"--run-dir {str(folder)!r} cannot be {problem} ({error.strerror}): {cure}name a folder that "
            "this user can write"
        ) from None
    return True
