"""Checkpoints are atomic and verified, and a whole one is found again."""

import hashlib
import os

import pytest
import torch

from ddp_lib.errors import UserError
from ddp_lib.run_dir import checkpoint_file
from ddp_lib.run_dir.checkpoint_file import Meta
from tests.lab.files import flip_a_bit


def state(step: int) -> dict:
    return {"step": step, "model": {"w": torch.full((50,), float(step))}, "config": {"lr": 0.1}}


def save(folder, step: int) -> None:
    checkpoint_file.save(folder, checkpoint_file.seal(state(step), Meta(1.0, step)))


def newest_step(folder, said=None) -> int:
    payload, meta = checkpoint_file.find(folder, (said if said is not None else []).append)
    assert meta.step == checkpoint_file.from_bytes(payload)["step"]
    return meta.step


def test_an_empty_folder_has_no_checkpoint(tmp_path):
    assert checkpoint_file.find(tmp_path) is None


def test_newest_is_found_and_its_predecessor_kept(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert newest_step(tmp_path) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == [checkpoint_file.PREVIOUS, checkpoint_file.NAME]


def test_torch_loads_the_state_from_the_file(tmp_path):
    save(tmp_path, 4)
    loaded = torch.load(tmp_path / checkpoint_file.NAME, weights_only=True)
    assert loaded.keys() == state(4).keys() and loaded["step"] == 4
    assert torch.equal(loaded["model"]["w"], state(4)["model"]["w"])


def in_old_form(step: int) -> dict:
    """What version 1.0 saved."""
    payload = checkpoint_file.to_bytes({**state(step), "began": 5.0})
    data = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    return {"payload": data, "sha256": hashlib.sha256(payload).hexdigest()}


def test_a_checkpoint_of_the_old_form_is_read(tmp_path):
    torch.save(in_old_form(3), tmp_path / checkpoint_file.NAME)
    assert newest_step(tmp_path) == 3
    assert checkpoint_file.find(tmp_path)[1] == Meta(5.0, 3)


def test_a_damaged_checkpoint_of_the_old_form_is_seen(tmp_path):
    torch.save(in_old_form(3) | {"sha256": "0" * 64}, tmp_path / checkpoint_file.NAME)
    with pytest.raises(UserError, match="digest does not match"):
        checkpoint_file.find(tmp_path)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    path.write_bytes(b"")


def other_file(path):
    torch.save({"weights": torch.ones(3)}, path)


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, empty, other_file])
def test_damaged_newest_is_named_and_the_predecessor_used(tmp_path, damage):
    save(tmp_path, 1)
    save(tmp_path, 2)
    damage(tmp_path / checkpoint_file.NAME)
    said: list[str] = []
    assert newest_step(tmp_path, said) == 1
    assert len(said) == 1 and checkpoint_file.NAME in said[0] and "damaged" in said[0]


def test_every_bit_flip_in_a_small_checkpoint_is_noticed_or_harmless(tmp_path):
    save(tmp_path, 7)
    path = tmp_path / checkpoint_file.NAME
    whole = path.read_bytes()
    want = checkpoint_file.find(tmp_path)
    for at in range(0, len(whole), 61):
        data = bytearray(whole)
        data[at] ^= 1 << (at % 8)
        path.write_bytes(data)
        try:
            assert checkpoint_file.find(tmp_path, lambda line: None) == want
        except UserError as error:
            assert "no whole checkpoint" in str(error)


def test_both_damaged_is_refused_and_nothing_removed(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    for name in (checkpoint_file.NAME, checkpoint_file.PREVIOUS):
        truncate(tmp_path / name)
    with pytest.raises(UserError, match="--resume never"):
        checkpoint_file.find(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_killed_between_the_renames(tmp_path, monkeypatch):
    save(tmp_path, 1)
    real = os.replace

    def replace(source, target):
        if os.path.basename(target) == checkpoint_file.NAME:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2)
    assert newest_step(tmp_path) == 1


def test_a_full_disk_leaves_the_old_one(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def no_space(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(UserError, match="No space left"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert newest_step(tmp_path) == 1
    assert [p.name for p in tmp_path.iterdir()] == [checkpoint_file.NAME]


def test_refuses_what_is_not_weights_only(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.system, ("touch " + str(tmp_path / "ran"),))

    torch.save({"payload": Evil(), "sha256": ""}, tmp_path / checkpoint_file.NAME)
    with pytest.raises(UserError):
        checkpoint_file.find(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_move_aside_keeps_everything(tmp_path):
    (tmp_path / "rank0.jsonl").write_text("x")
    (tmp_path / ".lock").write_text("")
    assert checkpoint_file.move_aside(tmp_path) == tmp_path / "earlier-1"
    assert checkpoint_file.move_aside(tmp_path) is None
    (tmp_path / "rank0.jsonl").write_text("y")
    assert checkpoint_file.move_aside(tmp_path) == tmp_path / "earlier-2"
    assert (tmp_path / "earlier-1" / "rank0.jsonl").read_text() == "x"


def test_load_weights_names_what_is_wrong(tmp_path):
    model = torch.nn.Linear(2, 3)
    with pytest.raises(UserError, match="does not exist"):
        checkpoint_file.load_weights(str(tmp_path / "none.pth"), model)
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint_file.load_weights(str(tmp_path / "text.pth"), model)
    torch.save(torch.nn.Linear(4, 3).state_dict(), tmp_path / "other.pth")
    with pytest.raises(UserError, match="does not fit") as refused:
        checkpoint_file.load_weights(str(tmp_path / "other.pth"), model)
    assert "\n" not in str(refused.value)
