"""run_ranks: ranks from a cell, their environment, results and output."""

import multiprocessing
import os
import sys

import pytest
import torch
import torch.distributed as dist

from ddp_lib import RankError, World, run_ranks
from tests.lab.ranks import TIMEOUT_S, summed

pytestmark = pytest.mark.ranks


def identity() -> tuple:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    return tuple(os.environ[name] for name in names)


def test_results_come_in_rank_order_with_torchruns_environment():
    assert run_ranks(identity, 3, timeout_s=TIMEOUT_S) == [
        (str(rank), str(rank), "3", "3", "127.0.0.1") for rank in range(3)
    ]


@pytest.mark.parametrize("nproc", [1, 2, 4])
def test_collectives_by_plain_torch(nproc):
    results = run_ranks(summed, nproc, 2.0, timeout_s=TIMEOUT_S)
    assert [r.tolist() for r in results] == [[2.0 * sum(range(nproc))] * 2] * nproc


def test_many_launches_after_each_other():
    for _ in range(20):
        assert len(run_ranks(summed, 2, 1.0, timeout_s=TIMEOUT_S)) == 2


def by_world() -> tuple[int, int]:
    with World.join() as world:
        return world.rank, int(world.sum(torch.ones(1)))


def test_world_joins_as_it_is():
    assert run_ranks(by_world, 2, timeout_s=TIMEOUT_S) == [(0, 2), (1, 2)]


def test_a_closure_and_its_environment_travel(monkeypatch, tmp_path):
    monkeypatch.setenv("FROM_THE_NOTEBOOK", "yes")
    monkeypatch.chdir(tmp_path)
    number = 5
    got = run_ranks(lambda: (number, os.environ["FROM_THE_NOTEBOOK"], os.getcwd()), 1, timeout_s=TIMEOUT_S)
    assert got == [(5, "yes", str(tmp_path))]


def prints_for_ever() -> None:
    while True:
        print("x" * 1000)


def test_a_rank_that_prints_faster_than_it_is_read_is_ended_in_time(capsys):
    with pytest.raises(RankError, match="still running after 1 s"):
        run_ranks(prints_for_ever, 1, timeout_s=1)
    assert " bytes are left out\n" in capsys.readouterr().out


def chatty() -> None:
    rank = os.environ["RANK"]
    print("out", rank)
    print("err", rank, file=sys.stderr)
    os.write(1, f"raw {rank}\n".encode())
    print("no newline", end="")


def test_output_comes_in_rank_order_with_the_rank_in_front(capsys):
    run_ranks(chatty, 2, timeout_s=TIMEOUT_S)
    want = [f"[rank {r}] {w}" for r in "01" for w in (f"out {r}", f"err {r}", f"raw {r}", "no newline")]
    assert capsys.readouterr().out.splitlines() == want


def test_the_debug_level_of_the_environment_holds(monkeypatch):
    def level() -> str:
        return str(dist.get_debug_level().name)

    assert run_ranks(level, 1, timeout_s=TIMEOUT_S) == ["OFF"]
    monkeypatch.setenv("TORCH_DISTRIBUTED_DEBUG", "DETAIL")
    assert run_ranks(level, 1, timeout_s=TIMEOUT_S) == ["DETAIL"]


def test_a_rank_imports_nothing_to_wrap_a_model_in_ddp():
    def imported() -> int:
        before = set(sys.modules)
        dist.init_process_group("gloo")
        torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
        return len(set(sys.modules) - before)

    assert run_ranks(imported, 2, timeout_s=TIMEOUT_S) == [0, 0]


def test_a_rank_collects_garbage_but_not_among_what_was_imported():
    """The fork server loads its modules without garbage collection."""
    import gc

    [(enabled, frozen)] = run_ranks(lambda: (gc.isenabled(), gc.get_freeze_count()), 1, timeout_s=TIMEOUT_S)
    assert enabled and frozen > 100_000


def test_spawn_serves_where_there_is_no_fork_server(monkeypatch):
    import multiprocessing

    from ddp_lib.notebook import rank_pool as local_ranks
    from ddp_lib.processes import forkserver

    def spawn():
        return multiprocessing.get_context("spawn")

    monkeypatch.setattr(local_ranks, "context", spawn)
    monkeypatch.setattr(forkserver, "context", spawn)
    assert [r.tolist() for r in run_ranks(summed, 2, 1.0, timeout_s=TIMEOUT_S)] == [[1.0, 1.0]] * 2


def test_ranks_have_the_platforms_start_method():
    """A DataLoader's workers are forks, if that is the default: data sets of a cell need no pickle."""

    class Numbers:
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return index

    def load():
        from torch.utils.data import DataLoader

        loader = DataLoader(Numbers(), batch_size=2, num_workers=1)
        return multiprocessing.get_start_method(), [batch.tolist() for batch in loader]

    ((method, batches),) = run_ranks(load, 1, timeout_s=TIMEOUT_S)
    assert method == multiprocessing.get_all_start_methods()[0]  # the first is the default
    assert batches == [[0, 1], [2, 3]]
