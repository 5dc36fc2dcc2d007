"""run_ranks: a function of a notebook's cell on several ranks, and what each of them returned."""

import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle

from ddp_lib.errors import UserError
from ddp_lib.notebook.errors import source_files
from ddp_lib.notebook.rank_pool import Ranks
from ddp_lib.processes.forkserver import start_server

# What a rank needs, imported before it is forked. DDP imports torch._dynamo when it wraps its first model.
_PRELOAD = ["ddp_lib.notebook.worker", "ddp_lib.train", "torch._dynamo"]


def run_ranks(
    fn: Callable[..., Any], nproc: int = 2, *args: Any, timeout_s: float = 60.0
) -> list[Any]:
    """Runs `fn(*args)` on `nproc` ranks of this machine; returns what each returned, in rank order.

    The ranks have the environment that torchrun would give them, so `init_process_group("gloo")`
    and `World.join()` work as they are. Their output appears here, prefixed `[rank r]`: rank 0's
    live, then rank 1's, and so on. timeout_s: seconds until ranks that still run count as stuck.

    Raises RankError, naming the rank, for an exception, a death or a hang; UserError for arguments
    that cannot work. No process is left behind, also after an interrupt.
    """
    if nproc < 1:
        raise UserError(f"nproc is {nproc}: give a number of ranks, 1 or more")
    if timeout_s <= 0:
        raise UserError(f"timeout_s is {timeout_s}: give a number of seconds above 0")
    try:
        work = cloudpickle.dumps((fn, args))
    except Exception as error:
        raise UserError(
            f"{getattr(fn, '__name__', 'fn')} or its arguments cannot be sent to the ranks "
            f"({error}): make such objects inside the function"
        ) from None
    start_server(_PRELOAD)
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        ranks = Ranks(nproc, work, Path(folder), source_files(fn))
        try:
            return ranks.results(timeout_s)
        finally:
            ranks.end()


def _in_a_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    return (
        ipython is not None
        and ipython.get_ipython() is not None
        and multiprocessing.parent_process() is None
    )


if _in_a_notebook():
    start_server(_PRELOAD)  # it imports torch while the reader's first cells run
