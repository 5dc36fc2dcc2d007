"""The loop on several real ranks: same images, same losses, same bits."""

import pytest
import torch

from ddp_lib import RankError, read_run, run_ranks
from ddp_lib.report.plots import global_mean
from ddp_lib.run_dir import checkpoint_file
from tests.lab.images import CLASSES
from tests.lab.runs import TIMEOUT_S, config, train

pytestmark = pytest.mark.ranks


@pytest.mark.parametrize("model", ["tests.lab.models:Lively"])
def test_same_images_on_any_number_of_ranks(tmp_path, images_folder, shared_cache, model):
    seen = {}
    for ranks in (1, 2, 3, 7):
        folder = tmp_path / str(ranks)
        (summary, *_) = run_ranks(
            train,
            ranks,
            config(folder, images_folder, shared_cache, epochs=1, model=model),
            timeout_s=TIMEOUT_S,
        )
        assert summary["world_size"] == ranks
        assert summary["test_images"] == 131
        assert summary["classes"] == list(CLASSES) and len(summary["mean"]) == len(summary["std"]) == 3
        assert len(set(summary["weights_sha256"])) == 1
        assert len(summary["weights_sha256"]) == ranks
        log = read_run(folder)
        assert sorted(log["rank"].unique()) == list(range(ranks))
        seen[ranks] = log.groupby("step")["samples"].sum().tolist()
    assert seen[1] == seen[2] == seen[3] == seen[7] == [210, 210, 210]


def count_right(weights: str, images: str, cache: str, model: str) -> tuple[int, int]:
    from ddp_lib import World, evaluate
    from ddp_lib.data.dataset import load_dataset
    from ddp_lib.model import build_model
    from ddp_lib.run_dir.checkpoint_file import load_weights

    data = load_dataset(images, cache)
    net = build_model(model, len(data.classes))
    load_weights(weights, net)
    with World.join() as world:
        result = evaluate(net, data, world, split="train")
    return result.correct, result.images


@pytest.mark.parametrize("model", ["tests.lab.models:Lively", "ddp_lib.model:SimpleModel"])
def test_one_checkpoint_counts_the_same_on_any_number_of_ranks(tmp_path, images_folder, shared_cache, model):
    settings = config(tmp_path, images_folder, shared_cache, epochs=1, model=model)
    run_ranks(train, 2, settings, timeout_s=TIMEOUT_S)
    weights = str(tmp_path / "cifar_net.pth")
    counts = {
        ranks: run_ranks(
            count_right,
            ranks,
            weights,
            str(images_folder),
            shared_cache,
            model,
            timeout_s=TIMEOUT_S,
        )
        for ranks in (1, 2, 3, 7)
    }
    every = {count for answers in counts.values() for count in answers}
    assert len(every) == 1
    correct, images = every.pop()
    assert images == 630 and 0 < correct < 630


def test_losses_agree_step_by_step_in_float64(tmp_path, images_folder, shared_cache):
    """The mean over the images of all ranks is the loss of the whole batch, 50 steps long; 7 ranks do not
    divide the batch."""
    losses = {}
    for ranks in (1, 2, 4, 7):
        folder = tmp_path / str(ranks)
        settings = config(
            folder,
            images_folder,
            shared_cache,
            epochs=10,
            global_batch_size=120,
            precision="fp64",
            momentum=0.9,
        )
        run_ranks(train, ranks, settings, timeout_s=TIMEOUT_S)
        log = read_run(folder)
        losses[ranks] = torch.tensor(global_mean(log).tolist(), dtype=torch.double)
        assert len(losses[ranks]) == 50
    assert losses[1].std() > 1e-3  # something was learned
    assert (losses[1] - losses[2]).abs().max() < 1e-9
    assert (losses[1] - losses[4]).abs().max() < 1e-9
    assert (losses[1] - losses[7]).abs().max() < 1e-9


def test_accumulating_gradients_changes_nothing(tmp_path, images_folder, shared_cache):
    ends = {}
    for parts in (1, 4):  # neither the ranks nor the micro-batches divide 209 images
        folder = tmp_path / str(parts)
        changes = {"precision": "fp64", "accumulate": parts, "epochs": 1, "global_batch_size": 209}
        settings = config(folder, images_folder, shared_cache, **changes)
        run_ranks(train, 2, settings, timeout_s=TIMEOUT_S)
        ends[parts] = torch.load(folder / "cifar_net.pth", weights_only=True)
    for name, value in ends[1].items():
        torch.testing.assert_close(value, ends[4][name], rtol=0, atol=1e-9)


@pytest.mark.parametrize("lag", [0, 1])
def test_two_runs_of_one_config_have_the_same_bits(tmp_path, images_folder, shared_cache, lag):
    """Also if the second run reads its losses one step late, as on a GPU."""
    for name, how in (("a", 0), ("b", lag)):
        settings = config(tmp_path / name, images_folder, shared_cache, model="tests.lab.models:Lively")
        run_ranks(train, 2, settings, -1, how, timeout_s=TIMEOUT_S)
    first, second = ((tmp_path / n / "cifar_net.pth").read_bytes() for n in ("a", "b"))
    assert first == second
    same = ["rank", "epoch", "step", "samples", "loss", "lr"]
    assert read_run(tmp_path / "a")[same].equals(read_run(tmp_path / "b")[same])


@pytest.mark.parametrize("lag", [0, 1])
def test_a_loss_that_is_not_finite_stops_all_ranks(tmp_path, images_folder, shared_cache, lag):
    """Before the next checkpoint, so that the last one stands."""
    changes = {"model": "tests.lab.models:Explodes", "checkpoint_every_s": 1e-9}
    settings = config(tmp_path, images_folder, shared_cache, **changes)
    with pytest.raises(RankError, match="loss of rank 1 is not finite at step 2"):
        run_ranks(train, 2, settings, -1, lag, timeout_s=TIMEOUT_S)
    assert not (tmp_path / "cifar_net.pth").exists()
    kept = checkpoint_file.find(tmp_path, print)
    assert kept is not None and kept[1].step == 2


def test_further_training_from_given_weights(tmp_path, images_folder, shared_cache):
    first = config(tmp_path / "one", images_folder, shared_cache, epochs=1)
    run_ranks(train, 2, first, timeout_s=TIMEOUT_S)
    second = config(
        tmp_path / "two",
        images_folder,
        shared_cache,
        epochs=1,
        init_from=str(tmp_path / "one" / "cifar_net.pth"),
        lr=1e-12,
    )
    run_ranks(train, 2, second, timeout_s=TIMEOUT_S)
    ends = [torch.load(tmp_path / n / "cifar_net.pth", weights_only=True) for n in ("one", "two")]
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=0, atol=1e-8)
