"""What each machine's folder holds of an earlier start, and which machine's copy counts."""

import json
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddp_lib import checkpoint
from ddp_lib.config import TrainConfig
from ddp_lib.errors import UserError
from ddp_lib.logcopy import Held, held_in
from ddp_lib.world import World

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
