"""TrainConfig: everything that decides a training run. No torch here, so that `--help` is quick."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from ddp_lib.errors import UserError

# Fields that may differ between machines: where things lie, and how long to wait. The data is
# compared by its content.
_OF_A_MACHINE = frozenset("run_dir data_dir data backend data_timeout_s".split())
# Fields that may differ between a run and its continuation: they do not change what is computed.
_FREE_TO_DIFFER = frozenset(
    "epochs run_dir data_dir resume checkpoint_every_s backend"
    " join_timeout_s timeout_s data_timeout_s".split()
)


@dataclass(frozen=True)
class TrainConfig:
    """What to train, on what, and how."""

    data: str = "cifar10"
    """`cifar10` (downloaded once a machine), `shapes` (built in, no download), or a folder that
    holds train/<class>/* and test/<class>/* images."""
    data_dir: str = "data"
    """Folder for downloads and for the decoded images that a machine's ranks share."""
    run_dir: str = "runs/default"
    """Folder of this run: logs, checkpoint, cifar_net.pth. A run found there is resumed."""
    model: str = "ddp_lib.model:SimpleModel"
    """package.module:callable, called with num_classes=...; the working directory is on the path."""
    epochs: int = 10
    """Passes over the training images."""
    global_batch_size: int = 128
    """Images a step over all ranks together; a rank takes global_batch_size / world size of them."""
    accumulate: int = 1
    """Micro-batches a rank's share is cut into; gradients are summed, communication happens once."""
    lr: float = 0.2
    """Peak learning rate of the one-cycle schedule."""
    momentum: float = 0.9
    """Momentum of SGD (Nesterov's form)."""
    weight_decay: float = 3e-4
    """L2 penalty on the weights; biases and BatchNorm's parameters are left out."""
    label_smoothing: float = 0.0
    """Share of the target given to the other classes, 0 to below 1."""
    warmup: float = 0.2
    """Share of the steps in which the learning rate rises to its peak."""
    precision: Literal["auto", "fp32", "bf16", "fp64"] = "auto"
    """auto: bf16 autocast where the processor has it, else fp32. fp64 is for proofs."""
    augment: bool = True
    """Random crop (padding 2) and horizontal flip of the training images."""
    compile: bool = False
    """torch.compile the model: a minute at the start; compare the images/s, it does not always pay."""
    seed: int = 0
    """Fixes initial weights, order of the images, augmentation and dropout."""
    init_from: str = ""
    """A cifar_net.pth to start from, instead of fresh weights."""
    resume: Literal["auto", "never", "must"] = "auto"
    """auto: go on from a checkpoint in run_dir if there is one; never: start anew, what is there is
    kept in run_dir/earlier-1; must: refuse a run_dir without a checkpoint."""
    checkpoint_every_s: float = 60.0
    """Seconds between checkpoints within an epoch; each epoch's end writes one too."""
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """auto: nccl where every local rank has a GPU, else gloo."""
    join_timeout_s: float = 60.0
    """How long to wait for the master and for the other ranks at the start."""
    timeout_s: float = 120.0
    """How long a collective waits for the slowest rank."""
    data_timeout_s: float = 600.0
    """How long to wait until this and every other machine has the data ready."""

    def __post_init__(self) -> None:
        def need(ok: bool, field: str, cure: str) -> None:
            if not ok:
                flag = "--" + field.replace("_", "-")
                raise UserError(f"{flag} is {getattr(self, field)!r}: {cure}")

        for field in ("epochs", "global_batch_size", "accumulate"):
            need(getattr(self, field) >= 1, field, "give a whole number of at least 1")
        for field in ("lr", "join_timeout_s", "timeout_s", "data_timeout_s", "checkpoint_every_s"):
            value = getattr(self, field)
            need(math.isfinite(value) and value > 0, field, "give a number above 0")
        for field in ("momentum", "label_smoothing", "warmup"):
            need(0 <= getattr(self, field) < 1, field, "give a number from 0 to below 1")
        need(
            math.isfinite(self.weight_decay) and self.weight_decay >= 0,
            "weight_decay",
            "give a number of at least 0",
        )
        need(0 <= self.seed < 2**31, "seed", "give a whole number from 0 to 2147483647")
        need(bool(self.run_dir.strip()), "run_dir", "name a folder, such as runs/first")
        need(bool(self.data.strip()), "data", "give cifar10, shapes or a folder of images")
        module, _, name = self.model.partition(":")
        need(
            bool(module) and name.isidentifier(),
            "model",
            "write package.module:callable, such as ddp_lib.model:SimpleModel",
        )

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def shared(self) -> dict[str, Any]:
        """The fields that must be equal on all machines of a run, by their flags' names."""
        return {
            "--" + name.replace("_", "-"): value
            for name, value in self.as_dict().items()
            if name not in _OF_A_MACHINE
        }

    def differences(self, earlier: dict[str, Any]) -> list[str]:
        """Fields, as `name: earlier -> now`, that make this another run than the earlier one."""
        earlier = TrainConfig().as_dict() | earlier  # a field that is newer had its default
        return [
            f"{name}: {earlier[name]!r} -> {value!r}"
            for name, value in self.as_dict().items()
            if name not in _FREE_TO_DIFFER and earlier[name] != value
        ]
