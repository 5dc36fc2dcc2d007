"""What a rank shows of its progress: a bar on a terminal, a picture in a notebook, plain lines elsewhere."""

import sys
import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from ddp_lib.distributed.world import World

# Without a terminal: the most lines per epoch, and the fewest seconds between them.
_LINES_PER_EPOCH = 10
_LINE_EVERY_S = 2.0
# What a narrow terminal cuts off matters least. tqdm's own would leave the bar a single character.
_BAR = "{desc}|{bar:10}| {n_fmt}/{total_fmt}{postfix}, {remaining} left"


class View(Protocol):
    """A notebook's, which draws the run from its logs."""

    def tick(self) -> None: ...

    def close(self) -> None: ...


@dataclass
class Progress:
    """Loss by epoch and batch, from local rank 0 of every machine; `view`, if any, shows it instead."""

    world: World
    epochs: int
    steps_per_epoch: int
    view: View | None = None
    _next_line_s: float = 0.0

    @cached_property
    def bar(self) -> Any:
        """tqdm's bar, if this rank shows one."""
        if self.world.local_rank == 0 and sys.stderr.isatty():
            from tqdm import tqdm

            # leave: a full bar below the line "done" would say nothing.
            return tqdm(total=self.steps_per_epoch, dynamic_ncols=True, leave=False, bar_format=_BAR)
        return None

    def say(self, text: str) -> None:
        """Prints a line of this rank, in place of the bar, which the next step shows again."""
        if self.bar is not None:
            self.bar.clear()
        print(f"[rank {self.world.rank}] {text}", flush=True)

    def epoch_done(self, epoch: int, results: str) -> None:
        """epoch: from 0."""
        if self.view is None:
            self.say(f"epoch {epoch + 1}/{self.epochs} done: {results}")

    def step(self, epoch: int, step: int, loss: float, images_per_s: float) -> None:
        """epoch: from 0; step: through all epochs, from 0; images_per_s: over all ranks."""
        if self.view is not None:
            self.view.tick()
        if self.view is not None or self.world.local_rank != 0:
            return
        batch = step % self.steps_per_epoch + 1
        if self.bar is not None:
            if batch < self.bar.n:
                self.bar.reset()
            self.bar.n = batch
            self.bar.set_description(f"epoch {epoch + 1}/{self.epochs}", refresh=False)
            self.bar.set_postfix_str(f"loss {loss:.4f}, {images_per_s:,.0f} images/s", refresh=False)
            self.bar.update(0)
            return
        now = time.monotonic()
        every = max(1, self.steps_per_epoch // _LINES_PER_EPOCH)
        if batch == self.steps_per_epoch or ((batch - 1) % every == 0 and now >= self._next_line_s):
            self._next_line_s = now + _LINE_EVERY_S
            self.say(
                f"epoch {epoch + 1}/{self.epochs} batch {batch}/{self.steps_per_epoch} "
                f"loss {loss:.4f} ({images_per_s:,.0f} images/s)"
            )

    def close(self) -> None:
        if self.view is not None:
            self.view.close()
        if vars(self).get("bar") is not None:
            self.bar.close()
