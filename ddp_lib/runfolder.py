"""A run's folder: one job at a time, where it left off, and what it ends with."""

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from ddp_lib import checkpoint
from ddp_lib.config import TrainConfig
from ddp_lib.errors import UserError
from ddp_lib.meeting import versions
from ddp_lib.world import World

SUMMARY = "summary.json"
WEIGHTS = "cifar_net.pth"
CONTAINER = "DDP_LIB_CONTAINER"  # set by our image


@dataclass(frozen=True)
class Run:
    """folder: this machine's copy of it; resumed: the checkpoint to go on from; finished: the
    summary of a run that has nothing left to do."""

    folder: Path
    resumed: dict[str, Any] | None
    finished: dict[str, Any] | None


def warn_of_loss(config: TrainConfig, world: World) -> None:
    """Rank 0 says so where the run's folder is inside a container, and not on a volume of it."""
    folder = Path(config.run_dir).resolve()
    if world.is_main and CONTAINER in os.environ and not _on_a_mount(folder):
        world.say(
            f"{folder} lies inside this container: with --rm the model will be lost; "
            f"keep it with -v FOLDER_OF_YOURS:{folder.parent}"
        )


def _on_a_mount(folder: Path) -> bool:
    import psutil

    mounts = {Path(one.mountpoint) for one in psutil.disk_partitions(all=True)}
    return bool(mounts & {folder, *folder.parents} - {Path("/")})


@contextmanager
def open_run(config: TrainConfig, world: World, total_steps: int) -> Iterator[Run]:
    """Opens the run's folder for this job on every rank; rank 0 decides, the others follow.

    UserError on every rank: another job has the folder; its checkpoint is of another configuration
    (--resume auto); there is none (--resume must); it cannot be written.
    """
    folder = Path(config.run_dir)
    payload = b""

    def decide() -> dict[str, Any]:
        nonlocal payload
        _make(folder)
        _lock(folder, stack)
        found = _find_start(config, folder, world)
        if found is not None:
            payload = found
            if _is_finished(checkpoint.from_bytes(found), folder, total_steps):
                return {"finished": json.loads((folder / SUMMARY).read_text())}
        text = json.dumps({**config.as_dict(), "versions": versions()}, indent=2) + "\n"
        checkpoint.write_atomic(folder / "config.json", text.encode())
        return {"resume": found is not None}

    with ExitStack() as stack:
        plan = world.from_main("start", decide, config.data_timeout_s)
        _make(folder)
        resumed = None
        if plan.get("resume"):
            # From rank 0's file to all: other machines need not share its disk.
            resumed = checkpoint.from_bytes(world.broadcast_bytes(payload))
            world.say(f"resuming {folder} at step {resumed['step']} of {total_steps}")
        yield Run(folder, resumed, plan.get("finished"))


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--run-dir {str(folder)!r} cannot be made ({error.strerror}): name a folder that this "
            "user can write"
        ) from None


def _lock(folder: Path, stack: ExitStack) -> None:
    try:
        stack.enter_context(FileLock(folder / ".lock", timeout=0))
    except Timeout:
        raise UserError(
            f"--run-dir {str(folder)!r} is in use by another job: wait for it, or name another folder"
        ) from None
    except OSError as error:
        raise UserError(
            f"--run-dir {str(folder)!r} cannot be written ({error.strerror}): name a folder that "
            "this user can write"
        ) from None


def _find_start(config: TrainConfig, folder: Path, world: World) -> bytes | None:
    """The bytes of the checkpoint to resume from, or None for a fresh start."""
    if config.resume == "never":
        moved = checkpoint.move_aside(folder)
        if moved is not None:
            world.say(f"--resume never: what {folder} held is now in {moved}")
        return None
    found = checkpoint.find(folder, world.say)
    if found is None:
        if config.resume == "must":
            raise UserError(
                f"--resume must: {folder} holds no checkpoint; check --run-dir, or use --resume auto"
            )
        return None
    differences = config.differences(checkpoint.from_bytes(found)["config"])
    if differences:
        raise UserError(
            f"{folder} holds a run of another configuration ({'; '.join(differences)}): "
            "name another --run-dir, give the same flags, or --resume never to start anew"
        )
    return found


def _is_finished(state: dict[str, Any], folder: Path, total_steps: int) -> bool:
    return (
        state["step"] >= total_steps and (folder / SUMMARY).exists() and (folder / WEIGHTS).exists()
    )


def write_results(folder: Path, weights: dict[str, torch.Tensor], summary: dict[str, Any]) -> None:
    """The trained model, then the summary: a run with a summary has its model too."""
    checkpoint.write_atomic(folder / WEIGHTS, checkpoint.to_bytes(weights))
    text = json.dumps(summary, indent=2) + "\n"
    checkpoint.write_atomic(folder / SUMMARY, text.encode())
