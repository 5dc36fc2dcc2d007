"""Joining and leaving the process group, and what is said when the ranks do not come together."""

import os
import platform
import resource
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch

from ddp_lib.distributed.addresses import Endpoint, first_hit
from ddp_lib.distributed.coordination import broadcast_bytes, gather_bytes
from ddp_lib.distributed.device import choose_backend, keep_freed_memory, thread_budget
from ddp_lib.distributed.store import reach_store
from ddp_lib.distributed.world import World
from ddp_lib.errors import UserError
from ddp_lib.notebook.run_ranks import run_ranks

JOIN = """
import sys
from ddp_lib import UserError, World
import torch
try:
    with World.join(join_timeout_s=float(sys.argv[1])) as world:
        print("sum", int(world.sum(torch.ones(1))), "of", world.world_size)
except UserError as error:
    print("refused:", error, file=sys.stderr)
    sys.exit(2)
"""
LIMIT_S = 60


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(join_timeout_s: float = 30, code: str = JOIN, **variables) -> subprocess.Popen:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MASTER_", "RANK", "WORLD_"))}
    env |= {k: str(v) for k, v in variables.items()}
    return subprocess.Popen(
        [sys.executable, "-c", code, str(join_timeout_s)],
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def outcome(process: subprocess.Popen) -> tuple[int, str]:
    text, _ = process.communicate(timeout=LIMIT_S)
    return process.returncode, text


def four(rank: int, port: int, world_size: int = 2, host: str = "127.0.0.1") -> dict:
    return {"RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": host, "MASTER_PORT": port}


def test_choose_backend():
    assert choose_backend("auto", 2, 0)[0] == "gloo"
    assert choose_backend("auto", 2, 1)[0] == "gloo"  # one GPU, two ranks in a notebook
    assert choose_backend("auto", 2, 2)[0] == "nccl"
    assert choose_backend("gloo", 1, 8)[0] == "gloo"
    with pytest.raises(UserError, match="--backend gloo"):
        choose_backend("nccl", 2, 1)
    with pytest.raises(UserError, match="mpi"):
        choose_backend("mpi", 1, 1)


def test_thread_budget():
    cores = len(os.sched_getaffinity(0))
    assert thread_budget(1) == cores
    assert thread_budget(10 * cores) == 1


def page_faults() -> int:
    """While 4 blocks of 8 MB are allocated, filled and freed, 20 times."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        blocks = [torch.ones(2**23, dtype=torch.uint8) for _ in range(4)]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.ranks
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc: nothing to set")
def test_freed_memory_is_kept():
    def before_and_after() -> tuple[int, int]:
        plain = page_faults()
        assert keep_freed_memory()
        page_faults()
        return plain, page_faults()

    ((plain, kept),) = run_ranks(before_and_after, 1, timeout_s=LIMIT_S)
    assert 10 * kept < plain


def test_alone_needs_no_group():
    with World.join(environ={}) as world:
        assert (world.rank, world.world_size, world.backend) == (0, 1, "none")
        assert world.sum(torch.ones(2)).tolist() == [1, 1]
        assert world.from_main("x", lambda: {"a": 1}, 1) == {"a": 1}
        assert world.from_all("x", lambda: 7, 1) == [7]
        assert broadcast_bytes(world, b"abc") == b"abc" and gather_bytes(world, b"z") == [b"z"]
        world.compare("data", {"a": 1}, "cure", 1)


STUCK = """
import time
import torch.distributed as dist
from ddp_lib import World
dist.is_initialized = lambda: True
def destroy_process_group(): time.sleep(1000)
dist.destroy_process_group = destroy_process_group
World(world_size=2, timeout_s=0.2).leave()
"""


@pytest.mark.ranks
def test_a_group_that_never_ends():
    status, text = outcome(start(code=STUCK))
    assert status == 1
    assert "Timeout" in text and "in destroy_process_group" in text and "in leave" in text


@pytest.mark.ranks
def test_the_worker_may_be_started_first():
    port = free_port()
    worker = start(**four(1, port))
    master = start(**four(0, port))
    assert outcome(master)[0] == 0
    code, text = outcome(worker)
    assert (code, text.strip()) == (0, "sum 2 of 2")


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"MASTER_ADDR": "no-such-host.invalid"},
            "MASTER_ADDR='no-such-host.invalid' does not resolve",
        ),
        ({}, "nobody listens on MASTER_ADDR=127.0.0.1"),
    ],
)
def test_no_master(changes, says):
    code, text = outcome(start(1, **(four(1, free_port()) | changes)))
    assert code == 2
    assert says in text and "--join-timeout-s" in text and text.count("\n") == 1


THREADS = """
import torch
from pathlib import Path
from torch.nn.parallel import DistributedDataParallel
from ddp_lib import World
def threads():
    return [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]
with World.join() as world:
    model = DistributedDataParallel(torch.nn.Linear(2, 2))
    model(torch.ones(1, 2)).sum().backward()
    print("before:", *threads())
    del model
print("after:", *threads())
"""


@pytest.mark.ranks
@pytest.mark.skipif(sys.platform != "linux", reason="reads the threads' names in Linux's /proc")
def test_no_thread_of_the_group_outlives_it():
    """One that frees what Python owns while the interpreter goes down would abort it."""
    port = free_port()
    for process in [start(code=THREADS, **four(rank, port)) for rank in (0, 1)]:
        code, text = outcome(process)
        before, _, after = text.partition("after:")
        assert code == 0 and "gloo" in before and after and "gloo" not in after


@pytest.mark.ranks
def test_a_rank_is_missing():
    port = free_port()
    present = [start(8, **four(rank, port, 3)) for rank in (0, 2)]
    for process in present:
        code, text = outcome(process)
        assert code == 2 and "rank(s) 1 of 3" in text


@pytest.mark.ranks
def test_two_masters():
    """The second comes while the first waits for rank 1, and finds the port taken."""
    port = free_port()
    first = start(LIMIT_S, **four(0, port))
    try:
        assert first_hit(lambda: listens(port), time.monotonic() + LIMIT_S)
        code, text = outcome(start(**four(0, port)))
        assert code == 2 and f"MASTER_PORT={port} cannot be opened" in text
        assert first.poll() is None
    finally:
        first.kill()
        first.communicate()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.ranks
def test_two_ranks_with_one_number():
    """All end, for a third is missing; and the second, at least, finds its number taken."""
    port = free_port()
    started = [start(LIMIT_S, **four(rank, port, 3)) for rank in (0, 1, 1)]
    codes, texts = zip(*map(outcome, started), strict=True)
    assert codes == (2, 2, 2)
    assert any("RANK=1 is taken" in text for text in texts[1:])


@pytest.mark.ranks
def test_world_sizes_differ():
    port = free_port()
    started = [start(8, **four(rank, port, size)) for rank, size in ((0, 3), (1, 2))]
    for process in started:
        code, text = outcome(process)
        assert code == 2 and "WORLD_SIZE=" in text and "on every machine" in text


@pytest.mark.ranks
def test_another_program_has_the_port():
    """It sends garbage to whoever connects."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(LIMIT_S)

        def serve() -> None:
            try:
                while True:
                    peer, _ = server.accept()
                    with peer:
                        peer.sendall(b"SSH-2.0-garbage\r\n")
            except OSError:
                return

        threading.Thread(target=serve, daemon=True).start()
        port = server.getsockname()[1]
        code, text = outcome(start(3, **four(1, port)))
        assert code == 2 and f"MASTER_PORT={port}" in text and text.count("\n") == 1
        code, text = outcome(start(3, **four(0, port)))
        assert code == 2 and f"MASTER_PORT={port} cannot be opened" in text


@pytest.mark.ranks
def test_a_silent_program_has_the_port():
    """It accepts every connection and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code, text = outcome(start(2, **four(1, port)))
        assert code == 2 and f"MASTER_PORT={port}" in text and text.count("\n") == 1


def test_nothing_of_a_failed_attempt_goes_on():
    """The thread in which torch waits for a word would abort a process that ends."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(UserError, match="silent"):
            reach_store(Endpoint("127.0.0.1", port), 1, True)
        assert all(thread.name != "store" for thread in threading.enumerate())


LOOK = """
import socket, threading, time
import torch.distributed as dist
from ddp_lib.distributed.addresses import Endpoint
from ddp_lib.distributed.store import _look_for_rival

server = socket.create_server(("127.0.0.1", 0))
endpoint = Endpoint("127.0.0.1", server.getsockname()[1])
look = (endpoint, "job", dist.HashStore(), "me", time.monotonic() + 600)
threading.Thread(target=_look_for_rival, args=look).start()
for _ in range(2):  # the first asks whether anybody listens, the second is torch's
    server.accept()
"""


@pytest.mark.ranks
def test_the_look_for_another_rank_0_ends_with_the_process():
    """Also where the program at MASTER_ADDR never says a word."""
    subprocess.run([sys.executable, "-c", LOOK], timeout=LIMIT_S, check=True)


@pytest.mark.ranks
def test_garbage_sent_to_the_master_does_not_stop_it():
    port = free_port()
    master = start(30, **four(0, port))
    sent = False
    while not sent:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=5) as stray:
                stray.sendall(b"GET / HTTP/1.1\r\n\r\n" * 50)
            sent = True
        except ConnectionRefusedError:
            assert master.poll() is None
    assert outcome(start(30, **four(1, port)))[0] == 0
    assert outcome(master)[0] == 0


LEAVE = """
import torch, torch.nn as nn
from torch.nn.parallel import DistributedDataParallel as DDP
from ddp_lib import World

def train():
    net = DDP(nn.Sequential(nn.Linear(50, 50), nn.Linear(50, 1)))
    for _ in range(3):
        net(torch.ones(4, 50)).sum().backward()
    if FAIL:
        raise KeyError("on purpose")

with World.join(join_timeout_s=30) as world:
    train()
"""


@pytest.mark.ranks
@pytest.mark.parametrize("fail", [False, True])
def test_a_model_left_in_a_function_does_not_abort_at_exit(fail):
    for _ in range(2):
        port = free_port()
        code = LEAVE.replace("FAIL", str(fail))
        started = [start(30, code, **four(rank, port)) for rank in (0, 1)]
        for process in started:
            status, text = outcome(process)
            assert status == (1 if fail else 0), text
            assert "terminate called" not in text
