"""The log for other programs. Stand-ins take their place: neither is installed here."""

import sys
from types import SimpleNamespace

import pytest

from ddp_lib import RunLog
from ddp_lib.errors import UserError


@pytest.fixture
def calls(monkeypatch):
    """What the stand-ins were called with, in order."""
    calls = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            calls.append(("open", folder.rpartition("/")[2], purge_step))

        def add_scalar(self, name, value, step):
            calls.append((name, value, step))

        def close(self):
            calls.append(("close",))

    def init(**settings):
        calls.append(("open", settings["name"], settings["mode"]))
        return SimpleNamespace(
            log=lambda numbers, step: calls.extend((name, value, step) for name, value in numbers.items()),
            finish=lambda: calls.append(("close",)),
        )

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    return calls


@pytest.mark.parametrize(("program", "opened"), [("tensorboard", 5), ("wandb", "offline")])
def test_each_rank_has_a_file_of_its_own(tmp_path, calls, program, opened):
    with RunLog(tmp_path, 1, program) as log:
        log.start(step=5)
        log.step(0, 5, samples=2, loss=1.5, lr=0.1, data_s=0.25, step_s=0.5)
        log.digest(6, "a")
        log.epoch(0, 6, test_accuracy=0.75, test_correct=3)
        log.end(6, "finished")
    assert calls == [
        ("open", "rank1", opened),
        *[("loss", 1.5, 5), ("lr", 0.1, 5), ("data_s", 0.25, 5), ("step_s", 0.5, 5)],
        ("test_accuracy", 0.75, 6),
        ("close",),
    ]


@pytest.mark.parametrize(
    ("program", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")]
)
def test_what_is_not_installed_is_named_in_one_line(tmp_path, monkeypatch, program, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"--export {program}: {program} is not installed: pip install"):
        RunLog(tmp_path, 0, program)
    RunLog(tmp_path, 0)
