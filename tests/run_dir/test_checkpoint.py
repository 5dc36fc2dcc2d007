"""Checkpoint: any state, saved and loaded by all ranks together, without the package's training."""

import os

import pytest
import torch

from ddp_lib import Checkpoint, RankError, UserError, World, run_ranks
from ddp_lib.run_dir import checkpoint_file
from tests.lab.runs import TIMEOUT_S

ALONE = World()


def some_state(value: float) -> dict:
    return {"weights": {"w": torch.full((3,), value)}, "schedule": [1, 2.5, None, "x"], "counter": 7}


def test_a_state_comes_back_whole(tmp_path):
    with Checkpoint(tmp_path, ALONE) as checkpoint:
        assert checkpoint.load() is None
        checkpoint.save(some_state(1.0))
        checkpoint.save(some_state(2.0))
    with Checkpoint(tmp_path, ALONE) as checkpoint:
        state = checkpoint.load()
        assert checkpoint.step == 1  # the second save
    assert torch.equal(state.pop("weights")["w"], torch.full((3,), 2.0))
    assert state == {"schedule": [1, 2.5, None, "x"], "counter": 7}


def test_the_folder_belongs_to_one_job(tmp_path):
    with Checkpoint(tmp_path, ALONE) as checkpoint:
        checkpoint.load()
        with pytest.raises(UserError, match="in use by another job"), Checkpoint(tmp_path, ALONE):
            pass
    with Checkpoint(tmp_path, ALONE) as checkpoint:
        assert checkpoint.load() is None


def test_other_data_is_refused_with_both_digests(tmp_path):
    with Checkpoint(tmp_path, ALONE, "a" * 64) as checkpoint:
        checkpoint.load()
        checkpoint.save(some_state(1.0))
    with pytest.raises(UserError) as refused, Checkpoint(tmp_path, ALONE, "b" * 64):
        pass
    text = str(refused.value)
    assert "a" * 16 in text and "b" * 16 in text and "--resume never" in text
    with Checkpoint(tmp_path, ALONE, "b" * 64, resume="never") as checkpoint:
        assert checkpoint.load() is None
    assert (tmp_path / "earlier-1" / checkpoint_file.NAME).exists()


def test_never_resumes_when_the_launcher_has_started_the_ranks_again(tmp_path, monkeypatch):
    with Checkpoint(tmp_path, ALONE, resume="never") as checkpoint:
        checkpoint.load()
        checkpoint.save(some_state(1.0))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with Checkpoint(tmp_path, ALONE, resume="never") as checkpoint:
        assert checkpoint.load() is not None
    assert not (tmp_path / "earlier-1").exists()


def test_save_before_load_says_so(tmp_path):
    with (
        pytest.raises(UserError, match=r"call load\(\) first"),
        Checkpoint(tmp_path, ALONE) as checkpoint,
    ):
        checkpoint.save({})


def unlike(folder: str) -> None:
    with World.join() as world, Checkpoint(folder, world, "ab"[world.rank] * 64) as checkpoint:
        checkpoint.load()


@pytest.mark.ranks
def test_ranks_with_other_data_are_named_before_anything_is_written(tmp_path):
    with pytest.raises(RankError, match=r"the data's digest is 'bbbb.*' for rank 1 .* but 'aaaa"):
        run_ranks(unlike, 2, str(tmp_path / "run"), timeout_s=TIMEOUT_S)
    assert not (tmp_path / "run").exists()


def test_a_state_that_could_not_be_read_again_is_refused_at_the_first_save(tmp_path):
    with Checkpoint(tmp_path, ALONE) as checkpoint:
        checkpoint.load()
        with pytest.raises(UserError, match="neither a tensor nor a plain value"):
            checkpoint.save({"args": {"data": tmp_path}})
    assert not (tmp_path / checkpoint_file.NAME).exists()


def test_another_programs_file_is_named(tmp_path):
    torch.save({"epoch": 3}, tmp_path / checkpoint_file.NAME)
    with pytest.raises(UserError, match="no file of Checkpoint"), Checkpoint(tmp_path, ALONE) as checkpoint:
        checkpoint.load()


def counted(folders: list[str], saves: int) -> tuple[float, int, bool]:
    """Each rank alone on a machine, with a disk of its own: what it loads before it saves `saves` times."""
    rank = int(os.environ["RANK"])
    os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    with World.join() as world, Checkpoint(folders[rank], world) as checkpoint:
        state = checkpoint.load() or {"value": torch.tensor(0.0)}
        loaded = state["value"].item()
        for number in range(saves):
            checkpoint.save({"value": torch.tensor(loaded + number + 1)})
        return loaded, checkpoint.step, checkpoint.is_writer


@pytest.mark.ranks
def test_the_newest_state_is_found_on_whichever_machine_it_lies(tmp_path):
    a, b, c = (str(tmp_path / name) for name in "abc")
    assert run_ranks(counted, 2, [a, b], 3, timeout_s=TIMEOUT_S) == [(0.0, 2, True)] * 2
    # Rank 0 moves to an empty machine; the state is on the other one.
    assert run_ranks(counted, 2, [c, b], 1, timeout_s=TIMEOUT_S) == [(3.0, 3, True)] * 2
    # The first machine returns, with an older state.
    assert run_ranks(counted, 2, [a, c], 0, timeout_s=TIMEOUT_S) == [(4.0, 3, True)] * 2
    assert {checkpoint_file.find(tmp_path / name)[1].step for name in "ac"} == {3}


@pytest.mark.ranks
def test_one_rank_per_disk_writes(tmp_path):
    folder = str(tmp_path)
    results = run_ranks(counted, 3, [folder] * 3, 2, timeout_s=TIMEOUT_S)
    assert [writes for _, _, writes in results] == [True, False, False]
