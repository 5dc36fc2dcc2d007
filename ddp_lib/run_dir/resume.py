"""A run's folder: one job at a time, where it left off, and what it ends with."""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ddp_lib.config import TrainConfig
from ddp_lib.distributed.coordination import broadcast_bytes
from ddp_lib.distributed.handshake import versions
from ddp_lib.distributed.world import World
from ddp_lib.errors import UserError
from ddp_lib.run_dir import checkpoint
from ddp_lib.run_dir.lock import claim
from ddp_lib.run_dir.log_sync import Held, LogCopies, held_in, level

CONTAINER = "DDP_LIB_CONTAINER"  # set by our image
CONFIG = "config.json"
SUMMARY = "summary.json"
WEIGHTS = "cifar_net.pth"


@dataclass(frozen=True)
class Found:
    """One folder, as the keeper that looked describes it to all; other ranks say nothing but host."""

    host: str
    began: float = 0.0  # when the run first started, Unix time: its identity; 0: not known
    step: int = -1  # of its newest whole checkpoint; -1: none
    damage: str = ""
    logs: list[Held] = field(default_factory=list)
    summary: dict[str, Any] | None = None  # of a run that was finished

    def is_older_than(self, began: float) -> bool:
        """Whether this is left over from a run before the one that began at `began`."""
        return self.began < began and (self.step >= 0 or bool(self.logs))


def look(folder: Path, config: TrainConfig, world: World) -> tuple[bytes, Found]:
    """The bytes of this folder's newest whole checkpoint (none: empty), and what else it holds.

    UserError where that is of another configuration.
    """
    host = socket.gethostname()
    checkpoint.clean(folder)
    if config.resume == "never":
        put_aside(folder, world, "--resume never")
        return b"", Found(host)
    payload, step, began, damage = None, -1, _began(folder), ""
    try:
        payload = checkpoint.find(folder, lambda line: world.say(line, True))
    except UserError as error:
        damage = str(error)  # no reason to stop yet: another machine may have a whole one
    if payload is not None:
        state = checkpoint.from_bytes(payload)
        differences = config.differences(state["config"])
        if differences:
            raise UserError(
                f"{folder} holds a run of another configuration ({'; '.join(differences)}): "
                "name another --run-dir, give the same flags, or --resume never to start anew"
            )
        began, step = state.get("began", began), state["step"]
    summary = None
    if (folder / SUMMARY).exists() and (folder / WEIGHTS).exists():
        summary = json.loads((folder / SUMMARY).read_text())
    return payload or b"", Found(host, began, step, damage, held_in(folder), summary)


def newest(found: list[Found], config: TrainConfig) -> int | None:
    """The rank whose checkpoint all go on from, the lowest of equals; None: a fresh start.

    `found` is of one run. UserError where none is whole, and where there must be one and is not.
    """
    rank = max(range(len(found)), key=lambda rank: (found[rank].step, -rank))
    if found[rank].step >= 0:
        return rank
    for one in found:
        if one.damage:
            raise UserError(one.damage)
    if config.resume == "must":
        raise UserError(
            f"--resume must: {config.run_dir} holds no checkpoint; check --run-dir, or use --resume auto"
        )
    return None


def _began(folder: Path) -> float:
    try:
        return float(json.loads((folder / CONFIG).read_text())["began"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0


def put_aside(folder: Path, world: World, why: str) -> None:
    moved = checkpoint.move_aside(folder)
    if moved is not None:
        world.say(f"{why}: what {folder} held is now in {moved}", every_node=True)


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
