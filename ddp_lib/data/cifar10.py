"""CIFAR-10, downloaded and verified by torchvision's own class."""

import contextlib
import errno
import http.client
import io
import socket
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ddp_lib.data.cache import Raw
from ddp_lib.errors import UserError

_DISK_ERRORS = (errno.ENOSPC, errno.EACCES, errno.EPERM, errno.EROFS, errno.EDQUOT, errno.EFBIG)


def cifar10(data_dir: Path, download_timeout_s: float, log: Callable[[str], None]) -> Raw:
    """CIFAR-10 from `data_dir`, downloaded into it if need be; torchvision verifies every file.

    UserError, naming what to fetch by hand, where the download fails or any answer takes longer
    than `download_timeout_s`; OSError where the disk refuses.
    """
    from torchvision.datasets import CIFAR10

    log(f"data: reading CIFAR-10 in {data_dir}; if it is not there, downloading it: {CIFAR10.url}")
    try:
        with _socket_timeout(download_timeout_s), _no_progress_bar_in_logs():
            train = CIFAR10(str(data_dir), train=True, download=True)
            test = CIFAR10(str(data_dir), train=False)
    except (OSError, RuntimeError, http.client.HTTPException, tarfile.TarError, EOFError) as error:
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            raise
        reason = " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__
        raise UserError(
            f"CIFAR-10 could not be downloaded ({reason}): fetch {CIFAR10.url} "
            f"(MD5 {CIFAR10.tgz_md5}) elsewhere and put it in {data_dir.resolve()}, "
            "or take --data shapes, which needs no download"
        ) from None
    return Raw(
        tuple(train.classes),
        train.data,
        np.array(train.targets, dtype=np.int64),
        test.data,
        np.array(test.targets, dtype=np.int64),
    )


@contextlib.contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """torchvision sets no time limit on its sockets, so a silent server would hold it for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _no_progress_bar_in_logs() -> contextlib.AbstractContextManager[object]:
    """torchvision draws its bar on stderr; in a file that would be hundreds of lines."""
    if sys.stderr.isatty():
        return contextlib.nullcontext()
    return contextlib.redirect_stderr(io.StringIO())
