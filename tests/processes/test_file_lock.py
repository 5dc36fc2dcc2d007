"""Locks, also on file systems that have none."""

import errno
import fcntl
import os

import pytest
from filelock import Timeout

from ddp_lib.processes.file_lock import file_lock


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_keeps_nobody_out(tmp_path, monkeypatch, capfd, number):
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    for _ in range(2):
        file_lock(tmp_path / ".lock")  # not released: as after a kill
        assert f"{tmp_path} has no file locks" in capfd.readouterr().out


def test_a_held_lock_is_a_timeout(tmp_path):
    with file_lock(tmp_path / ".lock"), pytest.raises(Timeout):
        file_lock(tmp_path / ".lock")
    with file_lock(tmp_path / ".lock"):
        pass
