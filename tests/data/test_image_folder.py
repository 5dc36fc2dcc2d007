"""A folder of images: any mode and size is read, and what cannot be read is named."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ddp_lib.data.batch import make_batch
from ddp_lib.data.dataset import load_dataset
from tests.lab.datasets import quiet, refusal


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


def test_a_folder_of_images_is_read(tmp_path: Path, folder: Path) -> None:
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


@pytest.mark.parametrize("how", ["rewritten", "swapped", "links swapped"])
def test_a_file_changed_under_the_same_size_and_time_is_seen(tmp_path: Path, folder: Path, how: str) -> None:
    red, blue = (folder / "train" / name / "1.bmp" for name in ("red", "blue"))
    for path, colour in ((red, (1, 2, 3)), (blue, (4, 5, 6))):
        kept = tmp_path / f"{path.parent.name}.bmp" if how == "links swapped" else path
        flat(colour).save(kept)
        os.utime(kept, (1e9, 1e9))
        if kept != path:
            path.symlink_to(kept)
    first = load_dataset(str(folder), tmp_path / "data", log=quiet)
    if how == "rewritten":
        flat((7, 8, 9)).save(red)
        os.utime(red, (1e9, 1e9))
    else:
        red.rename(red.with_name("other"))
        blue.rename(red)
        red.with_name("other").rename(blue)
    assert load_dataset(str(folder), tmp_path / "data", log=quiet).digest != first.digest


def test_what_is_passed_over_is_counted(tmp_path: Path, folder: Path) -> None:
    red = folder / "train" / "red"
    for name in ("a.heic", "b.HEIC", "c.jfif", "no_ending"):
        (red / name).write_bytes(b"photograph")
    (red / "more").mkdir()
    os.mkfifo(red / "pipe.png")
    flat(0, "L").save(folder / "test" / "loose.png")
    for split in ("train", "test"):
        (folder / split / "green").symlink_to(tmp_path / "unplugged")
        (folder / split / "__MACOSX").mkdir()
        (folder / split / "__MACOSX" / "._0.png").write_text("no image")
    said: list[str] = []
    assert len(load_dataset(str(folder), tmp_path / "data", log=said.append).train) == 6
    line = (
        f"data: passed over in {folder}: 2 x .heic file, 1 x .jfif file, 1 x .png file beside the class "
        "folders, 2 x broken link beside the class folders, 1 x file, 1 x folder, 1 x pipe or device"
    )
    assert line in said


@pytest.mark.parametrize("name", ["val", "validation"])
def test_a_folder_for_validation_is_the_test_set(tmp_path: Path, folder: Path, name: str) -> None:
    (folder / "test").rename(folder / name)
    (folder / "test").mkdir()
    flat(0, "L").save(folder / "test" / "without_label.png")
    said: list[str] = []
    assert len(load_dataset(str(folder), tmp_path / "data", log=said.append).test) == 2
    assert f"data: {folder} has no classes in test/: testing on {name}/" in said


def test_all_broken_images_are_named(tmp_path: Path, folder: Path) -> None:
    broken = [folder / split / "red" / "0.png" for split in ("train", "test")]
    for path in broken:
        path.write_bytes(b"")
    tiff = folder / "test" / "blue" / "deep.tiff"
    Image.fromarray(np.full((32, 32), 7, np.int32)).save(tiff)
    line = refusal(str(folder), tmp_path / "data")
    assert line.startswith("3 images cannot be read: ")
    assert all(str(path) in line for path in broken)
    assert f"{tiff} (32-bit pixels from 7 to 7: save them with 8 or 16 bits)" in line
    for path in broken:
        path.unlink()
        path.symlink_to("nowhere.png")
    line = refusal(str(folder), tmp_path / "data")
    assert line.startswith("2 images cannot be read: ") and "0.png (broken link)" in line


@pytest.mark.parametrize("values", [(0.0, 255.0), (-1.0, 1.0), (0.0, float("nan"))])
def test_floating_point_pixels_without_a_known_white_are_refused(
    tmp_path: Path, folder: Path, values: tuple[float, float]
) -> None:
    Image.fromarray(np.array([values], np.float32)).save(folder / "test" / "red" / "x.tiff")
    assert "save them as 0 to 1" in refusal(str(folder), tmp_path / "data")


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
        (flat(30_000, "I;16"), "tiff", (117, 117, 117)),
        (flat(0.4, "F"), "tiff", (102, 102, 102)),
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
    pixels = dataset.test.images[2].to(torch.int64)
    assert pixels.shape == (32, 32, 3)
    assert (pixels - torch.tensor(expected)).abs().max() <= 3
    resized = [line for line in said if "resized" in line]
    assert len(resized) == (0 if image.size == (32, 32) else 1)
    assert all(" 1 " in line for line in resized)


def test_what_pillow_can_read_it_reads_without_a_warning(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 32 * 32 - 1)  # it warns of more, and refuses twice as many
    load_dataset(str(folder), tmp_path / "data", log=quiet)
    assert not recwarn.list


def test_folder_turns_photographs_upright(tmp_path: Path, folder: Path) -> None:
    image = Image.fromarray(np.repeat(np.arange(32, dtype=np.uint8)[:, None] * 8, 32, axis=1))
    exif = Image.Exif()
    exif[0x0112] = 3  # taken upside down
    image.save(folder / "test" / "red" / "z.png", exif=exif)
    pixels = load_dataset(str(folder), tmp_path / "data", log=quiet).test.images[2]
    assert pixels[0, 0, 0] == 248 and pixels[31, 0, 0] == 0


def test_what_is_wrong_with_a_folder_is_named(tmp_path: Path, folder: Path) -> None:
    into = tmp_path / "data"
    line = refusal("cifr10", into)
    assert "'cifr10'" in line and "shapes" in line and "cifar10" in line
    bad = folder / "test" / "red" / "0.png"

    whole = bad.read_bytes()
    for content in (b"", b"no image at all", whole[:60]):
        bad.write_bytes(content)
        assert f"image {bad} cannot be read" in refusal(str(folder), into)
    bad.unlink()
    assert f"class folder {bad.parent} holds no images" in refusal(str(folder), into)
    bad.symlink_to(tmp_path / "gone.png")
    assert str(bad) in refusal(str(folder), into)
    bad.unlink()
    bad.parent.rmdir()
    assert "differ: 'red' only in train" in refusal(str(folder), into)
    (folder / "test" / "Red").mkdir()
    flat(1, "L").save(folder / "test" / "Red" / "0.png")
    assert "'Red' only in test, 'red' only in train" in refusal(str(folder), into)
    (folder / "test").rename(folder / "testing")
    assert f"{folder} has no folder test/" in refusal(str(folder), into)
    cached = list((into / "cache").iterdir()) if (into / "cache").exists() else []
    assert [p for p in cached if p.suffix != ".lock"] == []  # nothing half-made stays


def test_folder_of_one_class_is_refused(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split / "only").mkdir(parents=True)
        flat(1, "L").save(tmp_path / split / "only" / "0.png")
    assert "holds only the class folder 'only': a classifier needs two" in refusal(
        str(tmp_path), tmp_path / "data"
    )


def test_images_of_a_folder_may_have_another_size(tmp_path: Path) -> None:
    """Half red, half blue: the seam stays where it was, and each size has a cache of its own."""
    picture = flat((200, 0, 0), size=(90, 90))
    picture.paste((0, 0, 100), (45, 0, 90, 90))
    for split in ("train", "test"):
        for name in "ab":
            (tmp_path / "pictures" / split / name).mkdir(parents=True)
            picture.save(tmp_path / "pictures" / split / name / "0.png")
    for size in (48, 32, 48):
        dataset = load_dataset(str(tmp_path / "pictures"), tmp_path, log=quiet, image_size=size)
        assert dataset.train.images.shape == (2, size, size, 3)
        assert dataset.train.images[0, 5, [0, -1]].tolist() == [[200, 0, 0], [0, 0, 100]]
        x, _ = make_batch(dataset.train, torch.arange(2), dataset, augment=(0, 1))
        assert x.shape == (2, 3, size, size)


def test_the_built_in_images_have_32_pixels(tmp_path: Path) -> None:
    assert "--image-size 64: the images of --data shapes have 32" in refusal(
        "shapes", tmp_path, image_size=64
    )
