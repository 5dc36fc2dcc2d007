"""A run that was killed goes on, and ends with the same bits."""

import json
from pathlib import Path

import pytest

from ddp_lib import RankError, TrainConfig, read_run, run_ranks
from ddp_lib.run_dir import checkpoint_file
from tests.lab.runs import TIMEOUT_S, config, train

pytestmark = pytest.mark.ranks


def killed_and_resumed(folder: Path, settings, ranks: int, step: int, lose_optimizer=False) -> bytes:
    with pytest.raises(RankError, match="SIGKILL"):
        run_ranks(train, ranks, settings, step, timeout_s=TIMEOUT_S)
    assert not (folder / "cifar_net.pth").exists()
    if lose_optimizer:
        payload, meta = checkpoint_file.find(folder)
        state = checkpoint_file.from_bytes(payload)
        state["optimizer"]["state"] = {}
        checkpoint_file.save(folder, checkpoint_file.seal(state, meta))
    run_ranks(train, ranks, settings, timeout_s=TIMEOUT_S)
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

    run_ranks(train, ranks, settings("unbroken"), timeout_s=TIMEOUT_S)
    unbroken = (tmp_path / "unbroken" / "cifar_net.pth").read_bytes()
    for step in (3, 4, 5, 7, 8, 10, 12, 13, 16, 17):
        name = f"killed{step}"
        got = killed_and_resumed(tmp_path / name, settings(name), ranks, step)
        assert got == unbroken, f"killed in step {step}"
    lost = killed_and_resumed(tmp_path / "lost", settings("lost"), ranks, 8, lose_optimizer=True)
    assert lost != unbroken  # the control: the optimizer's state matters, and the test sees it


@pytest.mark.parametrize("lag", [0, 1])
def test_killed_between_checkpoints_within_an_epoch(tmp_path, images_folder, shared_cache, lag):
    """With a checkpoint at every step (at every second one if the host reads the losses one step late),
    a resumed run starts in the middle of an epoch."""
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
                run_ranks(train, 2, settings, die_at, lag, timeout_s=TIMEOUT_S)
        run_ranks(train, 2, settings, -1, lag, timeout_s=TIMEOUT_S)
        results[name] = (tmp_path / name / "cifar_net.pth").read_bytes()
    log = read_run(tmp_path / "killed", superseded=True)
    assert log[log["start"] == 1]["step"].min() == 5
    assert results["whole"] == results["killed"]


def test_finished_then_more_epochs(tmp_path, images_folder, shared_cache):
    settings = config(tmp_path, images_folder, shared_cache, epochs=1)
    first = run_ranks(train, 2, settings, timeout_s=TIMEOUT_S)[0]
    before = (tmp_path / "rank0.jsonl").read_text()
    assert run_ranks(train, 2, settings, timeout_s=TIMEOUT_S)[0] == first
    assert (tmp_path / "rank0.jsonl").read_text() == before
    more = config(tmp_path, images_folder, shared_cache, epochs=2)
    assert run_ranks(train, 2, more, timeout_s=TIMEOUT_S)[0]["steps"] == 6
    assert read_run(tmp_path)["step"].max() == 5
    assert json.loads((tmp_path / "summary.json").read_text())["epochs"] == 2


def test_killed_between_an_epochs_checkpoint_and_its_test(tmp_path, images_folder, shared_cache):
    """The test's line and the last epoch's loss are written at the next start."""

    def lose_the_test(epoch: int) -> list:
        """Leaves what such a kill leaves; returns the lost line."""
        (tmp_path / "summary.json").unlink(missing_ok=True)
        log = tmp_path / "rank0.jsonl"
        lines = log.read_text().splitlines(keepends=True)
        lost = [
            n for n, line in enumerate(lines) if '"event": "epoch"' in line and f'"epoch": {epoch}' in line
        ]
        log.write_text("".join(lines[: lost[0]]))
        return [json.loads(lines[lost[0]])[name] for name in ("epoch", "test_accuracy", "train_loss")]

    settings = config(tmp_path, images_folder, shared_cache)
    whole = run_ranks(train, 2, settings, timeout_s=TIMEOUT_S)[0]
    lost = lose_the_test(1)
    again = run_ranks(train, 2, settings, timeout_s=TIMEOUT_S)[0]
    assert again == whole
    assert lose_the_test(1) == lost
    assert lost[-1] is not None
