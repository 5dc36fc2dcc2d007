"""A rank of ddp-launch that runs a script, in place of the training."""

import runpy

from ddp_lib.processes.worker import prepare


def run(path: str) -> None:
    prepare()
    runpy.run_path(path)
