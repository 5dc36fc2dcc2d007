"""A decoded data set is kept, checked, and shared by the ranks of a machine."""

import errno
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import filelock
import numpy as np
import pytest
import torch

from ddp_lib.data import cache as caches
from ddp_lib.data import dataset, shapes
from ddp_lib.data.dataset import load_dataset
from ddp_lib.errors import TransientError, UserError
from tests.lab.datasets import quiet, refusal


@pytest.fixture
def few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "TRAIN_IMAGES", 60)
    monkeypatch.setattr(shapes, "TEST_IMAGES", 20)


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


def overwrite(path: Path, position: int, mask: bytes) -> None:
    """Flips the bits of `mask` in one byte, counted from the end."""
    content = bytearray(path.read_bytes())
    content[position] ^= mask[0]
    path.write_bytes(content)


DAMAGE = "cut|zeroed|zeroed header|bit|labels|missing|meta cut|meta zeroed|meta bit|meta missing|older|half"


@pytest.mark.usefixtures("few_shapes")
@pytest.mark.parametrize("damage", DAMAGE.split("|"))
def test_a_damaged_cache_is_made_again(tmp_path: Path, damage: str) -> None:
    first = load_dataset("shapes", tmp_path, log=quiet)
    digest = first.digest
    cache = tmp_path / "cache" / "shapes"
    victim, meta_file = cache / "train_images.npy", cache / "meta.json"
    before = victim.stat()
    match damage:
        case "zeroed":
            victim.write_bytes(bytes(before.st_size))
        case "zeroed header":
            victim.write_bytes(bytes(100) + victim.read_bytes()[100:])
        case "bit":
            overwrite(victim, -500, b"\x80")
        case "labels":
            victim = cache / "test_labels.npy"
            overwrite(victim, -8, b"\x01")
        case "meta zeroed":
            meta_file.write_bytes(bytes(meta_file.stat().st_size))
        case "meta bit":
            text = meta_file.read_text()
            digit = text.index("0.", text.index("mean")) + 3
            meta_file.write_text(text[:digit] + str(int(text[digit]) ^ 1) + text[digit + 1 :])
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
            left = cache.rename(tmp_path / "cache" / ".shapes.abcdefgh")  # by a maker that was killed
            os.utime(left, (0, 0))
    if victim.exists():
        os.utime(victim, ns=(before.st_atime_ns, before.st_mtime_ns))
    again = load_dataset("shapes", tmp_path, log=quiet)
    assert again.digest == digest and again.mean == first.mean
    assert (again.test.labels.numpy() == shapes.make_shapes(20, shapes.TEST_SEED)[1]).all()
    assert (again.train.images.numpy() == shapes.make_shapes(60, shapes.TRAIN_SEED)[0]).all()
    assert sorted(p.name for p in cache.parent.iterdir()) == ["shapes", "shapes.lock"]


@pytest.mark.usefixtures("few_shapes")
@pytest.mark.parametrize("version", ["1.0", "now"])
def test_a_copied_cache_is_read_once_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    first = load_dataset("shapes", tmp_path / "here", log=quiet)
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    meta_file = tmp_path / "there" / "cache" / "shapes" / "meta.json"
    if version == "1.0":
        meta = json.loads(meta_file.read_text())
        del meta["sha256"], meta["files"]
        meta_file.write_text(json.dumps(meta))
    monkeypatch.setattr(shapes, "make_shapes", None)  # not called again
    assert load_dataset("shapes", tmp_path / "there", log=quiet).digest == first.digest
    monkeypatch.setattr("ddp_lib.data.cache._digest", None)  # nor is all read again
    assert load_dataset("shapes", tmp_path / "there", log=quiet).digest == first.digest


def test_waiting_for_another_process_has_a_timeout(tmp_path: Path) -> None:
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


@pytest.mark.usefixtures("few_shapes")
def test_a_full_disk_may_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    monkeypatch.setattr(dataset, "write_cache", full)
    with pytest.raises(TransientError, match="No space left on device"):
        load_dataset("shapes", tmp_path, log=quiet)


def test_two_that_make_it_at_once_without_locks_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, label = np.zeros((1, 8, 8, 3), dtype=np.uint8), np.zeros(1, dtype=np.int64)
    raw, path = caches.RawDataset(("a", "b"), image, label, image, label), tmp_path / "a"
    write_meta, others = caches._write_meta, []

    def write_meanwhile(folder: Path, meta: dict[str, Any]) -> None:
        write_meta(folder, meta)
        if not others:
            others.append("begun")
            others.append(caches.write_cache(path, "it", raw))

    monkeypatch.setattr(caches, "_write_meta", write_meanwhile)
    mine = caches.write_cache(path, "it", raw)
    assert mine["digest"] == others[1]["digest"] and [*tmp_path.iterdir()] == [path]


@pytest.mark.process
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


@pytest.mark.process
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
            resident, proportional, own = map(int, process.stdout.readline().split())
            assert resident > 29_000 and proportional < 0.6 * resident and own == 0
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
