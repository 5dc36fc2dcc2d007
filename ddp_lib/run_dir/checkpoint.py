"""Checkpoints: complete, atomic and verified; a restart takes the newest undamaged checkpoint."""

import hashlib
import io
import os
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import torch

from ddp_lib.errors import UserError
from ddp_lib.run_dir.log import name_disk_errors

NAME = "checkpoint.pt"
PREVIOUS = "checkpoint.prev.pt"


def write_atomic(path: Path, payload: bytes, previous: Path | None = None) -> None:
    """Writes `payload`; at any time `path` holds either its old content or all of the new.

    previous: where the old content is kept; after a kill between the two renames, `path` is missing.
    UserError if the disk refuses; the old content then stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with name_disk_errors(path, "what was there before is untouched"):
        try:
            with open(temporary, "wb") as file:
                file.write(payload)
                file.flush()
                os.fsync(file.fileno())
            if previous is not None and path.exists():
                os.replace(path, previous)
            os.replace(temporary, path)
            if hasattr(os, "O_DIRECTORY"):  # so that the renames survive a power cut
                folder = os.open(path.parent, os.O_DIRECTORY)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)
        finally:
            with suppress(OSError):  # the disk may be read-only now
                temporary.unlink(missing_ok=True)


def to_bytes(state: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def from_bytes(payload: bytes) -> dict[str, Any]:
    """The state in `payload`, on the CPU; unpickles only tensors and plain values."""
    return torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)


def save(folder: Path, payload: bytes) -> None:
    """Writes a state's bytes as the folder's newest checkpoint and keeps its predecessor. The file is a
    torch.save of {"payload": the bytes, "sha256": their digest}. UserError if the disk refuses."""
    data = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    sealed = to_bytes({"payload": data, "sha256": hashlib.sha256(payload).hexdigest()})
    write_atomic(folder / NAME, sealed, previous=folder / PREVIOUS)


def find(folder: Path, log: Callable[[str], None] = print) -> bytes | None:
    """The bytes of the newest undamaged checkpoint in `folder`, or None if it holds no checkpoint. If the
    newest is damaged, logs a warning and uses its predecessor. UserError if all are damaged."""
    damaged: list[str] = []
    for path in filter(Path.exists, (folder / NAME, folder / PREVIOUS)):
        try:
            sealed = torch.load(path, map_location="cpu", weights_only=True)
            payload = sealed["payload"].numpy().tobytes()
            is_whole = hashlib.sha256(payload).hexdigest() == sealed["sha256"]
            trouble = "" if is_whole else "its digest does not match"
        except Exception as error:  # a damaged zip or pickle fails in many ways
            trouble = f"unreadable ({type(error).__name__})"
        if not trouble:
            for line in damaged:
                log(f"warning: {line}; going on from its predecessor {path}")
            return payload
        damaged.append(f"{path} is damaged: {trouble}")
    if damaged:
        raise UserError(
            f"{'; '.join(damaged)}: no whole checkpoint is left; start again with --resume never "
            "(the damaged files are kept aside)"
        )
    return None


def move_aside(folder: Path) -> Path | None:
    """Moves an earlier run's files in `folder` to earlier-1/, earlier-2/, ...; None if there are none."""
    old = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name[0] != "."]
    if not old:
        return None
    target = next(path for n in count(1) if not (path := folder / f"earlier-{n}").exists())
    target.mkdir()
    for path in old:
        path.rename(target / path.name)
    return target


def load_weights(path: str, model: torch.nn.Module) -> None:
    """Copies the weights in `path` (a cifar_net.pth) into `model`. UserError if they do not fit."""
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"--init-from {path!r} does not exist: name a cifar_net.pth") from None
    except Exception as error:
        raise UserError(
            f"--init-from {path!r} cannot be read as weights ({type(error).__name__}): name a cifar_net.pth "
            "that a training run has written"
        ) from None
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        detail = " ".join(str(error).split())[:200]
        raise UserError(
            f"--init-from {path!r} does not fit the model ({detail}): "
            "take weights of the same --model and number of classes"
        ) from None
