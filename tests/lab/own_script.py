"""Scripts that tests start with `ddp-launch run`: the beginning of a plain one, and examples/own_script."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from ddp_lib import run_ranks
from tests.lab.images import write_images
from tests.lab.once import Once
from tests.lab.processes import TIMEOUT_S
from tests.lab.project import ROOT

EXAMPLES = ROOT / "examples" / "own_script"
RUN = (sys.executable, "-m", "ddp_lib.launch", "run")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")
STEPS = 10

# A plain script; `join` makes the process group, `note` leaves a file beside the script.
START = """
import json, os, signal, sys, time
from datetime import timedelta
from pathlib import Path
rank = int(os.environ["RANK"])
def note(name, text=""):
    path = Path(__file__).parent / f"{name}{rank}"
    path.with_suffix(".new").write_text(text)
    path.with_suffix(".new").replace(path)
def join(seconds=20):
    global torch, dist
    import torch
    import torch.distributed as dist
    dist.init_process_group("gloo", timeout=timedelta(seconds=seconds))
def step():
    tensor = torch.ones(2)
    dist.all_reduce(tensor)
    return tensor
"""


def load(name: str) -> ModuleType:
    """An example, as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_images(once: Once) -> Path:
    """Five steps per epoch of batches of 12."""
    return once("own-script-60", lambda folder: write_images(folder, train=60, test=31))


def pieces(images: Path, run_dir: Path) -> list[str]:
    """ddp_with_pieces.py and its flags, for a run of STEPS steps."""
    flags = "--epochs 2 --batch-size 12 --image-size 32 --workers 1 --checkpoint-every 2".split()
    script = EXAMPLES / "ddp_with_pieces.py"
    return [str(script), "--data", str(images), "--run-dir", str(run_dir), *flags]


def run_pieces(flags: list[str]) -> None:
    # Without workers, which cannot import a script that was loaded from its file.
    load("ddp_with_pieces").main([*flags, "--workers", "0"])


def make_unbroken_run(once: Once) -> Path:
    """The folder of that run, on two ranks of one machine, from beginning to end."""

    def make(folder: Path) -> None:
        run_ranks(run_pieces, 2, pieces(make_images(once), folder)[1:], timeout_s=TIMEOUT_S)

    return once("own-script-run", make)


def steps_logged(run_dir: Path, rank: int = 1) -> int:
    log = run_dir / f"rank{rank}.jsonl"
    return log.read_text().count('"loss"') if log.exists() else 0


def weights_of(run_dir: Path) -> bytes:
    """The model's bytes at the end of the run."""
    import torch

    state = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    assert state["step"] == STEPS
    return b"".join(value.numpy().tobytes() for value in state["model"].values())
