"""Data sets and batches. Nothing here leaves the machine: CIFAR-10 comes from a local server."""

import hashlib
import http.server
import io
import json
import math
import os
import pickle
import socket
import subprocess
import sys
import tarfile
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest
import torch
from PIL import Image

from ddp_lib.data import batch, shapes
from ddp_lib.data.batch import make_batch, random_below
from ddp_lib.data.cache import mean_and_std
from ddp_lib.data.dataset import Dataset, Split, load_dataset
from ddp_lib.errors import UserError


def quiet(text: str) -> None:
    pass


def refusal(source: str, data_dir: Path, **options: Any) -> str:
    """The one line with which a data set is refused."""
    with pytest.raises(UserError) as caught:
        load_dataset(source, data_dir, log=quiet, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "TRAIN_IMAGES", 60)
    monkeypatch.setattr(shapes, "TEST_IMAGES", 20)


# ---------------------------------------------------------------- shapes


def test_shapes_are_the_same_bytes_everywhere() -> None:
    images, labels = shapes.make_shapes(30, shapes.TRAIN_SEED)
    found = hashlib.sha256(images.tobytes() + labels.astype("<i8").tobytes()).hexdigest()
    # Whoever changes the images on purpose also raises shapes.VERSION, or old caches stay in use.
    assert found == "47014651435d589d4e6a90d6f8cde347346b1b4cbc4637d369b41514a79be6d7"
    assert shapes.VERSION == 1


def test_fewer_shapes_are_the_first_of_more() -> None:
    few, _ = shapes.make_shapes(30, 5)
    more, labels = shapes.make_shapes(530, 5)  # over a chunk's border
    assert (more[:30] == few).all()
    assert np.bincount(labels).tolist() == [53] * 10
    assert len(np.unique(more.reshape(530, -1), axis=0)) == 530
    assert not (shapes.make_shapes(30, 6)[0] == few).all(axis=(1, 2, 3)).any()


def test_shapes_are_beyond_a_linear_classifier() -> None:
    (x, labels), (x_test, labels_test) = shapes.make_shapes(2000, 1), shapes.make_shapes(500, 2)
    x, x_test = (images.reshape(len(images), -1) / 255 - 0.5 for images in (x, x_test))
    # Ridge regression on the pixels, in closed form (in its dual, the smaller system).
    weights = x.T @ np.linalg.solve(x @ x.T + 100 * np.eye(2000), np.eye(10)[labels])
    assert ((x_test @ weights).argmax(axis=1) == labels_test).mean() < 0.6


# ---------------------------------------------------------------- cache


@pytest.mark.usefixtures("few_shapes")
def test_loads_and_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_dataset("shapes", tmp_path / "new" / "data", log=quiet)
    assert first.name == "shapes" and first.classes == shapes.CLASSES
    assert (len(first.train), len(first.test)) == (60, 20)
    assert first.train.images.shape == (60, 32, 32, 3)
    assert first.train.images.dtype == torch.uint8
    assert first.train.labels.dtype == torch.int64
    assert (first.train.images.numpy() == shapes.make_shapes(60, shapes.TRAIN_SEED)[0]).all()
    pixels = first.train.images.double().flatten(0, 2) / 255
    assert first.mean == pytest.approx(pixels.mean(dim=0).tolist())
    assert first.std == pytest.approx(pixels.std(dim=0, correction=0).tolist())
    assert len(first.digest) == 64

    with monkeypatch.context() as patch:
        patch.setattr(shapes, "make_shapes", None)  # not called again
        again = load_dataset("shapes", tmp_path / "new" / "data", log=quiet)
    assert again.digest == first.digest
    assert torch.equal(again.test.images, first.test.images)
    assert load_dataset("shapes", tmp_path / "other", log=quiet).digest == first.digest


@pytest.mark.usefixtures("few_shapes")
def test_no_warning_of_a_read_only_array(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = load_dataset("shapes", tmp_path, log=quiet)
    dataset.train.images[0] = 7  # reaches this process's copy only
    assert not torch.equal(
        load_dataset("shapes", tmp_path, log=quiet).train.images[0], dataset.train.images[0]
    )


@pytest.mark.usefixtures("few_shapes")
@pytest.mark.parametrize("damage", ["cut", "missing", "meta cut", "meta missing", "older", "half"])
def test_a_damaged_cache_is_made_again(tmp_path: Path, damage: str) -> None:
    digest = load_dataset("shapes", tmp_path, log=quiet).digest
    cache = tmp_path / "cache" / "shapes"
    victim = cache / "train_images.npy"
    match damage:
        case "cut":
            victim.write_bytes(victim.read_bytes()[:-100])
        case "missing":
            victim.unlink()
        case "meta cut":
            (cache / "meta.json").write_text((cache / "meta.json").read_text()[:50])
        case "meta missing":
            (cache / "meta.json").unlink()
        case "older":
            meta = json.loads((cache / "meta.json").read_text())
            (cache / "meta.json").write_text(json.dumps(meta | {"made_from": "shapes version 0"}))
        case "half":
            cache.rename(tmp_path / "cache" / ".shapes.abcdefgh")  # what a killed maker leaves
    again = load_dataset("shapes", tmp_path, log=quiet)
    assert again.digest == digest
    assert (again.train.images.numpy() == shapes.make_shapes(60, shapes.TRAIN_SEED)[0]).all()
    assert sorted(p.name for p in cache.parent.iterdir()) == ["shapes", "shapes.lock"]


def test_the_wait_for_another_process_has_a_limit(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    said: list[str] = []
    with filelock.FileLock(tmp_path / "cache" / "shapes.lock"), pytest.raises(UserError) as caught:
        load_dataset("shapes", tmp_path, timeout_s=0.2, log=said.append)
    assert "0.2 s" in str(caught.value) and "--data-timeout-s" in str(caught.value)
    assert len(said) == 1 and "waiting" in said[0]


@pytest.mark.usefixtures("few_shapes")
def test_an_unusable_data_dir_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    line = refusal("shapes", tmp_path / "file" / "data")
    assert str(tmp_path / "file" / "data") in line and "--data-dir" in line


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on file sizes")
def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    # Files may grow to 100 kB only: writing fails half-way as it does on a full disk.
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "from ddp_lib.data import shapes; shapes.TRAIN_IMAGES = 100\n"
        "from ddp_lib import load_dataset\n"
        "from ddp_lib.errors import UserError\n"
        "try: load_dataset('shapes', sys.argv[1], log=lambda text: None)\n"
        "except UserError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert "cannot keep the data set in" in done.stdout, done.stderr
    assert "File too large" in done.stdout
    assert done.stdout.count("\n") == 1
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["shapes.lock"]


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads Linux's memory accounts")
def test_ranks_share_the_images_memory(tmp_path: Path) -> None:
    load_dataset("shapes", tmp_path, log=quiet)
    script = (
        "import sys\n"
        "from ddp_lib import load_dataset\n"
        "images = load_dataset('shapes', sys.argv[1]).train.images\n"
        "images.sum(); print('ready', flush=True); sys.stdin.readline()\n"
        "account = open('/proc/self/smaps').read().split('train_images.npy')[1]\n"
        "rows = dict(line.split(':') for line in account.splitlines()[1:20] if 'kB' in line)\n"
        "print(*(int(rows[k].split()[0]) for k in ('Rss', 'Pss', 'Private_Dirty')), flush=True)\n"
        "sys.stdin.readline()\n"
    )
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    try:
        assert all(p.stdout and p.stdout.readline() == "ready\n" for p in ranks)
        for process in ranks:
            assert process.stdin and process.stdout
            process.stdin.write("\n")
            process.stdin.flush()
            resident, share, own = map(int, process.stdout.readline().split())
            assert resident > 29_000 and share < 0.6 * resident and own == 0
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


# ---------------------------------------------------------------- CIFAR-10


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
def server(
    archive: tuple[bytes, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Server]:
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
    assert capfd.readouterr().err == ""  # no progress bar where nobody watches
    assert socket.getdefaulttimeout() is None


@pytest.mark.ranks
def test_one_process_of_several_downloads(
    tmp_path: Path, server: Server, known: dict[str, Any]
) -> None:
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


def test_cifar10_offline(
    tmp_path: Path, known: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
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


# ---------------------------------------------------------------- a folder of images


def flat(colour: Any, mode: str = "RGB", size: tuple[int, int] = (32, 32)) -> Image.Image:
    return Image.new(mode, size, colour)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, red and blue; three training images and one test image each."""
    root = tmp_path / "pictures"
    for split, count in (("train", 3), ("test", 1)):
        for name, colour in (("red", (200, 0, 0)), ("blue", (0, 0, 100))):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                flat(colour).save(root / split / name / f"{number}.png")
    return root


def test_folder(tmp_path: Path, folder: Path) -> None:
    for name in (".DS_Store", "Thumbs.db", "README.txt", "._0.png"):
        (folder / "train" / "red" / name).write_text("no image")
    (folder / "train" / ".ipynb_checkpoints").mkdir()
    said: list[str] = []
    dataset = load_dataset(str(folder), tmp_path / "data", log=said.append)
    assert dataset.classes == ("blue", "red")
    assert dataset.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert dataset.test.labels.tolist() == [0, 1]
    assert (dataset.train.images[0] == torch.tensor([0, 0, 100])).all()
    assert (dataset.test.images[1] == torch.tensor([200, 0, 0])).all()
    assert dataset.mean == pytest.approx([100 / 255, 0, 50 / 255])
    assert dataset.std[1] == 1 / 255  # one flat value, and nothing divides by zero
    x, _ = make_batch(dataset.train, torch.arange(6), dataset)
    assert x.isfinite().all()
    assert not any("resized" in line for line in said)


def test_folder_is_read_again_when_it_changed(tmp_path: Path, folder: Path) -> None:
    first = load_dataset(str(folder), tmp_path / "data", log=quiet)
    said: list[str] = []
    load_dataset(str(folder), tmp_path / "data", log=said.append)
    assert said == []
    path = folder / "train" / "red" / "1.png"
    before = path.stat()
    flat((201, 0, 0)).save(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))  # however coarse the clock
    changed = load_dataset(str(folder), tmp_path / "data", log=quiet)
    assert changed.digest != first.digest
    assert changed.train.images[4, 0, 0, 0] == 201
    assert first.train.images[4, 0, 0, 0] == 200  # whoever mapped the old one keeps it
    flat((9, 9, 9)).save(folder / "test" / "red" / "new.png")
    assert len(load_dataset(str(folder), tmp_path / "data", log=quiet).test) == 3


@pytest.mark.parametrize(
    ("image", "ending", "expected"),
    [
        (flat(120, "L"), "png", (120, 120, 120)),
        (flat(1, "1"), "png", (255, 255, 255)),
        (flat((10, 20, 30, 128), "RGBA"), "png", (10, 20, 30)),
        (flat((10, 200), "LA"), "png", (10, 10, 10)),
        (flat((255, 0, 0)).quantize(4), "png", (255, 0, 0)),
        (flat((0, 255, 255, 0), "CMYK"), "jpg", (254, 0, 0)),
        (flat(30_000, "I;16"), "png", (117, 117, 117)),
        (flat((50, 60, 70), size=(300, 7)), "bmp", (50, 60, 70)),
        (flat((50, 60, 70), size=(2000, 1500)), "JPEG", (50, 60, 70)),
        (flat((50, 60, 70), size=(1, 1)), "webp", (50, 60, 70)),
        (flat((250, 0, 0), size=(40, 40)), "gif", (250, 0, 0)),
    ],
)
def test_folder_takes_any_mode_and_size(
    tmp_path: Path, folder: Path, image: Image.Image, ending: str, expected: tuple[int, ...]
) -> None:
    image.save(folder / "test" / "red" / f"other.{ending}")
    said: list[str] = []
    dataset = load_dataset(str(folder), tmp_path / "data", log=said.append)
    found = dataset.test.images[2].to(torch.int64)
    assert found.shape == (32, 32, 3)
    assert (found - torch.tensor(expected)).abs().max() <= 3
    resized = [line for line in said if "resized" in line]
    assert len(resized) == (0 if image.size == (32, 32) else 1)
    assert all(" 1 " in line for line in resized)


def test_folder_turns_photographs_upright(tmp_path: Path, folder: Path) -> None:
    image = Image.fromarray(np.repeat(np.arange(32, dtype=np.uint8)[:, None] * 8, 32, axis=1))
    exif = Image.Exif()
    exif[0x0112] = 3  # taken upside down
    image.save(folder / "test" / "red" / "z.png", exif=exif)
    found = load_dataset(str(folder), tmp_path / "data", log=quiet).test.images[2]
    assert found[0, 0, 0] == 248 and found[31, 0, 0] == 0


def test_folder_refusals(tmp_path: Path, folder: Path) -> None:
    into = tmp_path / "data"
    line = refusal("cifr10", into)
    assert "'cifr10'" in line and "shapes" in line and "cifar10" in line
    bad = folder / "test" / "red" / "0.png"

    whole = bad.read_bytes()
    for content in (b"", b"no image at all", whole[:60]):
        bad.write_bytes(content)
        assert f"image {bad} cannot be read" in refusal(str(folder), into)
    bad.unlink()
    assert f"class folder {bad.parent} holds no image" in refusal(str(folder), into)
    bad.symlink_to(tmp_path / "gone.png")
    assert str(bad) in refusal(str(folder), into)
    bad.unlink()
    bad.parent.rmdir()
    assert "differ: 'red' only in train" in refusal(str(folder), into)
    (folder / "test" / "Red").mkdir()
    flat(1, "L").save(folder / "test" / "Red" / "0.png")
    assert "'Red' only in test, 'red' only in train" in refusal(str(folder), into)
    (folder / "test").rename(folder / "validation")
    assert f"{folder} has no folder test/" in refusal(str(folder), into)
    cached = list((into / "cache").iterdir()) if (into / "cache").exists() else []
    assert [p for p in cached if p.suffix != ".lock"] == []  # nothing half-made stays


def test_folder_of_one_class_is_refused(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split / "only").mkdir(parents=True)
        flat(1, "L").save(tmp_path / split / "only" / "0.png")
    assert "a classifier needs two" in refusal(str(tmp_path), tmp_path / "data")


# ---------------------------------------------------------------- batches


@pytest.fixture(scope="module")
def some() -> Dataset:
    images, labels = map(torch.from_numpy, shapes.make_shapes(200, 0))
    split = Split(images, labels)
    mean, std = mean_and_std(images.numpy())
    return Dataset("some", shapes.CLASSES, split, split, (*mean,), (*std,), "")  # type: ignore[arg-type]


def test_batch_is_normalised_and_channels_last(some: Dataset) -> None:
    indices = torch.tensor([5, 3, 199, 3])
    x, y = make_batch(some.train, indices, some)
    assert x.shape == (4, 3, 32, 32) and x.dtype == torch.float32
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, some.train.labels[indices])
    expected = some.train.images[indices].permute(0, 3, 1, 2).double() / 255
    expected = (expected - torch.tensor(some.mean).view(3, 1, 1)) / torch.tensor(some.std).view(
        3, 1, 1
    )
    torch.testing.assert_close(x.double(), expected, rtol=0, atol=1e-5)
    double, _ = make_batch(some.train, indices, some, dtype=torch.float64)
    assert double.dtype == torch.float64
    torch.testing.assert_close(double, expected, rtol=0, atol=1e-6)

    whole, _ = make_batch(some.train, torch.arange(200), some, dtype=torch.float64)
    assert whole.mean(dim=(0, 2, 3)).abs().max() < 1e-6
    torch.testing.assert_close(whole.std(dim=(0, 2, 3)), torch.ones(3).double(), rtol=0, atol=1e-3)


def test_augmented_batch_equals_one_image_at_a_time(some: Dataset) -> None:
    indices = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    x, _ = make_batch(some.train, indices, some, augment=(11, 4))
    draws = random_below(50, 11, 4, indices).tolist()
    seen = set()
    for row, (index, draw) in enumerate(zip(indices.tolist(), draws, strict=True)):
        top, left, flip = draw % 5, draw // 5 % 5, draw // 25
        seen.add((top, left, flip))
        padded = np.zeros((36, 36, 3), dtype=np.uint8)
        padded[2:34, 2:34] = some.train.images[index]
        crop = padded[top : top + 32, left : left + 32]
        crop = crop[:, ::-1] if flip else crop
        one = Split(torch.from_numpy(crop.copy())[None], torch.zeros(1, dtype=torch.int64))
        expected, _ = make_batch(one, torch.tensor([0]), some)
        assert torch.equal(x[row], expected[0])
    assert len(seen) > 45
    assert x.is_contiguous(memory_format=torch.channels_last)


def test_augmentation_does_not_depend_on_rank_or_batch(some: Dataset) -> None:
    indices = torch.randperm(200, generator=torch.Generator().manual_seed(2))
    whole, _ = make_batch(some.train, indices, some, augment=(3, 7))
    for world_size in (2, 3, 7):
        for rank in range(world_size):
            part, _ = make_batch(some.train, indices[rank::world_size], some, augment=(3, 7))
            assert torch.equal(part, whole[rank::world_size])
    torch.manual_seed(99)  # no generator has a say
    assert torch.equal(make_batch(some.train, indices, some, augment=(3, 7))[0], whole)
    for other in ((3, 8), (4, 7)):
        assert not torch.equal(make_batch(some.train, indices, some, augment=other)[0], whole)


def chi_squared(counts: np.ndarray) -> float:
    """Standard deviations by which the counts' chi-squared lies off that of a uniform draw."""
    expected = counts.sum() / counts.size
    value, freedom = ((counts - expected) ** 2 / expected).sum(), counts.size - 1
    return abs(value - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("limit", [2, 9, 50])
def test_augmentation_is_uniform_and_independent(limit: int) -> None:
    indices = torch.arange(50_000)
    draws = {
        (seed, epoch): random_below(limit, seed, epoch, indices).numpy()
        for seed in (0, 1, 2**31 - 1)
        for epoch in (0, 1, 2, 1000)
    }
    for draw in draws.values():
        assert draw.min() >= 0 and draw.max() < limit
        assert chi_squared(np.bincount(draw, minlength=limit)) < 5
    first = draws[0, 0]
    pairs = [(first[:-1], first[1:])] + [
        (first, draw) for key, draw in draws.items() if key != (0, 0)
    ]
    for a, b in pairs:  # one image and the next, one epoch or seed and another
        assert chi_squared(np.bincount(a * limit + b, minlength=limit**2)) < 5
    # One image over many epochs.
    own = [int(random_below(limit, 0, epoch, torch.tensor([17]))) for epoch in range(4000)]
    assert chi_squared(np.bincount(own, minlength=limit)) < 5


def test_padding_is_black_before_normalisation(some: Dataset) -> None:
    white = torch.full((50, 32, 32, 3), 255, dtype=torch.uint8)
    crops = batch.crop_and_flip(white, torch.arange(50))
    for draw in range(50):
        top, left = draw % 5, draw // 5 % 5
        inside = (32 - abs(top - 2)) * (32 - abs(left - 2))
        assert (crops[draw] == 255).sum() == 3 * inside
        assert (crops[draw] == 0).sum() == 3 * (32 * 32 - inside)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batch_on_a_gpu_equals_the_cpus(some: Dataset) -> None:
    indices = torch.arange(0, 200, 3)
    on_gpu = Split(some.train.images.cuda(), some.train.labels.cuda())
    expected, labels = make_batch(some.train, indices, some, augment=(0, 1))
    for split in (some.train, on_gpu):
        x, y = make_batch(split, indices, some, device="cuda", augment=(0, 1))
        assert x.is_cuda and y.is_cuda and torch.equal(y.cpu(), labels)
        torch.testing.assert_close(x.cpu(), expected)
