"""ddp-launch stacks: where each rank of this machine stands now, also if it is blocked in C++."""

import re
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from traceback import FrameSummary

import psutil

from ddp_lib.errors import UserError
from ddp_lib.processes.signals import AGENT
from ddp_lib.processes.stacks import is_library, library_call, own_lines, stack_of

# Files of torch in which a rank stands while it waits for others; not those that start a rank. With NCCL it
# waits for its GPU, and often in a call without a Python frame of its own.
_WAITS = (
    "torch/distributed/",
    "torch/autograd/",
    "torch/nn/parallel/",
    "torch/nn/utils/",
    "torch/cuda/",
    "torch/amp/",
)
_STARTER = "torch/distributed/elastic/"
_READS_GPU = re.compile(r"\.(item|tolist|cpu|numpy|synchronize)\(|\bfloat\(")


def ranks_here() -> dict[int, int]:
    """Process id -> rank, of all ranks that a ddp-launch of this machine has started, in rank order."""
    ranks = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error, ValueError, KeyError):  # KeyError: the fork server, which is no rank
            if forked := re.fullmatch(r"ddp-rank(\d+)", process.name()):
                ranks[process.pid] = int(forked[1])
                continue
            environ = process.environ()
            if environ.get(AGENT) == str(process.ppid()):  # not a worker process of a rank
                ranks[process.pid] = int(environ["RANK"])
    return dict(sorted(ranks.items(), key=lambda item: item[1]))


def describe_stack(frames: Sequence[FrameSummary]) -> str:
    """One line: the reader's innermost line, and the function of a library that it called."""
    own, call = own_lines(frames), library_call(frames)
    return " ".join([own[-1] if own else "no line of yours", f"(in {call})" if call else ""]).strip()


def absent_ranks(running: Mapping[int, int], timeout_s: float = 3.0) -> dict[int, str]:
    """Of running ranks (rank -> process id), those that are not in a collective: rank -> "is at" and the
    line. They are what the others wait for."""
    import torch

    gpu = torch.cuda.device_count() > 0

    def look(pid: int) -> str:
        with suppress(psutil.Error):
            if psutil.Process(pid).status() == psutil.STATUS_STOPPED:
                return "is stopped (SIGSTOP)"
        with suppress(UserError):  # py-spy may not look
            frames = stack_of(pid, timeout_s)
            own = [n for n, frame in enumerate(frames) if not is_library(frame.filename)]
            called = [frame.filename for frame in frames[own[-1] + 1 if own else 0 :]]
            waits = (f for f in called if any(sign in f for sign in _WAITS) and _STARTER not in f)
            reads_gpu = gpu and own and _READS_GPU.search(frames[own[-1]].line or "")
            if not any(waits) and not reads_gpu:
                return f"is at {describe_stack(frames)}"
        return ""

    with ThreadPoolExecutor() as pool:
        lines = pool.map(look, running.values())
    return {rank: line for rank, line in zip(running, lines, strict=True) if line}


def print_stacks(timeout_s: float) -> int:
    """Prints a line per rank; 0 if each could be seen."""
    ranks = ranks_here()
    if not ranks:
        raise UserError("no rank of a ddp-launch runs on this machine, as far as this user may see")
    failed = 0
    for pid, rank in ranks.items():
        try:
            print(f"rank {rank} (process {pid}): {describe_stack(stack_of(pid, timeout_s))}", flush=True)
        except UserError as error:
            failed = 2
            print(f"rank {rank} (process {pid}): {error}", file=sys.stderr, flush=True)
    return failed
