"""Machines that share no disk: each keeps a copy, and none of them is needed to go on.

Each rank is given a folder of its own, as if it were alone on its machine.
"""

import os
import shutil
from pathlib import Path

import pytest
import torch

from ddp_lib import RankError, TrainConfig, read_run, run_ranks
from ddp_lib.run_dir import checkpoint_file
from ddp_lib.run_dir.log import read_events
from tests.lab.files import flip_a_bit
from tests.lab.runs import TIMEOUT_S, config, train

pytestmark = pytest.mark.ranks

EPOCHS, STEPS_PER_EPOCH = 3, 3


def on_machines(settings: TrainConfig, folders: list[str], die_at: int = -1) -> dict:
    """One rank's training, alone on a machine, with the disk that holds `folders[rank]`."""
    import dataclasses

    rank = int(os.environ["RANK"])
    os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", OMP_NUM_THREADS="1")
    return train(dataclasses.replace(settings, run_dir=folders[rank]), die_at)


class Machines:
    """A training whose ranks each see the disk of one of these folders."""

    def __init__(self, tmp_path: Path, images: Path, cache: str) -> None:
        self.settings = config(
            "given later",
            images,
            cache,
            epochs=EPOCHS,
            model="tests.lab.models:Lively",
            global_batch_size=204,
        )
        self.disks = [tmp_path / name for name in "abc"]

    def run(self, *disks: int, die_at: int = -1, epochs: int = EPOCHS, **changes):
        import dataclasses

        settings = dataclasses.replace(self.settings, epochs=epochs, **changes)
        folders = [str(self.disks[disk]) for disk in disks]
        return run_ranks(on_machines, len(disks), settings, folders, die_at, timeout_s=TIMEOUT_S)

    def killed(self, *disks: int, die_at: int) -> None:
        with pytest.raises(RankError, match="SIGKILL"):
            self.run(*disks, die_at=die_at)

    def step_of(self, disk: int) -> int:
        found = checkpoint_file.find(self.disks[disk])
        return found[1].step if found else -1

    def weights(self, disk: int) -> bytes:
        return (self.disks[disk] / "cifar_net.pth").read_bytes()


@pytest.fixture
def machines(tmp_path, images_folder, shared_cache) -> Machines:
    return Machines(tmp_path, images_folder, shared_cache)


@pytest.fixture(scope="module")
def unbroken(once, images_folder, shared_cache) -> bytes:
    """The weights that two ranks end with when nothing happens."""
    folder = once(
        "disks-unbroken",
        lambda folder: Machines(folder, images_folder, shared_cache).run(0, 1),
    )
    return Machines(folder, images_folder, shared_cache).weights(0)


def whole(folder: Path, ranks: int = 2) -> None:
    """Every rank's log in `folder` has each step exactly once."""
    log = read_run(folder)
    for rank in range(ranks):
        assert list(log[log["rank"] == rank]["step"]) == [*range(EPOCHS * STEPS_PER_EPOCH)]


def test_every_disk_has_the_checkpoint_and_the_first_all_logs(machines):
    machines.run(0, 1, 2)
    a, b, c = machines.disks
    whole(a, 3)
    for rank, disk in ((1, b), (2, c)):
        name = f"rank{rank}.jsonl"
        assert (a / name).read_bytes() == (disk / name).read_bytes()
        assert [path.name for path in disk.glob("rank*")] == [name]
        assert not (disk / "cifar_net.pth").exists()
    assert [machines.step_of(disk) for disk in range(3)] == [9, 9, 9]
    first, *others = [checkpoint_file.from_bytes(checkpoint_file.find(disk)[0]) for disk in machines.disks]
    for other in others:  # also BatchNorm's buffers, which are rank 0's
        torch.testing.assert_close(other["model"], first["model"], rtol=0, atol=0)
    ends = read_events(a).query("event == 'end'")
    assert list(ends["rank"]) == [0, 1, 2]


def test_one_disk_shared_by_some_is_written_once(machines):
    machines.run(0, 1, 1)
    a, b, _ = machines.disks
    whole(a, 3)
    assert sorted(path.name for path in b.glob("rank*")) == ["rank1.jsonl", "rank2.jsonl"]
    saved = read_events(a).query("event == 'checkpoint'")
    assert set(saved["rank"]) in ({0, 1}, {0, 2})
    assert [machines.step_of(disk) for disk in (0, 1)] == [9, 9]


@pytest.mark.parametrize("then", [(1, 0), (1, 2), (2, 1), (0, 2)])
def test_ranks_that_change_machines_lose_nothing(machines, unbroken, then):
    """Killed in step 7 on disks a and b; goes on with the roles exchanged, or one disk lost."""
    machines.killed(0, 1, die_at=7)
    assert [machines.step_of(disk) for disk in (0, 1)] == [6, 6]
    for lost in {0, 1} - {*then}:
        shutil.rmtree(machines.disks[lost])
    machines.run(*then)
    assert machines.weights(then[0]) == unbroken
    master = machines.disks[then[0]]
    starts = read_events(master).query("event == 'start' and step == 6")
    assert list(starts["rank"]) == [0, 1]
    log = read_run(master)
    # With disk a the master's log is lost; its copy of the other's reached to the epoch's end.
    kept = range(2) if 0 in then else [1]
    for rank in kept:
        assert list(log[log["rank"] == rank]["step"]) == [*range(9)]


def test_lines_after_the_last_epoch_are_fetched_at_the_next_start(machines):
    machines.killed(0, 1, die_at=7)
    a, b, _ = machines.disks
    assert len((a / "rank1.jsonl").read_bytes()) < len((b / "rank1.jsonl").read_bytes())
    before = (b / "rank1.jsonl").read_bytes()
    machines.run(0, 1)
    copy = (a / "rank1.jsonl").read_bytes()
    assert copy == (b / "rank1.jsonl").read_bytes()
    assert copy.startswith(before)
    again = read_run(a, superseded=True).query("superseded and rank == 1")
    assert list(again["step"]) == [6]  # begun again at 6, killed in 7


def test_a_damaged_copy_costs_nothing_where_another_is_whole(machines, unbroken):
    machines.killed(0, 1, die_at=7)
    flip_a_bit(machines.disks[0] / checkpoint_file.NAME)
    assert machines.step_of(0) == 3  # its predecessor
    machines.run(0, 1)
    assert machines.weights(0) == unbroken
    starts = read_events(machines.disks[0]).query("event == 'start' and start == 1")
    assert list(starts["step"]) == [6, 6]


def test_no_whole_copy_on_one_machine(machines, unbroken, capfd):
    machines.killed(0, 1, die_at=7)
    for name in (checkpoint_file.NAME, checkpoint_file.PREVIOUS):
        os.truncate(machines.disks[1] / name, 100)
    machines.run(0, 1)
    assert "no whole checkpoint" in capfd.readouterr().out
    assert machines.weights(0) == unbroken
    assert machines.step_of(1) == 9


def test_a_machine_without_a_copy_gets_one_at_the_start(machines):
    machines.run(0, 1, epochs=1)
    machines.killed(0, 2, die_at=3)
    assert machines.step_of(2) == 3


def test_what_an_earlier_run_left_on_a_machine_does_not_win(machines, unbroken):
    """Disk b has gone further, but in a run that was begun before the one on disk a."""
    machines.run(1, 2)
    shutil.rmtree(machines.disks[2])
    machines.killed(0, 2, die_at=4)
    machines.run(0, 1)
    assert machines.weights(0) == unbroken
    starts = read_events(machines.disks[0]).query("event == 'start' and start == 1")
    assert list(starts["step"]) == [3, 3]
    whole(machines.disks[0])
    assert (machines.disks[1] / "earlier-1" / "cifar_net.pth").read_bytes() == unbroken


def test_another_job_has_the_folder_of_a_machine_that_is_not_the_master(machines):
    from filelock import FileLock

    a, b, _ = machines.disks
    b.mkdir()
    with FileLock(b / ".lock"), pytest.raises(RankError, match=f"'{b}' is in use by another job"):
        machines.run(0, 1)
    assert [path.name for path in a.iterdir()] == [".lock"]


def test_a_machine_cannot_write_its_folder(machines):
    machines.disks[1].write_text("no folder")
    with pytest.raises(RankError, match=f"'{machines.disks[1]}' cannot be made"):
        machines.run(0, 1)


def test_resume_must_needs_a_checkpoint_and_never_keeps_the_old_run_aside(machines, unbroken):
    with pytest.raises(RankError, match="holds no checkpoint"):
        machines.run(0, 1, resume="must")
    machines.killed(0, 1, die_at=7)
    machines.run(2, 1, resume="must")
    assert machines.weights(2) == unbroken
    machines.run(2, 1, resume="never")
    assert machines.weights(2) == unbroken
    for disk in (1, 2):
        assert (machines.disks[disk] / "earlier-1" / checkpoint_file.NAME).exists()
    assert set(read_events(machines.disks[2]).query("event == 'start'")["start"]) == {0}
