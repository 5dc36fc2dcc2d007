"""The loop on several real ranks: same images, same losses, same bits."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ddp_lib import RankError, TrainConfig, read_run, run_ranks
from ddp_lib.run_dir import checkpoint
from tests.lab.project import ROOT
from tests.lab.runs import LIMIT_S, config, train

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
            timeout_s=LIMIT_S,
        )
        assert summary["world_size"] == ranks
        assert summary["test_images"] == 131
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
    from ddp_lib.run_dir.checkpoint import load_weights

    data = load_dataset(images, cache)
    net = build_model(model, len(data.classes))
    load_weights(weights, net)
    with World.join() as world:
        result = evaluate(net, data, world, split="train")
    return result.correct, result.images


@pytest.mark.parametrize("model", ["tests.lab.models:Lively", "ddp_lib.model:SimpleModel"])
def test_one_checkpoint_counts_the_same_on_any_number_of_ranks(
    tmp_path, images_folder, shared_cache, model
):
    settings = config(tmp_path, images_folder, shared_cache, epochs=1, model=model)
    run_ranks(train, 2, settings, timeout_s=LIMIT_S)
    weights = str(tmp_path / "cifar_net.pth")
    counts = {
        ranks: run_ranks(
            count_right, ranks, weights, str(images_folder), shared_cache, model, timeout_s=LIMIT_S
        )
        for ranks in (1, 2, 3, 7)
    }
    every = {one for answers in counts.values() for one in answers}
    assert len(every) == 1
    correct, images = every.pop()
    assert images == 630 and 0 < correct < 630


def test_losses_agree_step_by_step_in_float64(tmp_path, images_folder, shared_cache):
    """The mean over the ranks of their losses is the loss of the whole batch, 50 steps long."""
    losses = {}
    for ranks in (1, 2, 4):
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
        run_ranks(train, ranks, settings, timeout_s=LIMIT_S)
        log = read_run(folder)
        losses[ranks] = torch.tensor(
            log.groupby("step")["loss"].mean().tolist(), dtype=torch.double
        )
        assert len(losses[ranks]) == 50
    assert losses[1].std() > 1e-3  # something was learned
    assert (losses[1] - losses[2]).abs().max() < 1e-9
    assert (losses[1] - losses[4]).abs().max() < 1e-9


def test_accumulating_gradients_changes_nothing(tmp_path, images_folder, shared_cache):
    ends = {}
    for parts in (1, 3):
        folder = tmp_path / str(parts)
        settings = config(
            folder, images_folder, shared_cache, precision="fp64", accumulate=parts, epochs=1
        )
        run_ranks(train, 2, settings, timeout_s=LIMIT_S)
        ends[parts] = torch.load(folder / "cifar_net.pth", weights_only=True)
    for name, value in ends[1].items():
        torch.testing.assert_close(value, ends[3][name], rtol=0, atol=1e-9)


@pytest.mark.parametrize("behind", [0, 1])
def test_two_runs_of_one_config_have_the_same_bits(tmp_path, images_folder, shared_cache, behind):
    """Also where the second reads its losses a step behind, as on a GPU."""
    for name, how in (("a", 0), ("b", behind)):
        settings = config(
            tmp_path / name, images_folder, shared_cache, model="tests.lab.models:Lively"
        )
        run_ranks(train, 2, settings, -1, False, how, timeout_s=LIMIT_S)
    first, second = ((tmp_path / n / "cifar_net.pth").read_bytes() for n in ("a", "b"))
    assert first == second
    same = ["rank", "epoch", "step", "samples", "loss", "lr"]
    assert read_run(tmp_path / "a")[same].equals(read_run(tmp_path / "b")[same])


STEPS = 3 * 6  # three steps an epoch, six epochs


def killed_and_resumed(folder: Path, settings, ranks: int, step: int, **how) -> bytes:
    with pytest.raises(RankError, match="SIGKILL"):
        run_ranks(train, ranks, settings, step, timeout_s=LIMIT_S)
    assert not (folder / "cifar_net.pth").exists()
    run_ranks(train, ranks, settings, -1, how.get("lose_optimizer", False), timeout_s=LIMIT_S)
    log = read_run(folder, superseded=True)
    again = log[(log["rank"] == 0) & (log["start"] == 1)]["step"]
    last_checkpoint = step // 3 * 3  # one is written at each epoch's end
    assert again.min() == last_checkpoint
    assert last_checkpoint > 0
    return (folder / "cifar_net.pth").read_bytes()


@pytest.mark.parametrize("ranks", [2, 4])
def test_killed_and_resumed_ends_with_the_same_bits(tmp_path, images_folder, shared_cache, ranks):
    def settings(name: str) -> TrainConfig:
        return config(
            tmp_path / name,
            images_folder,
            shared_cache,
            epochs=6,
            model="tests.lab.models:Lively",
            global_batch_size=208,
        )

    run_ranks(train, ranks, settings("unbroken"), timeout_s=LIMIT_S)
    unbroken = (tmp_path / "unbroken" / "cifar_net.pth").read_bytes()
    for step in (3, 4, 5, 7, 8, 10, 12, 13, 16, 17):
        name = f"killed{step}"
        got = killed_and_resumed(tmp_path / name, settings(name), ranks, step)
        assert got == unbroken, f"killed in step {step}"
    lost = killed_and_resumed(tmp_path / "lost", settings("lost"), ranks, 8, lose_optimizer=True)
    assert lost != unbroken  # the control: the optimizer's state matters, and the test sees it


@pytest.mark.parametrize("behind", [0, 1])
def test_killed_between_checkpoints_within_an_epoch(tmp_path, images_folder, shared_cache, behind):
    """With a checkpoint at every step (or every second, where the host reads a step behind), a
    resumed run starts in the middle of an epoch."""
    results = {}
    for name, die_at in (("whole", -1), ("killed", 5)):
        settings = config(
            tmp_path / name,
            images_folder,
            shared_cache,
            model="tests.lab.models:Lively",
            checkpoint_every_s=1e-9,
        )
        if die_at >= 0:
            with pytest.raises(RankError, match="SIGKILL"):
                run_ranks(train, 2, settings, die_at, False, behind, timeout_s=LIMIT_S)
        run_ranks(train, 2, settings, -1, False, behind, timeout_s=LIMIT_S)
        results[name] = (tmp_path / name / "cifar_net.pth").read_bytes()
    log = read_run(tmp_path / "killed", superseded=True)
    assert log[log["start"] == 1]["step"].min() == 5
    assert results["whole"] == results["killed"]


@pytest.mark.parametrize("behind", [0, 1])
def test_a_loss_that_is_not_finite_stops_all_ranks(tmp_path, images_folder, shared_cache, behind):
    """Before the next checkpoint, so that the last one stands."""
    changes = {"model": "tests.lab.models:Explodes", "checkpoint_every_s": 1e-9}
    settings = config(tmp_path, images_folder, shared_cache, **changes)
    with pytest.raises(RankError, match="loss of rank 1 is not finite at step 2"):
        run_ranks(train, 2, settings, -1, False, behind, timeout_s=LIMIT_S)
    assert not (tmp_path / "cifar_net.pth").exists()
    kept = checkpoint.find(tmp_path, print)
    assert kept is not None and checkpoint.from_bytes(kept)["step"] == 2


@pytest.mark.parametrize("compiler", ["", "no-such-compiler"])
def test_a_compiled_model_trains_alike_or_says_what_is_missing(
    tmp_path, images_folder, shared_cache, compiler
):
    flags = f"--data {images_folder} --data-dir {shared_cache} --model tests.lab.models:Plain --epochs 1"
    flags += " --global-batch-size 210 --precision fp64"
    environ = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    if compiler:
        environ["CXX"] = compiler
    elif not shutil.which("g++"):
        pytest.skip("no C++ compiler here: apt install g++")
    ends = []
    for compiled in ("False", "True"):
        command = [sys.executable, "-m", "ddp_lib.train", *flags.split(), "--compile", compiled]
        command += ["--run-dir", str(tmp_path / compiled)]
        done = subprocess.run(
            command,
            env=environ,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=400,
        )
        if compiler and compiled == "True":
            (line,) = done.stderr.splitlines()
            assert "--compile True" in line and "install a C++ compiler" in line
            assert done.returncode == 2
            return
        assert done.returncode == 0, done.stderr
        ends.append(torch.load(tmp_path / compiled / "cifar_net.pth", weights_only=True))
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=0, atol=1e-9)


def test_finished_then_more_epochs(tmp_path, images_folder, shared_cache):
    settings = config(tmp_path, images_folder, shared_cache, epochs=1)
    first = run_ranks(train, 2, settings, timeout_s=LIMIT_S)[0]
    before = (tmp_path / "rank0.jsonl").read_text()
    assert run_ranks(train, 2, settings, timeout_s=LIMIT_S)[0] == first
    assert (tmp_path / "rank0.jsonl").read_text() == before
    more = config(tmp_path, images_folder, shared_cache, epochs=2)
    assert run_ranks(train, 2, more, timeout_s=LIMIT_S)[0]["steps"] == 6
    assert read_run(tmp_path)["step"].max() == 5
    assert json.loads((tmp_path / "summary.json").read_text())["epochs"] == 2


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lr": 0.01}, "lr: 0.05 -> 0.01"),
        ({"resume": "never"}, None),
        ({"run_dir": "new", "resume": "must"}, "holds no checkpoint"),
        ({"run_dir": "new", "global_batch_size": 211}, "211 does not divide by 2 ranks"),
        ({"run_dir": "new", "global_batch_size": 1000}, "630"),
        ({"run_dir": "new", "model": "tests.lab.models:nothing"}, "tests.lab.models:nothing"),
        ({"run_dir": "new", "model": "no_such_module:Net"}, "no_such_module"),
        ({"run_dir": "new", "model": "tests.lab.models:needs_an_argument"}, "num_classes"),
        ({"run_dir": "new", "model": "tests.lab.models:not_a_model"}, "torch.nn.Module"),
        ({"run_dir": "new", "init_from": "none.pth"}, "none.pth"),
    ],
)
def test_refused_with_one_line_and_nothing_lost(
    tmp_path, images_folder, shared_cache, changes, says
):
    first = tmp_path / "first"
    run_ranks(train, 2, config(first, images_folder, shared_cache, epochs=1), timeout_s=LIMIT_S)
    kept = {p.name: p.read_bytes() for p in first.iterdir() if p.is_file()}
    if "run_dir" in changes:
        changes = changes | {"run_dir": str(tmp_path / changes["run_dir"])}
    settings = config(first, images_folder, shared_cache, **({"epochs": 1} | changes))
    if says is None:  # --resume never starts anew and keeps the old run aside
        run_ranks(train, 2, settings, timeout_s=LIMIT_S)
        aside = {p.name: p.read_bytes() for p in (first / "earlier-1").iterdir()}
        assert aside == {n: b for n, b in kept.items() if n != ".lock"}
        return
    with pytest.raises(RankError) as refused:
        run_ranks(train, 2, settings, timeout_s=LIMIT_S)
    assert says in str(refused.value)
    assert {p.name: p.read_bytes() for p in first.iterdir() if p.is_file()} == kept


def test_a_run_from_before_a_flag_existed_had_its_default():
    earlier = TrainConfig().as_dict()
    del earlier["compile"]
    assert TrainConfig().differences(earlier) == []
    assert TrainConfig(compile=True).differences(earlier) == ["compile: False -> True"]


def test_a_second_job_in_the_same_folder_is_refused(tmp_path, images_folder, shared_cache):
    from filelock import FileLock

    settings = config(tmp_path, images_folder, shared_cache)
    with FileLock(tmp_path / ".lock"), pytest.raises(RankError, match="in use by another job"):
        run_ranks(train, 2, settings, timeout_s=LIMIT_S)
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]


def test_further_training_from_given_weights(tmp_path, images_folder, shared_cache):
    one = config(tmp_path / "one", images_folder, shared_cache, epochs=1)
    run_ranks(train, 2, one, timeout_s=LIMIT_S)
    two = config(
        tmp_path / "two",
        images_folder,
        shared_cache,
        epochs=1,
        init_from=str(tmp_path / "one" / "cifar_net.pth"),
        lr=1e-12,
    )
    run_ranks(train, 2, two, timeout_s=LIMIT_S)
    ends = [torch.load(tmp_path / n / "cifar_net.pth", weights_only=True) for n in ("one", "two")]
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=0, atol=1e-8)
