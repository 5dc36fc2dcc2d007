"""CIFAR-10, downloaded and verified by torchvision's class."""

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

from ddp_lib.data.cache import RawDataset
from ddp_lib.errors import UserError

_DISK_ERRORS = (errno.ENOSPC, errno.EACCES, errno.EPERM, errno.EROFS, errno.EDQUOT, errno.EFBIG)


def cifar10(data_dir: Path, download_timeout_s: float, log: Callable[[str], None]) -> RawDataset:
    """CIFAR-10 from `data_dir`, downloaded into it if necessary; torchvision verifies every file.

    UserError, which says what to download by hand, if the download fails or the server does not
    answer for `download_timeout_s` seconds. OSError if the disk is full or cannot be written.
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
    return RawDataset(
        tuple(train.classes),
        train.data,
        np.array(train.targets, dtype=np.int64),
        test.data,
        np.array(test.targets, dtype=np.int64),
    )


@contextlib.contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """torchvision sets no timeout on its sockets: with a silent server it would hang for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _no_progress_bar_in_logs() -> contextlib.AbstractContextManager[object]:
    """torchvision draws its progress bar on stderr; in a file that would be hundreds of lines."""
    if sys.stderr.isatty():
        return contextlib.nullcontext()
    return contextlib.redirect_stderr(io.StringIO())
