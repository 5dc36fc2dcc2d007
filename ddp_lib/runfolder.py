"""A run's folder: one job at a time, where it left off, and what it ends with."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ddp_lib import checkpoint
from ddp_lib.config import TrainConfig
from ddp_lib.found import CONFIG, SUMMARY, WEIGHTS, Found, look, newest, put_aside
from ddp_lib.keeper import claim
from ddp_lib.logcopy import LogCopies, level
from ddp_lib.meeting import versions
from ddp_lib.transfer import broadcast_bytes
from ddp_lib.world import World

CONTAINER = "DDP_LIB_CONTAINER"  # set by our image


@dataclass(frozen=True)
class Run:
    """folder: this machine's copy of it; keeps: whether this rank writes the checkpoint there;
    began: when the run first started (Unix time), its identity; resumed: the checkpoint to go on
    from; finished: the summary of a run that has nothing left to do; copies: sends the logs to the
    master."""

    folder: Path
    keeps: bool
    began: float
    resumed: dict[str, Any] | None
    finished: dict[str, Any] | None
    copies: LogCopies


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
    """Opens the run's folder for this job on every rank, and finds where to start.

    Machines that share no disk each keep a copy. The newest whole checkpoint counts, wherever it
    lies, and its holder sends it to all: rank 0 may have moved to another machine.

    UserError on every rank: another job has the folder; a checkpoint is of another configuration
    (--resume auto); there is none (--resume must); a folder cannot be written.
    """
    folder, limit_s = Path(config.run_dir), config.data_timeout_s
    payload = b""

    def look_here() -> dict[str, Any]:
        nonlocal payload
        payload, here = look(folder, config, world) if keeps else (b"", Found(""))
        return asdict(here)

    with ExitStack() as stack:
        keepers = claim(folder, world, stack, limit_s)
        keeps = keepers[world.rank] == world.rank
        found = [Found(**one) for one in world.from_all("look", look_here, limit_s)]
        began = max(one.began for one in found)
        if found[world.rank].is_older_than(began):
            put_aside(folder, world, "of an earlier run than another machine's")
        found = [Found(one.host) if one.is_older_than(began) else one for one in found]
        source = newest(found, config)
        level(folder, world, keepers, [one.logs for one in found])
        resumed = finished = None
        if source is not None:
            finished = found[0].summary if found[source].step >= total_steps else None
            if found[world.rank].damage:
                world.say(
                    f"warning: no whole checkpoint in {folder}: taking another machine's", True
                )
            payload = broadcast_bytes(world, payload, source)
            resumed = checkpoint.from_bytes(payload)
        if finished is None:
            began = began or world.from_main("began", time.time, limit_s)

            def store() -> None:
                described = {**config.as_dict(), "versions": versions(), "began": began}
                text = json.dumps(described, indent=2) + "\n"
                checkpoint.write_atomic(folder / CONFIG, text.encode())
                if resumed and found[world.rank].step < resumed["step"]:
                    checkpoint.save(folder, payload)

            world.from_all("store", store if keeps else lambda: None, limit_s)
            if resumed:
                whose = f", the checkpoint of {found[source].host}" if source else ""
                world.say(f"resuming {folder} at step {resumed['step']} of {total_steps}{whose}")
        yield Run(folder, keeps, began, resumed, finished, LogCopies(folder, world, keepers))


def write_results(folder: Path, weights: dict[str, torch.Tensor], summary: dict[str, Any]) -> None:
    """The trained model, then the summary: a run with a summary has its model too."""
    checkpoint.write_atomic(folder / WEIGHTS, checkpoint.to_bytes(weights))
    text = json.dumps(summary, indent=2) + "\n"
    checkpoint.write_atomic(folder / SUMMARY, text.encode())
