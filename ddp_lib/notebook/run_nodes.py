"""run_nodes: the launch on several machines, rehearsed on this computer with an agent a "node"."""

import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from ddp_lib.errors import UserError

# Between SIGTERM and SIGKILL: longer than a launcher takes to end its ranks.
_GRACE_S = 8.0


@dataclass(frozen=True)
class NodeResult:
    """How a node's command ended: its exit status (None: ended at the time limit), its log."""

    node: int
    returncode: int | None
    log: Path

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")


def run_nodes(
    command: list[str],
    nnodes: int = 2,
    timeout_s: float = 120.0,
    log_dir: str | Path | None = None,
    env: dict[str, str] | None = None,
) -> list[NodeResult]:
    """Runs `command` once a node, all on this computer, and returns how each ended, in node order.

    In each argument and value of `env`, {node}, {nnodes}, {port} (a free one), and {endpoint}
    (127.0.0.1:port) are filled in. Each node's output is in its own file in `log_dir` (default: a
    new temporary folder). Whatever still runs after `timeout_s` seconds, or at an interrupt, is
    ended with all processes it started. UserError for a command that cannot be started.
    """
    if nnodes < 1:
        raise UserError(f"nnodes is {nnodes}: give a number of machines, 1 or more")
    folder = Path(log_dir) if log_dir is not None else Path(tempfile.mkdtemp(prefix="nodes-"))
    folder.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    # torchrun and ddp-launch stand beside the Python that runs this notebook.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    started: list[subprocess.Popen[bytes]] = []
    logs = [folder / f"node{node}.log" for node in range(nnodes)]
    try:
        for node in range(nnodes):
            known = {"node": node, "nnodes": nnodes, "port": port, "endpoint": f"127.0.0.1:{port}"}

            def fill(text: str, known: dict[str, object] = known) -> str:
                for name, value in known.items():
                    text = text.replace("{" + name + "}", str(value))
                return text

            with open(logs[node], "wb") as log:
                started.append(
                    subprocess.Popen(
                        [fill(word) for word in command],
                        env={
                            **os.environ,
                            "PATH": path,
                            **{name: fill(value) for name, value in (env or {}).items()},
                        },
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
        deadline = time.monotonic() + timeout_s
        for process in started:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                continue
        ends = [process.poll() for process in started]
    except FileNotFoundError:
        raise UserError(f"{command[0]!r} is not found: install it, or give its path") from None
    finally:
        _end(started)
    return [NodeResult(node, ends[node], logs[node]) for node in range(nnodes)]


def _free_port() -> int:
    """Below the range from which systems pick ports themselves, or one of them might be this one by
    the time that the master opens it."""
    for port in random.sample(range(20000, 30000), 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue
    raise UserError("no free port found on 127.0.0.1 between 20000 and 30000: end what has them")


def _end(started: list[subprocess.Popen[bytes]]) -> None:
    """SIGTERM to what still runs, then SIGKILL; also to ranks, which have sessions of their own."""
    families: list[psutil.Process] = []
    for process in started:
        if process.poll() is None:
            node = psutil.Process(process.pid)
            families += [node, *node.children(recursive=True)]
            process.terminate()
    _, alive = psutil.wait_procs(families, timeout=_GRACE_S if families else 0)
    for left in alive:
        try:
            left.kill()
        except psutil.NoSuchProcess:
            continue
    for process in started:
        process.wait(_GRACE_S)
    psutil.wait_procs(alive, timeout=_GRACE_S)
