"""run_nodes: rehearses a launch on several machines, on this computer, with one agent per "node"."""

import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from ddp_lib.errors import UserError, require_seconds
from ddp_lib.notebook.errors import in_one_line

# Between SIGTERM and SIGKILL; longer than a launcher needs to end its ranks.
_GRACE_S = 8.0


@dataclass(frozen=True)
class NodeResult:
    """How a node's command ended: its exit status (None: still running at the timeout) and its log."""

    node: int
    returncode: int | None
    log: Path

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")


@in_one_line("the commands have")
def run_nodes(
    command: list[str],
    nnodes: int = 2,
    timeout_s: float = 120.0,
    log_dir: str | Path | None = None,
    env: dict[str, str] | None = None,
) -> list[NodeResult]:
    """Runs `command` once per node, all on this computer, and returns how each ended, in node order.

    In each argument and each value of `env`, these are filled in: {node}, {nnodes}, {port} (a free port) and
    {endpoint} (127.0.0.1:port). Each node's output goes to its own file in `log_dir` (default: a new
    temporary folder). Commands that still run after `timeout_s` seconds, or at an interrupt, are ended with
    all processes they started. UserError if the command is not found.
    """
    if not isinstance(nnodes, int) or nnodes < 1:
        raise UserError(f"nnodes is {nnodes!r}: give a number of machines, 1 or more")
    require_seconds("timeout_s", timeout_s)
    folder = Path(log_dir) if log_dir is not None else Path(tempfile.mkdtemp(prefix="nodes-"))
    folder.mkdir(parents=True, exist_ok=True)
    port = _free_port()

    def fill(text: str, node: int) -> str:
        values = {"node": node, "nnodes": nnodes, "port": port, "endpoint": f"127.0.0.1:{port}"}
        for name, value in values.items():
            text = text.replace("{" + name + "}", str(value))
        return text

    # torchrun and ddp-launch are in the same folder as the Python that runs this notebook.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    started: list[subprocess.Popen[bytes]] = []
    logs = [folder / f"node{node}.log" for node in range(nnodes)]
    try:
        for node in range(nnodes):
            own = {name: fill(value, node) for name, value in (env or {}).items()}
            with open(logs[node], "wb") as log:
                process = subprocess.Popen(
                    [fill(word, node) for word in command],
                    env={**os.environ, "PATH": path, **own},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            started.append(process)
        deadline = time.monotonic() + timeout_s
        for process in started:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        return [NodeResult(node, started[node].poll(), logs[node]) for node in range(nnodes)]
    except FileNotFoundError:
        raise UserError(f"{command[0]!r} is not found: install it, or give its path") from None
    finally:
        _end(started)


def _free_port() -> int:
    """A free port, below the range from which operating systems hand out ports.

    A port from that range might be handed out to another program before the master opens it.
    """
    for port in random.sample(range(20000, 30000), 100):
        with suppress(OSError), socket.socket() as server:
            server.bind(("127.0.0.1", port))
            return port
    raise UserError("no free port found on 127.0.0.1 between 20000 and 30000: end the programs that use them")


def _end(started: list[subprocess.Popen[bytes]]) -> None:
    """Sends SIGTERM to the commands that still run; then SIGKILL to what is left, ranks included.

    Ranks have sessions of their own, so they are looked up as descendants.
    """
    running: list[psutil.Process] = []
    for process in started:
        if process.poll() is None:
            node = psutil.Process(process.pid)
            running += [node, *node.children(recursive=True)]
            process.terminate()
    _, alive = psutil.wait_procs(running, _GRACE_S)
    for survivor in alive:
        with suppress(psutil.NoSuchProcess):
            survivor.kill()
    for process in started:
        process.wait(_GRACE_S)
    psutil.wait_procs(alive, timeout=_GRACE_S)
