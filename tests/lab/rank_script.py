"""A rank of ddp-launch that runs a script, in place of the training."""

import runpy

from ddp_lib.processes.forkserver import become_rank


def run(path: str) -> None:
    become_rank()
    runpy.run_path(path)
