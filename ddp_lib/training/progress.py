"""What a rank shows of its progress: a bar on a terminal, plain lines elsewhere."""

import sys
import time

from ddp_lib.distributed.world import World

# Without a terminal: at most this many lines an epoch, and none sooner than this after another.
_LINES_AN_EPOCH = 10
_LINE_EVERY_S = 2.0


class Console:
    """Loss by epoch and batch, from local rank 0 of every machine."""

    def __init__(self, world: World, epochs: int, steps_per_epoch: int) -> None:
        self.world, self.epochs, self.steps_per_epoch = world, epochs, steps_per_epoch
        self.shown = world.local_rank == 0
        self.bar = None
        self._next_line_s = 0.0
        if self.shown and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=steps_per_epoch, unit="batch", dynamic_ncols=True)

    def line(self, text: str) -> None:
        """A line of this rank, above the bar if there is one."""
        text = f"[rank {self.world.rank}] {text}"
        if self.bar is not None:
            self.bar.write(text)
        else:
            print(text, flush=True)

    def main_line(self, text: str) -> None:
        """A line that is the same for all ranks: rank 0 says it."""
        if self.world.is_main:
            self.line(text)

    def step(self, epoch: int, batch: int, loss: float, images_per_s: float) -> None:
        """`epoch` and `batch` count from 0; `images_per_s` is over all ranks."""
        if not self.shown:
            return
        if self.bar is not None:
            self.bar.n = batch + 1
            self.bar.set_description(f"epoch {epoch + 1}/{self.epochs}", refresh=False)
            self.bar.set_postfix_str(
                f"loss {loss:.4f}, {images_per_s:,.0f} images/s", refresh=False
            )
            self.bar.update(0)
            return
        now = time.monotonic()
        every = max(1, self.steps_per_epoch // _LINES_AN_EPOCH)
        last = batch + 1 == self.steps_per_epoch
        if last or (batch % every == 0 and now >= self._next_line_s):
            self._next_line_s = now + _LINE_EVERY_S
            self.line(
                f"epoch {epoch + 1}/{self.epochs} batch {batch + 1}/{self.steps_per_epoch} "
                f"loss {loss:.4f} ({images_per_s:,.0f} images/s)"
            )

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
