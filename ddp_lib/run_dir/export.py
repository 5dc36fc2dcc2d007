"""A rank's log as other programs read it; they are imported only if asked for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ddp_lib.errors import UserError

_NAMES = "loss lr data_s step_s train_loss test_accuracy images_per_s".split()


class Export:
    """Gets every line of the log; the first is that of a start."""

    def __init__(self, program: str, folder: Path, rank: int) -> None:
        """program: tensorboard or wandb. UserError if it is not installed."""
        try:
            self._open = {"tensorboard": _tensorboard, "wandb": _wandb}[program](folder, rank)
        except ImportError:
            raise UserError(
                f"--export {program}: {program} is not installed: pip install {program}"
            ) from None
        self._log: Callable[[dict[str, float], int], None] | None = None
        self._close: Callable[[], None] = lambda: None

    def write(self, line: dict[str, Any]) -> None:
        if line.get("event") == "start":
            self.close()
            self._log, self._close = self._open(int(line.get("step", 0)))
        numbers = {name: float(line[name]) for name in _NAMES if name in line}
        if self._log is not None and numbers:
            self._log(numbers, int(line["step"]))

    def close(self) -> None:
        self._close()


# What opens a file from a step on, and returns how to write there and how to close it.
_Open = Callable[[int], tuple[Callable[[dict[str, float], int], None], Callable[[], None]]]


def _tensorboard(folder: Path, rank: int) -> _Open:
    """A writer per rank, so a curve per rank; `tensorboard --logdir` takes the folder."""
    from torch.utils.tensorboard import SummaryWriter

    def start(step: int) -> Any:
        # Steps that come again after a restart replace the earlier ones.
        writer = SummaryWriter(str(folder / "tensorboard" / f"rank{rank}"), purge_step=step)

        def log(numbers: dict[str, float], step: int) -> None:
            for name, number in numbers.items():
                writer.add_scalar(name, number, step)

        return log, writer.close

    return start


def _wandb(folder: Path, rank: int) -> _Open:
    """Offline, a run per rank and start, in one group; `wandb sync` sends them."""
    import wandb

    def start(step: int) -> Any:
        names = {"group": folder.resolve().name, "name": f"rank{rank}"}
        run = wandb.init(mode="offline", project="ddp_lib", dir=str(folder), **names)
        return run.log, run.finish

    return start
