"""The bar that a rank shows on a terminal."""

import io
import sys

import pytest

from ddp_lib.distributed.world import World
from ddp_lib.training.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_the_bar_fits_and_goes_before_the_line_done(monkeypatch, columns):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr("tqdm.std._screen_shape_wrapper", lambda: lambda file: (columns, 25))
    progress = Progress(World(), epochs=2, steps_per_epoch=4)
    for step in range(8):
        progress.bar.mininterval = 0
        progress.step(step // 4, step, 1.2345, 12345.0)
        shown = str(progress.bar)
        assert len(shown) <= columns and f" {step % 4 + 1}/4, loss 1.2345, 12,345 images/s" in shown
        assert len(shown.split("|")[1]) == 10
        if step % 4 == 3:
            progress.say("done")
            assert screen.getvalue().split("\r")[-1] == "[rank 0] done\n"
    progress.close()
    assert "epoch 2/2: |##5       | 1/4" in screen.getvalue()
    assert screen.getvalue().split("\r")[-1].strip() == ""
