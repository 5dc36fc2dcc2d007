"""Paths and names as people have them: in the home folder, long, in other alphabets, of another kind."""

import errno
import io
import os
import sys
import tempfile
from multiprocessing import connection, process
from pathlib import Path
from socket import AF_UNIX, socket
from unittest.mock import Mock

import pytest

import ddp_lib.distributed.addresses
from ddp_lib import TrainConfig, UserError
from ddp_lib.cli import parse
from ddp_lib.data.image_folder import find_images
from ddp_lib.launch.main import PlotOptions, main
from ddp_lib.processes import forkserver
from ddp_lib.processes.exit_status import as_exit_status
from ddp_lib.processes.forkserver import _make_socket_folder
from ddp_lib.processes.temporary import temporary_folder
from ddp_lib.report.plots import plot_run
from ddp_lib.run_dir.log import RunLog
from tests.lab.images import write_images


@pytest.mark.parametrize("words", [["--out=~/p.png", "~"], ["--out", "~/p.png", "~/"]])
def test_the_home_folder_is_meant(words, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    options = parse(PlotOptions, words, "ddp-launch plot")
    assert (Path(options.out), Path(options.run_dir)) == (tmp_path / "p.png", tmp_path)


@pytest.mark.parametrize("word", ["--run-dir=~no-such-user/r", "~no-such-user"])
def test_a_home_folder_that_is_none_is_refused(word, capsys):
    assert main(["train", word]) == 2
    error = capsys.readouterr().err
    assert f"{word}: ~no-such-user is no home directory here" in error and error.count("\n") == 1


def test_sockets_fit_where_tmpdir_is_long(tmp_path, monkeypatch):
    long = tmp_path / ("x" * 60) / ("y" * 60)
    long.mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    monkeypatch.setattr(process.current_process(), "_config", {})
    _make_socket_folder()
    with socket(AF_UNIX) as listener:
        listener.bind(connection.arbitrary_address("AF_UNIX"))
    assert (tempfile.gettempdir(), [*long.rglob("pymp-*")]) == (str(long), [])


@pytest.mark.parametrize(
    ("number", "status", "says"),
    [
        (errno.EFBIG, 75, "ulimit -f"),
        (errno.ENOSPC, 75, "free it, or set TMPDIR"),
        (errno.EACCES, 2, "set TMPDIR"),
    ],
)
def test_why_there_is_no_place_for_temporary_files_is_said(monkeypatch, number, status, says):
    """Python itself says only that it has found none."""
    refused = Mock(side_effect=OSError(number, os.strerror(number)))
    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    monkeypatch.setattr(tempfile, "gettempdir", Mock(side_effect=FileNotFoundError(2, "No usable directory")))
    monkeypatch.setattr(process.current_process(), "_config", {})
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(forkserver, "temporary_folder", temporary_folder.__wrapped__)  # not made before
    monkeypatch.setenv("TMPDIR", "/a")
    with pytest.raises(UserError, match=rf"cannot make a folder in /a: .*{says}") as error:
        _make_socket_folder()
    assert error.value.status == status


@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("p.xyz", "'.xyz': give one of"),
        ("p.txt", "'.txt': give one of"),
        ("p", "'': give one of"),
        ("folder.png", "Is a directory"),
        ("file/p.png", "File exists"),
    ],
)
def test_a_picture_that_cannot_be_written_is_refused(tmp_path, monkeypatch, out, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    with RunLog(tmp_path) as log:
        log.start(step=0)
        log.step(0, 0, samples=1, loss=1.0)
    with pytest.raises(UserError, match=says) as refused:
        plot_run(tmp_path, out)
    assert str(out) in str(refused.value) and "\n" not in str(refused.value)


def test_two_unicode_forms_of_a_class_are_told_apart(tmp_path):
    write_images(tmp_path, train=4, test=4)
    for split, name in (("train", "Z\u00fcrich"), ("test", "Zu\u0308rich")):
        (first := next((tmp_path / split).iterdir())).rename(first.with_name(name))
    with pytest.raises(UserError, match=r"'Zu\\u0308rich' only in test, 'Z\\xfcrich' only in train"):
        find_images(tmp_path, 32, print)


def test_what_the_locale_cannot_show_is_printed_with_escapes(monkeypatch):
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", screen)
    with as_exit_status() as outcome:
        print("runs/\u732b Z\udcfcrich", flush=True)  # the second is Latin-1, as Python reads it
    assert (outcome.status, screen.buffer.getvalue()) == (0, b"runs/\\u732b Z\\udcfcrich\n")


def test_the_data_may_lie_elsewhere_when_a_run_is_resumed():
    earlier = vars(TrainConfig(data="data/mine"))
    assert TrainConfig(data="data/mine/").differences(earlier) == []  # its digest is compared


def test_a_dry_run_without_a_route_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(ddp_lib.distributed.addresses, "resolve", lambda host, port: [])
    words = "train --dry-run --nproc-per-node 1 --nnodes 2 --rdzv-endpoint".split()
    assert main([*words, "no-such-host:29500"]) == 75
    out, error = capsys.readouterr()
    assert out == "" and "'no-such-host' does not resolve here" in error and error.count("\n") == 1
