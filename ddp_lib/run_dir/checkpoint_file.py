"""A checkpoint's file: a torch.save of the state, whole or not there, with its digest in the zip's comment.

`torch.load(path, weights_only=True)` gives the state.
"""

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch

from ddp_lib.errors import UserError
from ddp_lib.run_dir.log import name_disk_errors

NAME = "checkpoint.pt"
RUN = ".run.json"  # beside it: when the run first started
PREVIOUS = "checkpoint.prev.pt"


@dataclass(frozen=True)
class Meta:
    """What a checkpoint's file says besides the state."""

    began: float  # when the run first started (Unix time): its identity
    step: int  # orders the checkpoints of a run
    data_digest: str = ""  # of the data that the run was trained on


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
                with suppress(OSError):  # CIFS and FUSE may refuse it; the file is whole
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


def seal(state: dict[str, Any], meta: Meta) -> bytes:
    """The bytes of a checkpoint's file."""
    body = to_bytes(state).removesuffix(b"\0\0")  # the length of the zip's comment, which is empty
    words = json.dumps(asdict(meta))
    comment = json.dumps({"sha256": _digest(body, words), "meta": words}).encode()
    return body + len(comment).to_bytes(2, "little") + comment


def unseal(payload: bytes) -> Meta:
    """What a checkpoint's bytes say besides the state. Raises some exception if they are damaged."""
    with zipfile.ZipFile(io.BytesIO(payload)) as archive:
        comment = archive.comment
    says = json.loads(comment)
    if _digest(memoryview(payload)[: -len(comment) - 2], says["meta"]) != says["sha256"]:
        raise ValueError("its digest does not match")
    return Meta(**json.loads(says["meta"]))


def _digest(body: bytes | memoryview, words: str) -> str:
    digest = hashlib.sha256(body)
    digest.update(words.encode())
    return digest.hexdigest()


def save(folder: Path, payload: bytes) -> None:
    """Writes a checkpoint's bytes as the folder's newest and keeps its predecessor. UserError if the disk
    refuses."""
    write_atomic(folder / NAME, payload, previous=folder / PREVIOUS)


def find(folder: Path, log: Callable[[str], None] = print) -> tuple[bytes, Meta] | None:
    """The newest undamaged checkpoint in `folder`, or None if it holds no checkpoint. If the newest is
    damaged, logs a warning and uses its predecessor. UserError if all are damaged."""
    damaged: list[str] = []
    for path in filter(Path.exists, (folder / NAME, folder / PREVIOUS)):
        payload = path.read_bytes()
        try:
            payload = _from_old_form(payload)
            meta = unseal(payload)
        except Exception as error:  # a damaged zip or pickle fails in many ways
            kind = type(error)
            damaged.append(
                f"{path} is damaged: {error if kind is ValueError else f'unreadable ({kind.__name__})'}"
            )
        else:
            for line in damaged:
                log(f"warning: {line}; going on from its predecessor {path}")
            return payload, meta
    if damaged:
        raise UserError(
            f"{'; '.join(damaged)}: no whole checkpoint is left; start again with --resume never "
            "(the damaged files are kept aside)"
        )
    return None


def _from_old_form(payload: bytes) -> bytes:
    """A checkpoint of version 1.0, {"payload": bytes of the state, "sha256": their digest}, in today's form;
    others as they are."""
    with zipfile.ZipFile(io.BytesIO(payload)) as archive:
        if archive.comment:
            return payload
    old = from_bytes(payload)
    if "payload" not in old:
        raise ValueError("it is no file of Checkpoint: move it, or name another folder")
    inner = old["payload"].numpy().tobytes()
    if hashlib.sha256(inner).hexdigest() != old["sha256"]:
        raise ValueError("its digest does not match")
    state = from_bytes(inner)
    return seal(state, Meta(state.get("began", 0.0), state["step"]))


def move_aside(folder: Path) -> Path | None:
    """Moves an earlier run's files in `folder` to earlier-1/, earlier-2/, ...; None if there are none."""
    old = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name[0] != "."]
    if not old:
        return None
    target = next(path for n in count(1) if not (path := folder / f"earlier-{n}").exists())
    target.mkdir()
    for path in [*old, folder / RUN]:
        if path.exists():
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
