"""What the course makes of a messy script: examples/messy/train_ddp.py, as a reader starts it."""

import re
import subprocess
import sys

import pytest
import torch

from tests.lab.own_script import RUN, TORCHRUN, make_images
from tests.lab.processes import TIMEOUT_S, clean_environment
from tests.lab.project import ROOT

TWO = ("--nproc-per-node", "2")


@pytest.mark.ranks
def test_it_goes_on_under_each_launcher_and_on_another_number_of_ranks(once, tmp_path):
    script = [str(ROOT / "examples" / "messy" / "train_ddp.py"), "--data", str(make_images(once))]
    flags = "--batch-size 12 --workers 1 --epochs".split()
    for epoch, launcher in enumerate(([sys.executable], [*RUN, *TWO], [*TORCHRUN, *TWO]), 1):
        done = subprocess.run(
            [*launcher, *script, *flags, str(epoch)],
            cwd=tmp_path,
            env=clean_environment(),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert re.findall(r"(resuming after epoch \d|epoch \d: loss)", done.stdout) == [
            *([f"resuming after epoch {epoch - 1}"] if epoch > 1 else []),
            f"epoch {epoch}: loss",
        ]
        assert len(re.findall(r"done: \d+ of 31 right", done.stdout)) == 1
    state = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)
    assert state["epoch"] == 3 and not any(name.startswith("module.") for name in state["model"])
