"""A run's folder belongs to one job at a time; finds out which machines share a disk."""

from contextlib import ExitStack, suppress
from pathlib import Path
from uuid import uuid4

from filelock import Timeout

from ddp_lib.distributed.coordination import all_gather_results, broadcast_result
from ddp_lib.distributed.world import World
from ddp_lib.errors import TransientError, UserError
from ddp_lib.processes.file_lock import file_lock
from ddp_lib.run_dir.log import SIGNATURE


def lock_run_dir(folder: Path, world: World, stack: ExitStack, timeout_s: float) -> list[int]:
    """Locks `folder` for this job until `stack` closes; returns each rank's writer.

    The writer of a rank is the rank that writes the checkpoint into the folder that both see. Finds out
    which machines share a disk. Rank 0, then the first rank of each machine, tries to lock the folder.
    A rank that gets the lock signs a file in it, and all ranks that read the same signature share the
    folder. The last signature counts, so this also works if locks hold only within a machine.

    UserError, on every rank, if another job has the folder on any machine, or if it is not writable.
    """
    in_use = TransientError(
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
        stack.enter_context(file_lock(folder / ".lock"))
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
