"""What `--precision auto` means is decided once in a run's life."""

import json

import pytest
import torch

import ddp_lib.train
from ddp_lib import World, fit
from ddp_lib.training.optim import pick_precision
from tests.lab.runs import config


@pytest.mark.parametrize(("has_bf16", "best"), [(True, "bf16"), (False, "fp32")])
def test_auto_is_bf16_if_the_gpu_computes_in_it(monkeypatch, has_bf16, best):
    """A GPU that only emulates bf16 is slower with it."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    gpu = torch.device("cuda")
    assert pick_precision("auto", gpu)[0] == best
    assert pick_precision("fp32", gpu) == ("fp32", "asked for")


@pytest.mark.parametrize(("began_with", "then"), [("bf16", "fp32"), ("fp32", "bf16")])
def test_a_resumed_run_keeps_its_precision(
    monkeypatch, tmp_path, images_folder, shared_cache, began_with, then
):
    """As when it goes on at another machine, with another processor."""
    changes = {"precision": "auto", "model": "tests.lab.models:Linear"}
    for epochs, best in ((1, began_with), (2, then)):
        monkeypatch.setattr(ddp_lib.train, "pick_precision", lambda asked, device, best=best: (best, "why"))
        settings = config(tmp_path, images_folder, shared_cache, epochs=epochs, **changes)
        summary = fit(settings, World(device=torch.device("cpu")))
        assert summary["precision"] == began_with
        kept = json.loads((tmp_path / "config.json").read_text())
        assert (kept["precision"], kept["precision_used"]) == ("auto", began_with)
