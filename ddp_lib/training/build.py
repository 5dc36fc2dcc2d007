"""The model that --model names: built, tried on two images, and described by its source.

It is the reader's code. Whatever is wrong with it is said in one line, before the run's folder is touched.
"""

import ast
import hashlib
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from functools import partial
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

from ddp_lib.config import TrainConfig
from ddp_lib.data.dataset import Dataset
from ddp_lib.distributed.coordination import compare
from ddp_lib.distributed.world import World
from ddp_lib.errors import UserError, is_peer_gone, is_timeout, text_of
from ddp_lib.model import build_model
from ddp_lib.processes.signals import Stopped
from ddp_lib.processes.stacks import is_library, own_lines
from ddp_lib.run_dir.resume import describe_model


@contextmanager
def blame_model(
    spec: str, what: str, kinds: tuple[type[BaseException], ...] = (Exception,)
) -> Iterator[None]:
    """Turns an exception of the reader's code, if it is one of `kinds` or a sys.exit, into a UserError.

    what: what the model cannot do. Lost ranks, signals and lack of memory are not the model's.
    """
    blamed: tuple[type[BaseException], ...] = (*kinds, SystemExit)
    try:
        yield
    except (UserError, Stopped, MemoryError, torch.OutOfMemoryError):
        raise
    except blamed as error:
        if is_peer_gone(error) or is_timeout(error) or "allocate memory" in (said := text_of(error)):
            raise
        text = " ".join(said.split())[:200]
        said = f"sys.exit({text})" if isinstance(error, SystemExit) else f"{type(error).__name__}: {text}"
        lines = own_lines(traceback.extract_tb(error.__traceback__))
        where = f", {lines[-1]}" if lines else ""
        cure = {SystemExit: "leave the exit out", ModuleNotFoundError: "install what it imports"}
        raise UserError(
            f"--model {spec!r} {what} ({said}{where}): {cure.get(type(error), 'correct the model')}"
        ) from error


def build_same_model(
    config: TrainConfig, precision: str, world: World, data: Dataset
) -> tuple[nn.Module, dict[str, str]]:
    """The model that config names, with the same initial weights on every rank, and its source's digests.
    UserError, on every rank, if ranks have different models."""
    torch.manual_seed(config.seed)
    # The type of parameters, batches and losses; only autocast uses bf16.
    dtype = torch.float64 if precision == "fp64" else torch.float32
    image_size = data.train.images.shape[1]
    model = build_and_try(config.model, len(data.classes), image_size, world.device, dtype, world.say)
    source = source_of(config.model, model)
    shapes = json.dumps(describe_model(model.state_dict(), {}))
    equal = {**describe_model({}, source), "the digest of the model's shapes": _digest(shapes)}
    compare(world, "model", equal, "copy the same files to every machine", config.join_timeout_s)
    return model, source


@contextmanager
def _keep_process(spec: str) -> Iterator[None]:
    """The model may change the working directory: the run's folder stays where it was named. UserError if it
    closes its output."""
    with chdir("."):
        yield
    if sys.stdout.closed or sys.stderr.closed:
        raise UserError(f"--model {spec!r} closes sys.stdout or sys.stderr: leave that out")


def build_and_try(
    spec: str,
    classes: int,
    image_size: int,
    device: torch.device,
    dtype: torch.dtype,
    say: Callable[[str], None],
) -> nn.Module:
    """The model that `spec` names, on `device` in `dtype` and, if it can, in the layout channels_last.

    From then on each of its forwards checks what it returns. UserError if it cannot be built, fails on two
    images, or returns no logits (B, classes).
    """
    with blame_model(spec, "cannot be built"), _keep_process(spec):
        model = build_model(spec, classes)
        given = {p.dtype for p in model.parameters() if p.is_floating_point()} - {dtype}
        model.to(device, dtype)
    if device.type == "cpu" and any(isinstance(part, nn.SyncBatchNorm) for part in model.modules()):
        raise UserError(
            f"--model {spec!r} has a SyncBatchNorm, which works on GPUs only: use BatchNorm on the CPU"
        )
    if given and dtype != torch.float64:
        cure = "; --precision fp64 keeps it" if torch.float64 in given else ""
        say(f"the model has parameters in {given.pop()}; it is trained in {dtype}{cure}")
    model.register_forward_hook(partial(_check_logits, spec, classes))
    x = torch.zeros(2, 3, image_size, image_size, device=device, dtype=dtype)
    with chdir("."), torch.no_grad():
        with blame_model(spec, f"fails on images of shape {list(x.shape)}"):
            model.eval()
            model(x)  # lazy modules get their parameters
        try:
            model.to(memory_format=torch.channels_last)
            model(x.to(memory_format=torch.channels_last))
        except RuntimeError as error:
            reason = " ".join(str(error).split()).partition(".")[0]
            say(f"the model cannot have the memory layout channels_last ({reason}): training without it")
            model.to(memory_format=torch.contiguous_format)
            model.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
    return model


def _check_logits(spec: str, classes: int, _: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
    """A forward hook: UserError if `output` cannot be compared with the labels."""
    wanted = [len(inputs[0]), classes]
    if not isinstance(output, torch.Tensor):
        got = f"a {type(output).__name__}"
    elif list(output.shape) != wanted:
        got = f"a tensor of shape {list(output.shape)}"
    elif torch.is_grad_enabled() and not output.requires_grad:
        got = "a tensor without gradient, made under no_grad or detached"
    else:
        return
    raise UserError(
        f"--model {spec!r} returns {got}: return only the logits, a tensor of shape {wanted} for "
        f"{wanted[0]} images of {classes} classes (num_classes)"
    )


def source_of(spec: str, model: nn.Module) -> dict[str, str]:
    """Digest of the source, comments and layout aside, by name of the module: of the one that `spec` names,
    and of those beside it or below it that define the model's parts, or that these import."""
    named = spec.partition(":")[0]
    first = getattr(sys.modules[named], "__file__", None)
    if not first:
        return {}
    is_package = Path(first).name == "__init__.py"
    root = Path(first).resolve().parents[named.count(".") + is_package]
    pending = [named, *(kind.__module__ for part in model.modules() for kind in type(part).__mro__)]
    digests: dict[str, str] = {}
    while pending:
        name = pending.pop()
        module = sys.modules.get(name)
        file = getattr(module, "__file__", None)
        if module is None or not file or name in digests:
            continue
        path = Path(file).resolve()
        others = name.startswith("ddp_lib.") or is_library(file) or not path.is_relative_to(root)
        if name != named and others:
            continue
        try:
            text = ast.unparse(ast.parse(path.read_bytes()))
        except (OSError, SyntaxError, ValueError):  # compiled, or its file is gone
            text = ""
        digests[name] = _digest(text)
        for value in vars(module).values():
            if isinstance(value, ModuleType):
                pending.append(value.__name__)
            elif isinstance(value, (type, FunctionType)):
                pending.append(value.__module__)
    return dict(sorted(digests.items()))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
