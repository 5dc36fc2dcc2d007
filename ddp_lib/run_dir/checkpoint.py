"""Checkpoints: complete, atomic and verified; a restart takes the newest undamaged checkpoint."""

import hashlib
import io
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ddp_lib.errors import UserError

NAME = "checkpoint.pt"
PREVIOUS = "checkpoint.prev.pt"


def write_atomic(path: Path, payload: bytes) -> None:
    """Writes `payload`; at any time `path` holds either its old content or all of the new.

    UserError if the disk refuses; the old content then stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):  # the disk may be read-only now
            temporary.unlink(missing_ok=True)
        raise _refused(path, error) from None


def _refused(path: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write {path} ({error.strerror}): free or unlock the disk and start again; "
        "what was there before is untouched"
    )


def _sync_folder(folder: Path) -> None:
    """Makes a rename in `folder` survive a power cut, if the system can."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def to_bytes(state: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def from_bytes(payload: bytes) -> dict[str, Any]:
    """The state in `payload`, on the CPU; unpickles only tensors and plain values."""
    state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    assert isinstance(state, dict)
    return state


def save(folder: Path, payload: bytes) -> None:
    """Writes a state's bytes as the folder's newest checkpoint and keeps its predecessor.

    The file is a torch.save of {"payload": those bytes, "sha256": their digest}. UserError if the disk
    refuses.
    """
    sealed = to_bytes(
        {
            "payload": torch.frombuffer(bytearray(payload), dtype=torch.uint8),
            "sha256": hashlib.sha256(payload).hexdigest(),
        }
    )
    newest = folder / NAME
    staged = folder / f".{NAME}.new"
    write_atomic(staged, sealed)
    try:
        # If killed between these two renames, the next start uses the predecessor.
        if newest.exists():
            os.replace(newest, folder / PREVIOUS)
        os.replace(staged, newest)
        _sync_folder(folder)
    except OSError as error:
        raise _refused(newest, error) from None


def _open_sealed(path: Path) -> bytes:
    """The state's bytes in the checkpoint `path`; ValueError if it is damaged."""
    try:
        sealed = torch.load(path, map_location="cpu", weights_only=True)
        payload = sealed["payload"].numpy().tobytes()
        digest = sealed["sha256"]
    except Exception as error:  # a damaged zip or pickle fails in many ways
        raise ValueError(f"unreadable ({type(error).__name__})") from None
    if hashlib.sha256(payload).hexdigest() != digest:
        raise ValueError("its digest does not match")
    return bytes(payload)


def find(folder: Path, log: Callable[[str], None] = print) -> bytes | None:
    """The bytes of the newest undamaged checkpoint in `folder`, or None if it holds no checkpoint.

    If the newest is damaged, logs a warning and uses its predecessor. UserError if all are damaged.
    """
    damaged = []
    for name in (NAME, PREVIOUS):
        path = folder / name
        if not path.exists():
            continue
        try:
            payload = _open_sealed(path)
        except ValueError as trouble:
            damaged.append(f"{path} is damaged: {trouble}")
            continue
        for line in damaged:
            log(f"warning: {line}; going on from its predecessor {path}")
        return payload
    if damaged:
        raise UserError(
            f"{'; '.join(damaged)}: no whole checkpoint is left; start again with --resume never "
            "(the damaged files are kept aside)"
        )
    return None


def clean(folder: Path) -> None:
    """Removes half-written files of killed writers."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def move_aside(folder: Path) -> Path | None:
    """Moves an earlier run's files in `folder` to earlier-1/, earlier-2/, ...; None if there are none."""
    old = [p for p in sorted(folder.iterdir()) if p.is_file() and p.name[0] != "."]
    if not old:
        return None
    number = 1
    while (folder / f"earlier-{number}").exists():
        number += 1
    target = folder / f"earlier-{number}"
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
            f"--init-from {path!r} cannot be read as weights ({type(error).__name__}): "
            "name a cifar_net.pth that a training run has written"
        ) from None
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        detail = " ".join(str(error).split())[:200]
        raise UserError(
            f"--init-from {path!r} does not fit the model ({detail}): "
            "take weights of the same --model and number of classes"
        ) from None
