"""What fit refuses, before it touches the run's folder."""

from shutil import copytree, rmtree

import pytest

from ddp_lib import RankError, run_ranks
from tests.lab.images import write_images
from tests.lab.runs import TIMEOUT_S, config, train

pytestmark = pytest.mark.ranks


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lr": 0.01}, "lr: 0.05 -> 0.01"),
        ({"resume": "never"}, None),
        ({"run_dir": "new", "resume": "must"}, "holds no checkpoint"),
        ({"run_dir": "new", "global_batch_size": 1}, "1 is less than one image for each of 2 ranks: take 2"),
        ({"run_dir": "new", "global_batch_size": 1000}, "630"),
        ({"run_dir": "new", "model": "tests.lab.models:nothing"}, "tests.lab.models:nothing"),
        ({"run_dir": "new", "model": "no_such_module:Net"}, "no_such_module"),
        ({"run_dir": "new", "model": "tests.lab.models:needs_an_argument"}, "num_classes"),
        ({"run_dir": "new", "model": "tests.lab.models:not_a_model"}, "torch.nn.Module"),
        ({"run_dir": "new", "init_from": "none.pth"}, "none.pth"),
    ],
)
def test_refused_with_one_line_and_nothing_lost(tmp_path, images_folder, shared_cache, changes, says):
    first = tmp_path / "first"
    run_ranks(train, 2, config(first, images_folder, shared_cache, epochs=1), timeout_s=TIMEOUT_S)
    kept = {p.name: p.read_bytes() for p in first.iterdir() if p.is_file()}
    if "run_dir" in changes:
        changes = changes | {"run_dir": str(tmp_path / changes["run_dir"])}
    settings = config(first, images_folder, shared_cache, **({"epochs": 1} | changes))
    if says is None:  # --resume never starts from the beginning and moves the old run aside
        run_ranks(train, 2, settings, timeout_s=TIMEOUT_S)
        aside = {p.name: p.read_bytes() for p in (first / "earlier-1").iterdir()}
        assert aside == {n: b for n, b in kept.items() if n != ".lock"}
        return
    with pytest.raises(RankError) as refused:
        run_ranks(train, 2, settings, timeout_s=TIMEOUT_S)
    assert says in str(refused.value)
    assert {p.name: p.read_bytes() for p in first.iterdir() if p.is_file()} == kept


def test_a_run_on_other_data_is_refused(tmp_path):
    """Also if the run is finished, and nothing is left to train."""
    images = write_images(tmp_path / "images", train=42, test=9)
    settings = config(tmp_path / "run", images, str(tmp_path / "cache"), epochs=1, global_batch_size=21)
    run_ranks(train, 1, settings, timeout_s=TIMEOUT_S)

    def rename(before: str, after: str) -> None:
        for split in ("train", "test"):
            (images / split / before).rename(images / split / after)

    rename("ant", "wasp")  # now the labels of the others are other classes
    with pytest.raises(RankError, match="holds a run on other data"):
        run_ranks(train, 1, settings, timeout_s=TIMEOUT_S)
    rename("wasp", "ant")
    for split in ("train", "test"):
        copytree(images / split / "ant", images / split / "dog")
    with pytest.raises(RankError, match="holds a run on other data"):
        run_ranks(train, 1, settings, timeout_s=TIMEOUT_S)
    for split in ("train", "test"):
        rmtree(images / split / "dog")
    (images / "train" / "ant" / "0000.png").rename(tmp_path / "taken away.png")
    with pytest.raises(RankError, match="holds a run on other data"):
        run_ranks(train, 1, settings, timeout_s=TIMEOUT_S)


def test_a_second_job_in_the_same_folder_is_refused(tmp_path, images_folder, shared_cache):
    from filelock import FileLock

    settings = config(tmp_path, images_folder, shared_cache)
    with FileLock(tmp_path / ".lock"), pytest.raises(RankError, match="in use by another job"):
        run_ranks(train, 2, settings, timeout_s=TIMEOUT_S)
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]
