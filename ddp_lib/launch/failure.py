"""How a rank ended, in one line: from its exit status, what it wrote about it, and its log."""

import json
import re
import shutil
import signal
import socket
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.elastic.multiprocessing.api import LogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from ddp_lib.errors import MAY_PASS, NO_SHM, PEER_GONE, WILL_FAIL_AGAIN, gpu_cause
from ddp_lib.launch.rank_log import RankLogs, last_exception, read_tail, split_fatal
from ddp_lib.processes.exit_status import first_cause
from ddp_lib.processes.memory import OOM_KILLS, oom_kills

# What Python raises if the program itself is wrong: it will be so at the next start.
_WRONG_PROGRAM = ("SyntaxError", "IndentationError", "ImportError", "ModuleNotFoundError", "NameError")
_PEER_ERROR = "ddp_lib.errors.PeerError"
# The package's own errors, as a traceback names them, and their exit status.
_OWN = {
    "ddp_lib.errors.UserError": WILL_FAIL_AGAIN,
    "ddp_lib.errors.TransientError": MAY_PASS,
    "ddp_lib.distributed.store.PortTaken": MAY_PASS,
    _PEER_ERROR: MAY_PASS,
}
# What NCCL's watchdog says before it aborts the process, on ranks that only waited too.
_WATCHDOG = (
    "Watchdog caught collective",
    "Terminating the process after attempting to dump debug info",
    "Received a dump signal",
)
# Characters at the end of a log in which it stands. Seconds between an exception and the failure of the ranks
# that wait for this one.
_LAST, _JUST_S = 20_000, 10.0


class RankFailure(NamedTuple):
    """consequence: 0 for a cause, 1 if the rank only lost another, 2 if its launcher ended it. waited: if
    it waited for a rank that did not come, or was gone, and does not know which."""

    rank: int
    time: float  # Unix time
    consequence: int
    line: str
    status: int
    waited: bool = False


def cause_of(
    failures: dict[int, ProcessFailure], logs: LogsSpecs, ended: Collection[int] = ()
) -> RankFailure:
    """The failure that came first, of those by global rank; names its log if there is one. ended: ranks that
    the launcher has ended."""
    paths = logs.paths if isinstance(logs, RankLogs) else {}
    read = [read_failure(r, process, paths.get(r)) for r, process in failures.items() if r not in ended]
    # Of an ended rank an exception counts if it had just raised it, and not one that it caught long ago.
    since = min((failure.time for failure in read), default=0.0) - _JUST_S
    read += [read_failure(r, process, paths.get(r), since) for r, process in failures.items() if r in ended]
    cause = first_cause(read)
    return cause._replace(line=cause.line + name_log(cause.rank, logs))


def say_where(text: str) -> str:
    """The text with this machine's name in front, unless it names it already."""
    host = socket.gethostname()
    return text if host in re.split(r"[^\w.-]+", text) else f"{host}: {text}"


def name_log(rank: int, logs: LogsSpecs) -> str:
    """Where the rank's whole log is, to append to a line; empty if it has none of its own."""
    paths = logs.paths if isinstance(logs, RankLogs) else {}
    if rank not in paths:
        return ""
    full = False
    with suppress(OSError):  # the folder is gone
        full = shutil.disk_usage(paths[rank].parent).free == 0
    return f"; its log: {paths[rank].resolve()}" + (", whose disk is full" if full else "")


def drop_half_written(error_file: Path) -> None:
    """torch would raise what it cannot read: a script's own torch.distributed.elastic record() may have been
    killed while it wrote, or met a full disk."""
    try:
        json.loads(error_file.read_bytes())
    except FileNotFoundError:
        return
    except (OSError, ValueError):
        with suppress(OSError):
            error_file.unlink()


def read_failure(
    rank: int, process: ProcessFailure, log: Path | None = None, ended_since: float | None = None
) -> RankFailure:
    """From the process's status, the error file that the rank may have written (see exit_status.py), and the
    end of its log. ended_since: given if the launcher has ended it; an exception before that time is not why.
    """
    ended = ended_since is not None
    code, name = process.exitcode, f"rank {rank} on {socket.gethostname()}"
    status = code if code >= 0 else 128 - code
    at, consequence = process.timestamp + 1.0, 0  # for a rank that wrote nothing, torch gives whole seconds
    if log and log.exists():
        at = log.stat().st_mtime  # of what it printed last
    text, fatal = split_fatal(read_tail(log) if log else "", died=code < 0)
    exception = last_exception(text)
    message: dict[str, Any] = process.message if isinstance(process.message, dict) else {}
    extra = message.get("extraInfo", {})
    reported, waited = "consequence" in extra, False
    raised = exception is not None and exception.at_end and at >= (ended_since or 0.0)
    if reported:
        at, consequence = float(extra["time"]), int(bool(extra["consequence"]))
        line = " ".join(str(message["message"]).split())
        heard = line.startswith("rank ")  # from the rank that it lost
        told = line.removeprefix(f"{socket.gethostname()}: ")
        line, waited = line if heard else f"{name}: {told}", bool(consequence) and not heard
        status = int(extra.get("status", status))
    elif exception and raised and (code in (1, -signal.SIGABRT) or ended):
        kind, _, said = exception.line.partition(": ")
        where = f" ({exception.where})" if exception.where and kind not in _OWN else ""
        of_gpu = gpu_cause(exception.text.removeprefix(f"{kind}: "))
        told = ": ".join([kind, *(of_gpu or [said])]) if said else kind
        line = f"{name}: {said if kind in _OWN else told}{where}"
        if exception.inside.endswith("multiprocessing/synchronize.py"):  # its semaphores lie there
            line += f": {NO_SHM}"
        status = _OWN.get(kind, WILL_FAIL_AGAIN if kind in _WRONG_PROGRAM else 1)
        if kind == _PEER_ERROR:  # another rank's, heard from it
            line, consequence = said, 1
        elif exception.lost_a_peer:
            consequence, status, waited = 1, MAY_PASS, True
    elif code == -signal.SIGKILL:
        line = f"{name} died of SIGKILL: {_why_killed()}"
    elif code == -signal.SIGABRT and any(sign in text[-_LAST:] for sign in (*PEER_GONE, *_WATCHDOG)):
        consequence, status, waited = 1, MAY_PASS, True
        line = f"{name} timed out waiting for another rank, or lost it: NCCL's watchdog ended it (SIGABRT)"
    elif code == -signal.SIGABRT and "terminate called without an active exception" in text:
        # gloo's threads still ran when the process ended, as after another rank's failure.
        consequence = 1
        line = f"{name} died of SIGABRT at its end: let go of the DDP model (del, gc.collect()) before "
        line += "dist.destroy_process_group(), as examples/own_script/ddp.py does"
    elif code < 0:
        # Without a log: perhaps NCCL's watchdog.
        consequence = int(code == -signal.SIGABRT and log is None)
        waited = bool(consequence) and torch.cuda.device_count() > 0
        line = f"{name} died of {process.signal_name()}" + (f" at {fatal}" if fatal else "")
        if cause := gpu_cause("".join(text[-_LAST:].rpartition("NCCL error")[1:])):
            line += f" ({cause[0]}): {cause[1]}"
    elif code - 128 in (signal.SIGINT, signal.SIGTERM):
        line = f"{name} was stopped by {signal.Signals(code - 128).name}"
    elif log:
        last = text.strip().rpartition("\n")[2][:200]
        line = f"{name} ended with status {code}" + (f"; it printed last: {last}" if last else "")
        if code == 1 and last.partition(":")[0] in _WRONG_PROGRAM:
            status = WILL_FAIL_AGAIN
    else:
        line = f"{name} ended with status {code}; its output stands above"
    if ended and not reported and not raised:
        consequence, waited = 2, False
    return RankFailure(rank, at, consequence, line, status, waited)


def _why_killed() -> str:
    if oom_kills() > OOM_KILLS:
        return (
            "out of memory, as the kernel's counter of such kills says; lower the batch size, or start fewer "
            "ranks"
        )
    return "killed by hand, or for want of memory"
