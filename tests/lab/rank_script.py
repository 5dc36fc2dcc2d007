"""A rank of ddp-launch that runs a script, in place of the training."""

import runpy


def run(path: str) -> None:
    runpy.run_path(path)
