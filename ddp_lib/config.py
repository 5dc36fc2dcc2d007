"""TrainConfig: all settings of a training run. Does not import torch, so that `--help` is quick."""

import math
from collections.abc import Callable
from dataclasses import Field, asdict, dataclass, fields
from typing import Any, Literal, get_args

from ddp_lib.errors import UserError, require_seconds

# Fields that may differ between the machines of a run: paths and timeouts. Data is compared by its content.
PER_MACHINE = frozenset("run_dir data_dir data data_timeout_s".split())
# Fields that may differ when a run is resumed: they do not change what is computed. Data is compared by its
# content.
FREE_ON_RESUME = frozenset(
    "epochs run_dir data data_dir resume backend checkpoint_every_s log_sync_s export"
    " join_timeout_s timeout_s data_timeout_s".split()
)


@dataclass(frozen=True)
class TrainConfig:
    """What to train, on which data, and how."""

    data: str = "cifar10"
    """`cifar10` (downloaded once per machine), `shapes` (built in, no download), or a folder that holds
    train/<class>/* and test/<class>/* images."""
    data_dir: str = "data"
    """Folder for downloads and for the decoded images, which all ranks of a machine use."""
    image_size: int = 32
    """Pixels square to which the images of a folder are resized; cifar10 and shapes have 32."""
    run_dir: str = "runs/default"
    """Folder of this run: logs, checkpoint, cifar_net.pth. If it holds a run, that run is resumed."""
    model: str = "ddp_lib.model:SimpleModel"
    """package.module:callable, called with num_classes=...; it may be in the working directory."""
    epochs: int = 10
    """Passes over the training images."""
    global_batch_size: int = 256
    """Images per step over all ranks together, divided among the ranks."""
    accumulate: int = 1
    """Micro-batches per rank and step; their gradients are added up and communicated once."""
    lr: float = 0.2
    """Peak learning rate of the one-cycle schedule."""
    momentum: float = 0.9
    """Momentum of SGD (Nesterov's form)."""
    weight_decay: float = 5e-4
    """L2 penalty on the weights, but not on biases and BatchNorm's parameters."""
    label_smoothing: float = 0.2
    """Fraction of the target that goes to the other classes, 0 to below 1."""
    warmup: float = 0.2
    """Fraction of the steps in which the learning rate rises to its peak."""
    precision: Literal["auto", "fp32", "bf16", "fp64"] = "auto"
    """auto: bf16 autocast if rank 0's processor supports it, else fp32; a resumed run keeps what it began
    with. fp64 is for exact comparisons."""
    augment: bool = True
    """Random crop (padding 2), and a horizontal flip in every other epoch, of the training images."""
    compile: bool = False
    """torch.compile the model: takes a minute at the start, and is not always faster: compare images/s."""
    seed: int = 0
    """Decides initial weights, order of the images, augmentation and dropout."""
    init_from: str = ""
    """A cifar_net.pth to start from, instead of random weights."""
    resume: Literal["auto", "never", "must"] = "auto"
    """auto: resume from the checkpoint in run_dir if there is one; never: start from the beginning,
    and move an earlier run to run_dir/earlier-1; must: refuse a run_dir without a checkpoint."""
    checkpoint_every_s: float = 60.0
    """Seconds between checkpoints within an epoch; one is also written at the end of each epoch."""
    log_sync_s: float = 5.0
    """Seconds after which the master's folder gets the new log lines of machines that do not share its disk;
    within an epoch, to be watched."""
    export: Literal["none", "tensorboard", "wandb"] = "none"
    """Write each rank's log for TensorBoard too, or for Weights & Biases (offline); needs that package."""
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """auto: nccl if every rank has a GPU of its own, else gloo; refused if only some have one. gloo: on the
    CPU."""
    join_timeout_s: float = 60.0
    """Seconds to wait for the master and the other ranks at the start."""
    timeout_s: float = 120.0
    """Seconds that a collective waits for the slowest rank."""
    data_timeout_s: float = 600.0
    """Seconds to wait until this machine and all others have the data ready."""

    def __post_init__(self) -> None:
        def require(names: str, is_valid: Callable[[Any], Any], cure: str) -> None:
            for name in names.split():
                value = getattr(self, name)
                if not is_valid(value):
                    raise UserError(f"{_flag(name)} is {value!r}: {cure}")

        for field in fields(self):
            _require_type(field, getattr(self, field.name))
        counts = "epochs global_batch_size accumulate"
        require(counts, lambda n: 1 <= n <= 1_000_000, "give a whole number from 1 to 1000000")
        require("image_size", lambda n: 10 <= n <= 2048, "give a number of pixels from 10 to 2048")
        for name in ("join_timeout_s", "timeout_s", "data_timeout_s", "log_sync_s"):
            require_seconds(_flag(name), getattr(self, name))
        require("checkpoint_every_s", lambda x: 0 < x < math.inf, "give a number of seconds above 0")
        require("lr", lambda x: 0 < x <= 1000, "give a number above 0, up to 1000")
        require("momentum label_smoothing warmup", lambda x: 0 <= x < 1, "give a number from 0 to below 1")
        require("weight_decay", lambda x: 0 <= x <= 1000, "give a number from 0 to 1000")
        require("seed", lambda n: 0 <= n < 2**31, "give a whole number from 0 to 2147483647")
        require("run_dir", str.strip, "name a folder, such as runs/first")
        require("data", str.strip, "give cifar10, shapes or a folder of images")
        module, _, name = self.model.partition(":")
        cure = "write package.module:callable, such as ddp_lib.model:SimpleModel"
        require("model", lambda _: module and name.isidentifier(), cure)

    def differences(self, earlier: dict[str, Any]) -> list[str]:
        """Fields that must not change when a run is resumed but did, as `name: earlier -> now`."""
        earlier = asdict(TrainConfig()) | earlier  # a field added since then had its default
        return [
            f"{name}: {earlier[name]!r} -> {value!r}"
            for name, value in asdict(self).items()
            if name not in FREE_ON_RESUME and earlier[name] != value
        ]


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _require_type(field: Field[Any], value: Any) -> None:
    """UserError unless the value has the type of the field: a program may give any."""
    choices, kind = get_args(field.type), field.type
    if choices:
        valid, cure = value in choices, f"give one of {', '.join(choices)}"
    elif kind is float:
        valid, cure = isinstance(value, (int, float)) and not isinstance(value, bool), "give a number"
    else:
        valid, cure = type(value) is kind, f"give a value of type {getattr(kind, '__name__', kind)}"
    if not valid:
        raise UserError(f"{_flag(field.name)} is {value!r}: {cure}")
