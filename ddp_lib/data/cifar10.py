"""CIFAR-10, downloaded and verified by torchvision's class."""

import errno
import http.client
import io
import socket
import sys
import tarfile
from collections.abc import Callable
from contextlib import ExitStack, redirect_stderr, suppress
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import numpy as np

from ddp_lib.data.cache import RawDataset
from ddp_lib.errors import TransientError

_DISK_ERRORS = (errno.ENOSPC, errno.EACCES, errno.EPERM, errno.EROFS, errno.EDQUOT, errno.EFBIG)


def cifar10(data_dir: Path, download_timeout_s: float, log: Callable[[str], None]) -> RawDataset:
    """CIFAR-10 from `data_dir`, downloaded into it if necessary; torchvision verifies every file.

    TransientError, which says what to download by hand, if the download fails or the server does not answer
    for `download_timeout_s` seconds. OSError if the disk is full or cannot be written.
    """
    from torchvision.datasets import CIFAR10

    log(f"data: reading CIFAR-10 in {data_dir}; if it is not there, downloading it: {CIFAR10.url}")
    try:
        with ExitStack() as stack:
            # torchvision sets no timeout on its sockets: with a silent server it would hang for ever.
            stack.callback(socket.setdefaulttimeout, socket.getdefaulttimeout())
            socket.setdefaulttimeout(download_timeout_s)
            if not sys.stderr.isatty():  # in a file, torchvision's progress bar would be hundreds of lines
                stack.enter_context(redirect_stderr(io.StringIO()))
            train = CIFAR10(str(data_dir), train=True, download=True)
            test = CIFAR10(str(data_dir), train=False)
    except (
        OSError,
        RuntimeError,
        ValueError,
        http.client.HTTPException,
        tarfile.TarError,
        EOFError,
    ) as error:
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            raise
        reason = " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__
        raise TransientError(
            f"CIFAR-10 could not be downloaded{_proxy(CIFAR10.url)} ({reason}){_wrong_file(data_dir)}: fetch "
            f"{CIFAR10.url} (MD5 {CIFAR10.tgz_md5}) elsewhere and put it in {data_dir.resolve()}, or take "
            "--data shapes, which needs no download"
        ) from None
    train_labels, test_labels = (np.array(split.targets, dtype=np.int64) for split in (train, test))
    return RawDataset(tuple(train.classes), train.data, train_labels, test.data, test_labels)


def _proxy(url: str) -> str:
    """For the error: the proxy through which the download went, without its password."""
    parts, proxies = urlsplit(url), getproxies()
    for scheme in (parts.scheme, "http"):  # torchvision also tries http
        if scheme in proxies and not proxy_bypass(parts.hostname or ""):
            return f" through the proxy {proxies[scheme].rpartition('@')[2]} ({scheme}_proxy)"
    return ""


def _wrong_file(data_dir: Path) -> str:
    """For the error: what lies in `data_dir` under the name of one of CIFAR-10's files, but is not it."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity

    parts = [*CIFAR10.train_list, *CIFAR10.test_list, (CIFAR10.meta["filename"], CIFAR10.meta["md5"])]
    expected = {f"{CIFAR10.base_folder}/{name}": md5 for name, md5 in parts}
    for name, md5 in ({CIFAR10.filename: CIFAR10.tgz_md5} | expected).items():
        path = data_dir / name
        with suppress(OSError):
            if path.is_file() and not check_integrity(path, md5):
                with open(path, "rb") as file:
                    content = file.read(1000).lstrip().lower()
                is_html = content.startswith((b"<!doctype", b"<html", b"<?xml"))
                what = "a web page, perhaps of a log-in" if is_html else "cut off, damaged or another file"
                return f"; {path} is {what} ({path.stat().st_size:,} bytes)"
    return ""
