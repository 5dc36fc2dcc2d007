"""Trainings: of somebody's model, on from a damaged folder, and as a program under odd variables."""

import subprocess
import sys
from pathlib import Path
from random import Random
from unittest.mock import patch

import torch
from PIL import Image

from ddp_lib import TrainConfig, World, fit
from ddp_lib.data.dataset import Dataset, Split
from ddp_lib.launch.options import LaunchOptions
from ddp_lib.report.plots import plot_run
from tests.lab.fuzz.commands import draw_environment, draw_flags
from tests.lab.fuzz.images import damage, fill
from tests.lab.fuzz.judge import answered, judge
from tests.lab.fuzz.models import draw_model
from tests.lab.processes import TIMEOUT_S, TRAIN, clean_environment


def tiny_dataset() -> Dataset:
    images = torch.arange(12 * 8 * 8 * 3).remainder(251).to(torch.uint8).view(12, 8, 8, 3)
    split = Split(images, torch.arange(12) % 2)
    return Dataset("tiny", ("a", "b"), split, split, (0.5,) * 3, (0.25,) * 3, "0" * 64)


def try_model(rng: Random, folder: Path) -> None:
    """A model of somebody's, trained for an epoch, and once more: it is then finished."""
    source = draw_model(rng)
    precision = rng.choice(["fp32", "fp32", "auto", "bf16", "fp64"])
    (folder / "own_net.py").write_text(source, encoding="utf-8", errors="surrogateescape")
    config = TrainConfig(
        model="own_net:Net", epochs=1, global_batch_size=4, run_dir=str(folder / "run"), precision=precision,
        accumulate=rng.choice([1, 1, 2]), augment=rng.random() < 0.5, lr=0.01,
    )  # fmt: skip
    with (
        patch.object(sys, "path", [str(folder), *sys.path]),
        patch.object(sys, "dont_write_bytecode", True),
        answered(source, precision),
    ):
        sys.modules.pop("own_net", None)
        first = fit(config, World(), data=tiny_dataset())
        assert fit(config, World(), data=tiny_dataset()) == first


def try_run_folder(rng: Random, folder: Path) -> None:
    """A run's folder, damaged: it is resumed or refused, and plotted or refused."""
    run = folder / "run"
    settings = dict(global_batch_size=4, run_dir=str(run), precision="fp32", model=f"{__name__}:net", lr=0.01)
    fit(TrainConfig(epochs=2, **settings), World(), data=tiny_dataset())
    changed = []
    for path in sorted(run.iterdir()):
        if rng.random() < 0.3:
            damage(rng, path)
            changed.append(path.name)
    if rng.random() < 0.3:
        (run / rng.choice([".lock", ".job", "rank1.jsonl", "rank07.jsonl", "rankx.jsonl"])).write_bytes(
            rng.randbytes(30)
        )
    epochs, resume = rng.choice([1, 2, 3]), rng.choice(["auto", "auto", "must", "never"])
    with answered(changed, epochs, resume):
        fit(TrainConfig(epochs=epochs, resume=resume, **settings), World(), data=tiny_dataset())
    if rng.random() < 0.2:
        with answered(changed, "plot"):
            plot_run(run, folder / "p.png")


def net(num_classes: int) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(num_classes))


def try_start(rng: Random, folder: Path) -> None:
    """A training by ddp-launch as people start it, under some variables; nothing stays behind."""
    for split in ("train", "test"):
        for name in "ab":
            fill(rng, folder / "images" / split / name, 0.0)
            Image.new("L", (8, 8), 9).save(folder / "images" / split / name / "0.png")
    (folder / "tmp").mkdir()
    ours = "RES_OPTIONS=attempts:1 timeout:1".split("=")
    environment = clean_environment() | draw_environment(rng) | dict([ours]) | {"TMPDIR": str(folder / "tmp")}
    words = [
        *TRAIN,
        *draw_flags(rng, LaunchOptions),
        "--nproc-per-node",
        rng.choice("1 2 2 3 cpu gpu 0".split()),
    ]
    words += f"--data images --image-size 10 --epochs 1 --global-batch-size 4 --model {__name__}:net".split()
    words += "--join-timeout-s 2 --timeout-s 10".split()
    done = subprocess.run(
        words, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT_S
    )  # fmt: skip
    out, error = (text.decode(errors="replace") for text in (done.stdout, done.stderr))
    what = (words, environment, out)
    judge(done.returncode, error, what)
    summary = folder / "runs" / "default" / "summary.json"
    assert summary.exists() == (done.returncode == 0) or "torchrun" in out or "usage" in out, what
    assert not any((folder / "tmp").iterdir()), (what, [*(folder / "tmp").iterdir()])
    assert "Traceback" not in out, what
