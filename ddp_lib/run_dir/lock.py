"""One job in a run's folder at a time, and on each disk one rank that writes what is stored there."""

from contextlib import ExitStack, suppress
from pathlib import Path
from uuid import uuid4

from filelock import FileLock, Timeout

from ddp_lib.distributed.coordination import all_gather_results, broadcast_result
from ddp_lib.distributed.world import World
from ddp_lib.errors import UserError

_SIGNATURE = ".job"


def lock_run_dir(folder: Path, world: World, stack: ExitStack, timeout_s: float) -> list[int]:
    """Locks `folder` for this job until `stack` closes; returns each rank's writer.

    The writer of a rank is the rank that writes the checkpoint into the folder that both see. Finds out
    which machines share a disk: rank 0, and then the first rank of every machine, tries to lock the
    folder; who gets the lock signs a file in it; and all who read the same signature share that folder.
    So it also holds if a file system's locks reach no further than one machine: the last signature
    counts.

    UserError, on every rank, if another job has the folder on any machine, or if it is not writable.
    """

    def sign_first() -> str:
        job = uuid4().hex
        if not _try_lock(folder, stack, f"{job} 0"):
            raise _in_use(folder)
        return job

    job = broadcast_result(world, "job", sign_first, timeout_s)

    def sign() -> None:
        if world.local_rank == 0 and not world.is_main:
            _try_lock(folder, stack, f"{job} {world.rank}")

    def read_writer() -> int:
        try:
            signed_by, _, rank = (folder / _SIGNATURE).read_text().partition(" ")
        except OSError:
            raise _in_use(folder) from None
        if signed_by != job:
            raise _in_use(folder)
        return int(rank)

    all_gather_results(world, "lock", sign, timeout_s)
    return all_gather_results(world, "writer", read_writer, timeout_s)


def _try_lock(folder: Path, stack: ExitStack, signature: str) -> bool:
    """Whether this process now has the folder, made if need be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--run-dir {str(folder)!r} cannot be made ({error.strerror}): name a folder that this "
            "user can write"
        ) from None
    try:
        stack.enter_context(FileLock(folder / ".lock", timeout=0))
        path = folder / _SIGNATURE
        path.write_text(signature)
        stack.callback(_remove, path)
    except Timeout:
        return False
    except OSError as error:
        raise UserError(
            f"--run-dir {str(folder)!r} cannot be written ({error.strerror}): free the disk, or name "
            "a folder that this user can write"
        ) from None
    return True


def _remove(path: Path) -> None:
    with suppress(OSError):  # a disk that is read-only by now; the next job writes over it
        path.unlink()


def _in_use(folder: Path) -> UserError:
    return UserError(
        f"--run-dir {str(folder)!r} is in use by another job: wait for it, or name another folder"
    )
