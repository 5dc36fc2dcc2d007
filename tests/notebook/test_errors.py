"""A rank that fails, dies or hangs: one short text that names it."""

import os
import signal
import sys

import pytest
import torch
import torch.distributed as dist

from ddp_lib import RankError, UserError, run_ranks
from ddp_lib.notebook.rank_pool import root_cause
from tests.lab.ranks import TIMEOUT_S

pytestmark = pytest.mark.ranks


def identity() -> tuple:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    return tuple(os.environ[name] for name in names)


def fails_on_one() -> None:
    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        raise ValueError("on purpose")
    dist.barrier()


def test_an_exception_names_the_rank_and_the_own_line():
    with pytest.raises(RankError) as caught:
        run_ranks(fails_on_one, 3, timeout_s=TIMEOUT_S)
    assert caught.value.rank == 1
    first, *lines = str(caught.value).splitlines()
    assert first == "rank 1: ValueError: on purpose"
    assert len(lines) == 1 and 'raise ValueError("on purpose")' in lines[0]


@pytest.mark.parametrize("text", ["rank {}: bad", "rank {}: no gradients for rank {}"])
def test_of_equal_errors_that_of_the_lowest_rank_counts(text):
    errors = [RankError(rank, text.format(rank, rank), failed_at=5.0 - rank) for rank in (0, 1, 2)]
    assert root_cause(errors) is errors[0]
    assert root_cause([*errors, RankError(3, "rank 3: other", failed_at=1.0)]).rank == 3


def mismatched() -> None:
    dist.init_process_group("gloo")
    dist.all_reduce(torch.ones(3 + 1000 * dist.get_rank()))


def test_a_death_by_a_signal(capsys):
    with pytest.raises(RankError, match=r"rank \d: died of SIGABRT"):
        run_ranks(mismatched, 2, timeout_s=TIMEOUT_S)


def killed() -> None:
    dist.init_process_group("gloo")
    if dist.get_rank() == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def test_a_killed_rank_is_the_cause_and_not_its_peer():
    with pytest.raises(RankError, match="rank 0: died of SIGKILL"):
        run_ranks(killed, 2, timeout_s=TIMEOUT_S)


def hangs() -> None:
    dist.init_process_group("gloo")
    if dist.get_rank() == 0:
        dist.barrier()
    else:
        while True:
            pass


def test_a_hang_says_where_each_rank_stands():
    with pytest.raises(RankError) as caught:
        run_ranks(hangs, 2, timeout_s=3)
    text = str(caught.value)
    assert text.startswith("still running after 3 s\nrank 0 is in barrier\n")
    assert "dist.barrier()" in text and "rank 1 runs its own code" in text


def test_what_cannot_work_is_refused():
    import threading

    lock = threading.Lock()
    for call, says in [
        (lambda: run_ranks(identity, 0), "nproc is 0"),
        (lambda: run_ranks(identity, 2, timeout_s=0), "timeout_s is 0"),
        (lambda: run_ranks(lambda: lock, 1), "cannot be sent"),
    ]:
        with pytest.raises(UserError, match=says) as refused:
            call()
        assert "\n" not in str(refused.value)


def unsendable():
    import threading

    return threading.Lock()


def test_a_result_that_cannot_be_sent():
    with pytest.raises(RankError, match="rank 0: TypeError: what the function returned"):
        run_ranks(unsendable, 1, timeout_s=TIMEOUT_S)


def closes_its_output() -> int:
    sys.stdout.close()
    return 1


def test_a_function_may_close_its_output():
    assert run_ranks(closes_its_output, 1, timeout_s=TIMEOUT_S) == [1]
