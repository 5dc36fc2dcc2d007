"""A reader's own script: single.py, and ddp.py, which is the same on several ranks."""

import re
import subprocess
import sys
from difflib import SequenceMatcher

import pytest
import torch

from ddp_lib import World, run_ranks
from tests.lab.images import write_images
from tests.lab.own_script import EXAMPLES, RUN, TORCHRUN, load, make_images
from tests.lab.processes import TIMEOUT_S, clean_environment

RANKS = (1, 2, 3, 4)


@pytest.fixture(scope="module")
def images(once):
    """12 training images, which all of 1 to 4 ranks divide; 31 test images, which none but 1 does."""
    return once("own-script", lambda folder: write_images(folder, train=12, test=31))


def first_gradient(name: str, images, out) -> dict:
    """Each parameter's gradient in the first step, in float64, of a model whose images do not depend on
    each other, and of all training images in one batch."""
    import torch
    from torch import nn
    from torch.optim.optimizer import register_optimizer_step_pre_hook
    from torchvision import datasets, transforms

    script = load(name)
    gradients = {}

    def plain_data(args):
        numbers = transforms.Compose([transforms.ToTensor(), transforms.ConvertImageDtype(torch.float64)])
        return [datasets.ImageFolder(str(args.data / split), numbers) for split in ("train", "test")]

    def plain_model(classes):
        return nn.Sequential(
            nn.Conv2d(3, 4, 5), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 28 * 28, classes)
        ).double()

    def keep(optimizer, *_):
        gradients.update({n: p.grad.clone() for n, p in enumerate(optimizer.param_groups[0]["params"])})

    script.load_data, script.make_model = plain_data, plain_model
    nn.utils.clip_grad_norm_ = lambda *_: None  # which would hide a wrong scale
    hook = register_optimizer_step_pre_hook(keep)
    flags = "--epochs 1 --batch-size 12 --image-size 32 --workers 0 --no-amp".split()
    where = "--run-dir" if name == "ddp_with_pieces" else "--out"
    script.main(["--data", str(images), *flags, where, str(out)])
    hook.remove()
    return {n: gradient.numpy() for n, gradient in gradients.items()}


def counts(name: str, images, weights: str) -> tuple[int, int]:
    """What the script's validation counts for these weights."""
    import torch
    import torch.distributed as dist

    script, device = load(name), torch.device("cpu")
    args = script.parse(["--data", str(images), "--workers", "0", "--batch-size", "12"])
    model = script.make_model(3)
    model.load_state_dict(torch.load(weights, weights_only=True))
    if name == "ddp_with_pieces":
        with World.join() as world:
            _, loader = script.make_loaders(args, world, *script.load_data(args))
            return round(script.validate(model, loader, world) * 31), 31
    if name == "ddp":
        dist.init_process_group("gloo")
    _, loader = script.make_loaders(args, device)
    return script.validate(model, loader, device)


@pytest.mark.ranks
@pytest.mark.parametrize("name", ["ddp", "ddp_with_pieces"])
def test_the_first_gradient_is_that_of_one_process(name, images, tmp_path):
    import numpy as np

    [alone] = run_ranks(first_gradient, 1, "single", images, tmp_path)
    # Five ranks do not divide the twelve images.
    for ranks in (2, 5) if name == "ddp_with_pieces" else (3,):
        for gradients in run_ranks(first_gradient, ranks, name, images, tmp_path / f"{name}{ranks}"):
            for number, gradient in alone.items():
                assert np.abs(gradient).max() > 1e-3
                assert np.abs(gradients[number] - gradient).max() <= 1e-12


@pytest.mark.ranks
@pytest.mark.parametrize("name", ["ddp", "ddp_with_pieces"])
def test_validation_counts_each_image_once_on_any_number_of_ranks(name, images, tmp_path):
    torch.manual_seed(1)
    weights = str(tmp_path / "weights.pth")
    torch.save(load("single").make_model(3).state_dict(), weights)
    [(right, count)] = run_ranks(counts, 1, "single", images, weights)
    assert count == 31
    for ranks in RANKS if name == "ddp" else (1, 3):
        assert run_ranks(counts, ranks, name, images, weights) == [(right, count)] * ranks


def test_every_line_that_ddp_changes_is_marked():
    single, ddp = ((EXAMPLES / f"{name}.py").read_text().splitlines() for name in ("single", "ddp"))
    for kind, _, _, first, last in SequenceMatcher(a=single, b=ddp, autojunk=False).get_opcodes():
        for line in ddp[first:last] if kind != "equal" else []:
            # The text at the top differs too; a line that only stands deeper is the same line.
            same = any(line.strip() == other.strip() for other in single)
            assert "# DDP" in line or same or not line.strip() or ddp.index(line) < 8, line
    unmarked = [re.sub(r"\s*# DDP.*", "", line) for line in ddp if "# DDP" not in line]
    assert len(unmarked) >= 80  # of single.py's lines, that is: most stand as they were


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("name", "launcher"),
    [
        ("single", [sys.executable]),
        ("ddp", [*RUN, "--nproc-per-node", "2"]),
        ("ddp", [*TORCHRUN, "--nproc-per-node", "2"]),
        ("ddp_with_pieces", [sys.executable]),
    ],
)
def test_it_trains_and_saves_the_best_model(name, launcher, once, tmp_path):
    """As a reader starts it, with workers."""
    flags = "--epochs 1 --batch-size 12 --image-size 32 --workers 1".split()
    command = [*launcher, str(EXAMPLES / f"{name}.py"), "--data", str(make_images(once)), *flags]
    done = subprocess.run(
        command, cwd=tmp_path, env=clean_environment(), capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = r"epoch 1: (?:loss \d\.\d{4}, \d+ of 31 right|test accuracy \d+)"
    assert len(re.findall(result, done.stdout)) == 1
    [file] = tmp_path.rglob("best.pth")
    load(name).make_model(3).load_state_dict(torch.load(file, weights_only=True))
