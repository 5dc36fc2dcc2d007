"""A file's lock, also where the file system has none."""

import errno
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from filelock import FileLock

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)


def file_lock(path: Path, timeout_s: float = 0.0) -> AbstractContextManager[object]:
    """Holds the lock of the file `path`, which the system releases even if the process is killed.

    Some file systems have no locks (NFS without its lock daemon, FUSE): a line says so, and nothing is held.
    FileLock's own answer there is a file, which would keep out every later job if this one is killed.
    filelock.Timeout if another process has the lock for more than `timeout_s` seconds.
    """
    try:
        return FileLock(path, fallback_to_soft=False).acquire(timeout=timeout_s)
    except (OSError, NotImplementedError) as error:  # Timeout is an OSError without a number
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        print(f"{path.parent} has no file locks: start no second job in this folder", flush=True)
        return nullcontext()
