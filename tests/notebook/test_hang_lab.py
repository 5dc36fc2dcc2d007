"""hang_lab: how each rank of a case that fails ended, in words that do not change."""

import time

import pytest
import torch
import torch.distributed as dist

from ddp_lib.notebook.errors import readable
from ddp_lib.notebook.hang_lab import hang_lab


def test_a_message_is_the_same_in_each_run():
    closed = "[/pytorch/gloo/tcp/pair.cc:561] Connection {} by peer [127.0.0.1]:18851. GLHF!"
    assert {readable(closed.format(how)) for how in ("closed", "reset")} == {"Connection closed by peer"}
    assert readable("[/a/b.cc:1] Timed out\n Original exception: x") == "Timed out"


def only_rank_0_joins_in(rank: int) -> int:
    if rank == 0:
        dist.all_reduce(torch.ones(1))
    return rank


@pytest.mark.ranks
def test_each_rank_s_end_is_named():
    assert hang_lab(lambda rank: None) == "rank 0: went on\nrank 1: went on"
    lines = hang_lab(only_rank_0_joins_in).splitlines()
    assert lines[0].startswith("rank 0: Timed out waiting 1000ms") and lines[1] == "rank 1: went on: 1"


def rank_0_waits(rank: int) -> None:
    if rank == 0:
        dist.all_reduce(torch.ones(1))
    time.sleep(100)


@pytest.mark.ranks
def test_the_line_of_the_case_is_named():
    said = hang_lab(rank_0_waits, (100, 100), timeout_s=3)
    assert "rank 0 is in all_reduce" in said and "rank 1 runs its own code" in said
    assert "in rank_0_waits: time.sleep(100)" in said and "in_group" not in said
