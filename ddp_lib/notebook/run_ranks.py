"""run_ranks: runs a function from a notebook's cell on several ranks and returns their results."""

import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FunctionType
from typing import Any

import cloudpickle

from ddp_lib.errors import UserError, require_seconds
from ddp_lib.notebook.errors import in_one_line
from ddp_lib.notebook.rank_pool import RankPool, local_ranks
from ddp_lib.processes.exit_status import require_working_directory
from ddp_lib.processes.forkserver import start_server
from ddp_lib.report.live_cell import somebody_looks

# Imported by the fork server, so that ranks need not. DDP imports torch._dynamo for its first model.
PRELOAD = ["ddp_lib.notebook.worker", "ddp_lib.train", "torch._dynamo"]
# The same for the ranks of %ranks, which need IPython.
FOR_CELLS = ["ddp_lib.notebook.session"]


@in_one_line("the ranks have")
def run_ranks(fn: Callable[..., Any], nproc: int = 2, *args: Any, timeout_s: float = 60.0) -> list[Any]:
    """Runs `fn(*args)` on `nproc` ranks of this machine; returns their results in rank order.

    The ranks have the environment that torchrun would give them, so `init_process_group("gloo")` and
    `World.join()` work as they are. The ranks' output is printed here with the prefix `[rank r]`: rank 0's
    while it runs, then rank 1's, and so on. timeout_s: after this many seconds, ranks that still run count
    as stuck.

    Raises RankError, which names the rank, if a rank raises an exception, dies or hangs; UserError if the
    arguments are unusable. No process is left behind, not even after an interrupt.
    """
    if not isinstance(nproc, int) or nproc < 1:
        raise UserError(f"nproc is {nproc!r}: give a number of ranks, 1 or more")
    require_seconds("timeout_s", timeout_s)
    try:
        work = cloudpickle.dumps((fn, args))
    except Exception as error:
        raise UserError(
            f"{getattr(fn, '__name__', 'fn')} or its arguments cannot be sent to the ranks "
            f"({error}): create such objects inside the function"
        ) from None
    require_working_directory()
    start_server(PRELOAD)
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        request = Path(folder) / "live_view" if somebody_looks() else None
        ranks = local_ranks(nproc, work, Path(folder), _source_files(fn, args), request=request)
        return RankPool(ranks, request=request).run(timeout_s)


def _source_files(fn: Callable[..., Any], args: tuple[Any, ...]) -> dict[str, str]:
    """The file of `fn` and of each function beside it or in `args`, by name, and that of `fn` as "" too."""
    code = getattr(fn, "__code__", None)
    if code is None:
        return {}
    functions = [f for f in (*fn.__globals__.values(), *args) if isinstance(f, FunctionType)]
    files = {f.__name__: f.__code__.co_filename for f in functions}
    return files | {fn.__name__: code.co_filename, "": code.co_filename}


def _in_a_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    in_ipython = ipython is not None and ipython.get_ipython() is not None
    return in_ipython and multiprocessing.parent_process() is None


if _in_a_notebook():
    with suppress(UserError, OSError):  # run_ranks will say it
        start_server([*PRELOAD, *FOR_CELLS])  # so that it imports torch while the notebook's first cells run
