"""CIFAR-10 from a local server: nothing here leaves the machine."""

import hashlib
import http.server
import io
import json
import pickle
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddp_lib.data.dataset import load_dataset
from tests.lab.datasets import quiet, refusal


@pytest.fixture(scope="module")
def archive() -> tuple[bytes, dict[str, Any]]:
    """A small archive in the official format, and the attributes by which torchvision knows it."""
    random = np.random.default_rng(0)
    buffer, sums = io.BytesIO(), {}
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch", "batches.meta"]
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name in names:
            if name == "batches.meta":
                content: dict[str, Any] = {"label_names": [f"class {c}" for c in range(10)]}
            else:
                pixels = random.integers(0, 256, (20, 3072), dtype=np.uint8)
                content = {"data": pixels, "labels": random.integers(0, 10, 20).tolist()}
            payload = pickle.dumps(content, protocol=2)
            sums[name] = hashlib.md5(payload).hexdigest()
            entry = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            entry.size = len(payload)
            tar.addfile(entry, io.BytesIO(payload))
    return buffer.getvalue(), {
        "tgz_md5": hashlib.md5(buffer.getvalue()).hexdigest(),
        "train_list": [[name, sums[name]] for name in names[:5]],
        "test_list": [["test_batch", sums["test_batch"]]],
        "meta": {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]},
    }


class Server(http.server.ThreadingHTTPServer):
    """Serves `body` for any path, and counts."""

    body = b""
    requests = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/cifar-10-python.tar.gz"


class _Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, Server)
        server.requests += 1
        self.send_response(200 if server.body else 404)
        self.send_header("Content-Length", str(len(server.body)))
        self.end_headers()
        self.wfile.write(server.body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(archive: tuple[bytes, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server(("127.0.0.1", 0), _Answer) as server:
        server.body = archive[0]
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join(10)


@pytest.fixture
def known(
    archive: tuple[bytes, dict[str, Any]], server: Server, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """Makes torchvision take the small archive from the local server for CIFAR-10."""
    from torchvision.datasets import CIFAR10

    known = archive[1] | {"url": server.url}
    for name, value in known.items():
        monkeypatch.setattr(CIFAR10, name, value)
    return known


@pytest.mark.usefixtures("known")
def test_cifar10_is_downloaded_once_and_then_read(
    tmp_path: Path, server: Server, capfd: pytest.CaptureFixture[str]
) -> None:
    dataset = load_dataset("cifar10", tmp_path, log=quiet)
    assert (len(dataset.train), len(dataset.test)) == (100, 20)
    assert dataset.classes == tuple(f"class {c}" for c in range(10))
    from torchvision.datasets import CIFAR10

    theirs = CIFAR10(str(tmp_path), train=False)
    assert (dataset.test.images.numpy() == theirs.data).all()
    assert dataset.test.labels.tolist() == theirs.targets
    requests = server.requests
    assert load_dataset("cifar10", tmp_path, log=quiet).digest == dataset.digest
    assert server.requests == requests
    assert capfd.readouterr().err == ""  # no progress bar without a terminal
    assert socket.getdefaulttimeout() is None


@pytest.mark.ranks
def test_one_process_of_several_downloads(tmp_path: Path, server: Server, known: dict[str, Any]) -> None:
    load_dataset("cifar10", tmp_path / "alone", log=quiet)
    requests_alone, server.requests = server.requests, 0
    script = (
        "import json, sys\n"
        "from torchvision.datasets import CIFAR10\n"
        "from ddp_lib import load_dataset\n"
        "for name, value in json.loads(sys.argv[2]).items(): setattr(CIFAR10, name, value)\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "print(load_dataset('cifar10', sys.argv[1], log=lambda text: None).digest)\n"
    )
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / "shared"), json.dumps(known)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for _ in range(3)
    ]  # fmt: skip
    try:
        assert all(p.stdout and p.stdout.readline() == "ready\n" for p in ranks)
        for process in ranks:  # all start at once
            assert process.stdin
            process.stdin.write("\n")
            process.stdin.flush()
        digests = {process.communicate(timeout=60)[0] for process in ranks}
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert server.requests == requests_alone
    assert len(digests) == 1 and len(digests.pop()) == 65


def check_names_the_cure(line: str, known: dict[str, Any], data_dir: Path) -> None:
    assert known["url"] in line and known["tgz_md5"] in line and str(data_dir) in line
    assert "--data shapes" in line


def test_cifar10_offline(tmp_path: Path, known: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    with socket.create_server(("127.0.0.1", 0)) as closed_soon:
        port = closed_soon.getsockname()[1]
    known["url"] = f"http://127.0.0.1:{port}/cifar-10-python.tar.gz"
    monkeypatch.setattr(CIFAR10, "url", known["url"])
    check_names_the_cure(refusal("cifar10", tmp_path), known, tmp_path)


def test_cifar10_from_a_server_that_never_answers(
    tmp_path: Path, known: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import CIFAR10

    with socket.create_server(("127.0.0.1", 0)) as silent:
        known["url"] = f"http://127.0.0.1:{silent.getsockname()[1]}/cifar-10-python.tar.gz"
        monkeypatch.setattr(CIFAR10, "url", known["url"])
        limit = threading.Timer(20, silent.close)  # resets the connection
        limit.start()
        try:
            line = refusal("cifar10", tmp_path, download_timeout_s=0.3)
        finally:
            limit.cancel()
    check_names_the_cure(line, known, tmp_path)
    assert "timed out" in line
    assert socket.getdefaulttimeout() is None


def test_cifar10_not_found_or_wrong(tmp_path: Path, server: Server, known: dict[str, Any]) -> None:
    body, server.body = server.body, b""
    check_names_the_cure(refusal("cifar10", tmp_path), known, tmp_path)
    server.body = body[:-50]  # a connection that ended early, or somebody's log-in page
    check_names_the_cure(refusal("cifar10", tmp_path), known, tmp_path)
    server.body = body  # what lies there by now is damaged, so it is fetched again
    assert len(load_dataset("cifar10", tmp_path, log=quiet).train) == 100


def test_what_lies_there_instead_of_cifar10_is_named(
    tmp_path: Path, server: Server, known: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    body = server.body
    load_dataset("cifar10", tmp_path / "whole", log=quiet)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("http_proxy", f"http://me:secret@127.0.0.1:{port}")
    monkeypatch.setattr(urllib.request, "_opener", None)  # urllib reads the variables only once
    archive = tmp_path / "cifar-10-python.tar.gz"
    for content, named in (
        (b"\n<!DOCTYPE html><p>Log in", f"{archive} is a web page"),
        (body[:-50], f"{archive} is cut off, damaged or another file ({len(body) - 50:,} bytes)"),
    ):
        archive.write_bytes(content)
        line = refusal("cifar10", tmp_path)
        check_names_the_cure(line, known, tmp_path)
        assert named in line
        assert f"through the proxy 127.0.0.1:{port} (http_proxy)" in line and "secret" not in line
    archive.unlink()
    shutil.copytree(tmp_path / "whole" / "cifar-10-batches-py", tmp_path / "cifar-10-batches-py")
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(b"spoilt")
    assert "test_batch is cut off, damaged or another file (6 bytes)" in refusal("cifar10", tmp_path)


@pytest.mark.usefixtures("known")
def test_cifar10_put_there_by_hand(tmp_path: Path, server: Server) -> None:
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(server.body)
    assert len(load_dataset("cifar10", tmp_path, log=quiet).train) == 100
    assert server.requests == 0


@pytest.mark.usefixtures("known")
def test_cifar10_with_half_an_archive_or_a_spoilt_file(tmp_path: Path, server: Server) -> None:
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(server.body[:1000])
    digest = load_dataset("cifar10", tmp_path, log=quiet).digest
    assert server.requests > 0
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"spoilt")
    (tmp_path / "cache" / "cifar10" / "meta.json").unlink()
    assert load_dataset("cifar10", tmp_path, log=quiet).digest == digest
