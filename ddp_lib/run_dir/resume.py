"""The run folder of the package's training: decides where to start, and gets the results."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from ddp_lib.config import TrainConfig
from ddp_lib.distributed.coordination import all_gather_results
from ddp_lib.distributed.world import World
from ddp_lib.errors import UserError
from ddp_lib.run_dir.checkpoint import WEIGHTS, Checkpoint
from ddp_lib.run_dir.checkpoint_file import to_bytes, write_atomic
from ddp_lib.run_dir.log import CONFIG, SUMMARY

CONTAINER = "DDP_LIB_CONTAINER"  # set by our image


@dataclass(frozen=True)
class Run:
    """An opened run."""

    named: Path  # the folder, as --run-dir names it
    folder: Path  # the same, absolute: the model may change the working directory
    checkpoint: Checkpoint
    resumed: dict[str, Any] | None  # the state to continue from
    finished: dict[str, Any] | None  # the summary, if nothing is left to do
    precision: str  # of a resumed run the one it began with


@contextmanager
def open_run(
    config: TrainConfig,
    world: World,
    total_steps: int,
    data_digest: str,
    model: Mapping[str, str],
    precision: str,
) -> Iterator[Run]:
    """Opens the run's folder for this job on every rank, and decides where to start.

    model: what `describe_model` returns. precision: what --precision means on rank 0. With `auto`, a resumed
    run keeps that of its checkpoint.

    UserError, on every rank, as Checkpoint raises it, or if a checkpoint, of a finished run too, has another
    configuration or another model (--resume auto).
    """
    folder = Path(config.run_dir)
    warn_if_in_container(folder.resolve(), world)

    def accept(state: dict[str, Any]) -> None:
        if differences := config.differences(state["config"]):
            raise UserError(
                f"{folder} holds a run of another configuration ({'; '.join(differences)}): "
                "name another --run-dir, give the same flags, or --resume never to start again"
            )
        same_python = state.get("versions", {}).get("python") == world.versions["python"]
        # Another Python may write the same source in another way.
        before = describe_model(state["model"], state.get("source", {}) if same_python else {})
        if change := _first_change(before, model):
            raise UserError(
                f"{folder} holds a run of another model ({change}): "
                "undo the change, name another --run-dir, or --resume never to start again"
            )

    timeout_s = config.data_timeout_s
    settings: dict[str, Any] = dict(resume=config.resume, timeout_s=timeout_s, log_sync_s=config.log_sync_s)
    with Checkpoint(folder.absolute(), world, data_digest, **settings) as checkpoint:
        resumed = checkpoint.load(accept)
        if resumed and config.precision == "auto":
            precision = resumed.get("precision", precision)
        finished = checkpoint.copies[0].summary if checkpoint.step >= total_steps else None
        if finished is None:

            def describe() -> None:
                if checkpoint.is_writer:
                    began = {"versions": world.versions, "began": checkpoint.began}
                    began["precision_used"] = precision
                    text = json.dumps(asdict(config) | began, indent=2)
                    write_atomic(folder / CONFIG, f"{text}\n".encode())

            all_gather_results(world, "config", describe, timeout_s)
            if resumed:
                whose = checkpoint.resumed_from()
                world.say(f"resuming {folder} at step {resumed['step']} of {total_steps}{whose}")
        yield Run(folder, folder.absolute(), checkpoint, resumed, finished, precision)


def describe_model(weights: Mapping[str, torch.Tensor], source: Mapping[str, str]) -> dict[str, str]:
    """What must stay equal when a run is resumed: the shape of each of the `weights`, and the digest of each
    module's source."""
    shapes = {name: str(list(value.shape)) for name, value in weights.items()}
    return shapes | {f"the source of {module}": digest for module, digest in source.items()}


def _first_change(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Shapes stand first, so the source is named only if they are equal."""
    knows_source = any(name.startswith("the source of ") for name in before)  # a run of version 1.0 does not
    for name in [*before, *now]:
        old, new = before.get(name, "none"), now.get(name, "none")
        if old != new and (knows_source or not name.startswith("the source of ")):
            return f"{name}: {old} -> {new}"
    return ""


def write_results(folder: Path, weights: dict[str, torch.Tensor], summary: dict[str, Any]) -> None:
    """Writes the model before the summary, so that a run with a summary has its model too."""
    write_atomic(folder / WEIGHTS, to_bytes(weights))
    write_atomic(folder / SUMMARY, f"{json.dumps(summary, indent=2)}\n".encode())


def warn_if_in_container(folder: Path, world: World) -> None:
    """Rank 0 warns if the run's folder is inside a container and not on a volume."""
    if not world.is_main or CONTAINER not in os.environ:
        return
    mounts = {Path(partition.mountpoint) for partition in psutil.disk_partitions(all=True)}
    if not mounts & {folder, *folder.parents} - {Path("/")}:
        world.say(
            f"{folder} lies inside this container: with --rm the model will be lost; "
            f"keep it with -v FOLDER_OF_YOURS:{folder.parent}"
        )
