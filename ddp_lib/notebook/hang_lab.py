"""hang_lab: runs a function that may hang, or fail, on several ranks, and says how each of them ended."""

import contextlib
import io
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import torch.distributed as dist

from ddp_lib.distributed.world import World
from ddp_lib.notebook.errors import RankError, readable
from ddp_lib.notebook.run_ranks import run_ranks


def hang_lab(
    case: Callable[[int], Any],
    timeouts_s: Sequence[float] = (1, 30),
    timeout_s: float = 60.0,
    **variables: str,
) -> str:
    """Runs `case(rank)` on a rank for each of `timeouts_s`, in a gloo group on the CPU; a line per rank.

    A line says "went on", with what the case returned, or the message of the RuntimeError that it raised,
    without what differs from run to run (addresses, C++ file names).
    timeouts_s: seconds that the collectives of rank 0, 1, ... wait: unequal ones decide who gives up first.
    timeout_s: after this many seconds run_ranks ends what still runs, and says where each rank stood.
    variables: environment variables of the ranks; TORCH_DISTRIBUTED_DEBUG is OFF by default.
    """
    quiet = contextlib.redirect_stdout(io.StringIO())  # what C++ says on its own, with times
    with patch.dict(os.environ, {"TORCH_DISTRIBUTED_DEBUG": "OFF"} | variables), quiet:
        try:
            answers = run_ranks(in_group, len(timeouts_s), case, timeouts_s, timeout_s=timeout_s)
        except RankError as error:
            return str(error)
    return "\n".join(f"rank {rank}: {answer}" for rank, answer in enumerate(answers))


def in_group(case: Callable[[int], Any], timeouts_s: Sequence[float]) -> str:
    with World.join(backend="gloo", log=lambda line: None) as world:
        dist.set_timeout(timedelta(seconds=timeouts_s[world.rank]))
        try:
            result = case(world.rank)
            answer = "went on" if result is None else f"went on: {result}"
        except RuntimeError as error:
            answer = readable(str(error))
        with contextlib.suppress(RuntimeError):
            wait_for_all(world)  # a rank that left early would be another error
        return answer


def wait_for_all(world: World, timeout_s: float = 30.0) -> None:
    """Keeps this rank until all ranks have come here, by the store alone; at most timeout_s seconds."""
    world.store.set(f"end/{world.rank}", "")
    everyone = [f"end/{rank}" for rank in range(world.world_size)]
    world.store.wait(everyone, timedelta(seconds=timeout_s))
