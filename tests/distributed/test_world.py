"""Joining and leaving the process group."""

import sys

import pytest
import torch

from ddp_lib.distributed.collectives import broadcast_bytes, gather_bytes
from ddp_lib.distributed.coordination import all_gather_results, broadcast_result, compare
from ddp_lib.distributed.world import World
from ddp_lib.errors import UserError
from tests.lab.joining import fork_pairs, four, outcome, start
from tests.lab.ports import free_port


def test_alone_needs_no_group():
    with World.join(environ={}) as world:
        assert (world.rank, world.world_size, world.backend) == (0, 1, "none")
        assert world.sum(torch.ones(2)).tolist() == [1, 1]
        assert broadcast_result(world, "x", lambda: {"a": 1}, 1) == {"a": 1}
        assert all_gather_results(world, "x", lambda: 7, 1) == [7]
        assert broadcast_bytes(world, b"abc") == b"abc" and gather_bytes(world, b"z") == [b"z"]
        compare(world, "data", {"a": 1}, "cure", 1)


def test_alone_has_a_group_for_ddp():
    """And leaves no other's: World() and a second join have none of their own."""
    with World.join(environ={}), World.join(environ={}), World():
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 1))
        model(torch.ones(1, 2)).sum().backward()
        with World.join(environ={}):
            pass
        assert torch.distributed.get_world_size() == 1
        del model
    assert not torch.distributed.is_initialized()


# The device "meta", which holds no data, stands for a GPU.


def test_values_on_another_device_are_refused_in_one_line():
    world = World(device=torch.device("cpu"))
    for call in (world.sum, lambda values: compare(world, "x", {"loss": values}, "cure", 1)):
        with pytest.raises(UserError, match=r"\bon meta\b.*(to\(world.device\)|tolist\(\))"):
            call(torch.zeros(2, device="meta"))


NCCL = "NCCL error in: NCCLUtils.cpp:94, {}\nncclSomeError: of NCCL.\nLast error:\n{}"
TWICE, GONE = "Duplicate GPU detected : rank 1 and rank 0", "Connection closed by remote peer m1<4>"
MESH = "Gloo connectFullMesh failed"


@pytest.mark.parametrize(
    ("said", "line", "status"),
    [
        (NCCL.format("invalid usage", TWICE), f"NCCL could not start ({TWICE}): two ranks have taken", 2),
        (NCCL.format("remote process exited", GONE), f"NCCL could not start ({GONE}): another rank", 75),
        (MESH, f"the ranks could not connect to each other ({MESH}): open all ports", 75),
    ],
)
def test_why_the_group_cannot_start(monkeypatch, said, line, status):
    def fail(*args: object, **kwargs: object) -> None:
        raise torch.distributed.DistBackendError(said)

    monkeypatch.setattr(torch.distributed, "init_process_group", fail)
    with pytest.raises(UserError) as refused:
        World(rank=1, world_size=2, device=torch.device("cpu"))._init_process_group()
    assert str(refused.value).startswith(f"rank 1 reached the master, but {line}")
    assert refused.value.status == status


STUCK = """
import gc, time
gc.collect = lambda: None  # on a busy machine it may take longer than this timeout
import torch.distributed as dist
from ddp_lib import World
dist.is_initialized = lambda: True
def destroy_process_group(): time.sleep(1000)
dist.destroy_process_group = destroy_process_group
World(world_size=2, timeout_s=0.2).leave()
"""


@pytest.mark.ranks
def test_leaving_a_group_that_never_ends_times_out():
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
    print(" ".join(["before:", *threads()]) + "\\n", end="")
    del model
print(" ".join(["after:", *threads()]) + "\\n", end="")
"""


@pytest.mark.ranks
@pytest.mark.skipif(sys.platform != "linux", reason="reads the threads' names in Linux's /proc")
def test_no_thread_of_the_group_outlives_it():
    """One that frees what Python owns while the interpreter goes down would abort it."""
    statuses, text = fork_pairs(THREADS, [free_port()])
    assert statuses == [0, 0], text
    lines = [line.partition(": ") for line in text.splitlines()]
    assert [("gloo" in names, when) for when, _, names in sorted(lines) if when in ("before", "after")] == [
        *[(False, "after")] * 2,
        *[(True, "before")] * 2,
    ], text


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
    statuses, text = fork_pairs(LEAVE.replace("FAIL", str(fail)), [free_port(), free_port()])
    assert statuses == [int(fail)] * 4, text
    assert "terminate called" not in text


REFUSES = """
import sys
from types import SimpleNamespace
import torch
from ddp_lib import UserError, World
first_machine = os.environ["RANK"] == "0"
if os.environ["MASTER_PORT"] == ports[0]:
    if not first_machine:
        os.environ["GLOO_SOCKET_IFNAME"] = "eth9"
elif first_machine:
    torch.cuda.device_count = lambda: 1
    torch.cuda.get_device_properties = lambda number: SimpleNamespace(uuid="GPU-1")
try:
    World.join(join_timeout_s=30)
except UserError as error:
    print(f"rank {os.environ['RANK']} hears: {error}\\n", end="")
    sys.exit(2)
"""


@pytest.mark.ranks
def test_a_machine_that_cannot_take_part_tells_the_others():
    """One whose interface is not there, and one without a GPU where the other has one."""
    statuses, text = fork_pairs(REFUSES, [free_port(), free_port()])
    assert statuses == [2] * 4, text
    for rank in range(2):
        heard = " ".join(line for line in text.splitlines() if line.startswith(f"rank {rank} hears"))
        assert "no interface 'eth9'" in heard and "no GPU of its own" in heard, text
