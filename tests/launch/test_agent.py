"""The ranks that ddp-launch starts, and starts again."""

import json
from unittest.mock import Mock

import pytest
from torch.distributed.elastic.agent.server.api import RunResult, WorkerState
from torch.distributed.elastic.multiprocessing.api import MultiprocessContext

from ddp_lib.distributed.device import thread_budget
from ddp_lib.errors import UserError
from ddp_lib.launch.agent import Agent
from tests.lab.ports import free_port
from tests.lab.processes import HOST, end

NAMES = """RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK MASTER_ADDR OMP_NUM_THREADS
TORCHELASTIC_RESTART_COUNT""".split()


@pytest.mark.ranks
def test_each_rank_gets_its_variables_and_its_part_of_the_cores(start, tmp_path):
    process = start('note("env", json.dumps(dict(os.environ)))\nprint("hello")', "--nproc-per-node", "2")
    status, out, err = end(process)
    cores = thread_budget(2)
    assert (status, err) == (0, [])
    assert out.splitlines() == [
        f"ddp-launch: starting 2 rank(s) on {HOST}, OMP_NUM_THREADS={cores} per rank",
        "hello",
        "hello",
    ]
    for rank in range(2):
        env = json.loads((tmp_path / f"env{rank}").read_text())
        assert [env[name] for name in NAMES] == [
            str(rank), str(rank), "2", "2", "0", "127.0.0.1", str(cores), "0",
        ]  # fmt: skip
        assert 1 <= int(env["MASTER_PORT"]) <= 65535
        # The ranks' store is their own: the agent's would still hold a dead attempt's keys.
        assert env["TORCHELASTIC_USE_AGENT_STORE"] == "False"


@pytest.mark.ranks
def test_a_rank_is_a_fork_that_may_use_gpus_and_has_its_own_name_and_threads(start, tmp_path):
    """CUDA refuses forks of a process that has asked for GPUs, even if only for their number."""
    lines = """
import gc, psutil, torch
assert gc.isenabled()  # the fork server loads its modules without it
me = psutil.Process()
said = [torch.cuda._is_in_bad_fork(), me.name(), torch.get_num_threads(), me.ppid()]
note("is", json.dumps(said))
"""
    status, _, err = end(start(lines, "--nproc-per-node", "2"))
    assert (status, err) == (0, [])
    first, second = (json.loads((tmp_path / f"is{rank}").read_text()) for rank in range(2))
    cores = thread_budget(2)
    assert first[:3] == [False, "ddp-rank0", cores] and second[:3] == [False, "ddp-rank1", cores]
    assert first[3] == second[3]


@pytest.mark.ranks
def test_a_thread_that_never_ends_is_left(start):
    lines = "import threading\nthreading.Thread(target=for_ever, name='forever').start()"
    status, _, err = end(start(lines, "--grace-s=0.1"))
    assert status == 0
    assert err == ["[rank 0] thread forever of the model still runs 0.1 s after the end: left"]


@pytest.mark.ranks
def test_two_agents_join_at_the_endpoint(start, tmp_path):
    flags = ("--nnodes=2", "--nproc-per-node=1", f"--rdzv-endpoint=127.0.0.1:{free_port()}")
    lines = 'note("env", json.dumps(dict(os.environ)))'
    both = [start(lines, *flags) for _ in range(2)]
    assert [end(process)[0::2] for process in both] == [(0, []), (0, [])]
    envs = [json.loads((tmp_path / f"env{rank}").read_text()) for rank in range(2)]
    assert [env["GROUP_RANK"] for env in envs] == ["0", "1"]
    assert {(env["WORLD_SIZE"], env["LOCAL_RANK"]) for env in envs} == {("2", "0")}
    assert {env["MASTER_ADDR"] for env in envs} == {"127.0.0.1"}
    assert len({env["MASTER_PORT"] for env in envs}) == 1


@pytest.mark.ranks
def test_a_restart_is_one_line(start):
    lines = """
if rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    with as_exit_status() as outcome:
        raise UserError("the first time it fails")
    sys.exit(outcome.status)
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    for_ever()
"""
    status, _, err = end(start(lines, "--nproc-per-node=2", "--max-restarts=3"))
    assert status == 0
    assert err == [
        f"ddp-launch: rank 1 on {HOST}: the first time it fails; "
        "starting the ranks again, 1 of at most 3 times"
    ]


def test_a_forked_rank_that_left_with_status_0_is_named(monkeypatch):
    """As by os._exit(0) in a model: torch's agent would wait for ever for what it returns."""
    agent = Agent.__new__(Agent)
    agent._pcontext = Mock(spec=MultiprocessContext)
    agent._worker_group = Mock(workers=[Mock(global_rank=4), Mock(global_rank=5)])
    monkeypatch.setattr(agent, "_exit_codes", lambda: {0: None, 1: 0}, raising=False)
    running = RunResult(state=WorkerState.HEALTHY)
    agent._refuse_early_end(running)  # just now: those that wait for it may say so first
    agent.left_s = 0.0 - 1e9
    with pytest.raises(
        UserError, match=r"rank\(s\) 5 on .* ended with status 0 before the training was done"
    ):
        agent._refuse_early_end(running)
    agent._refuse_early_end(RunResult(state=WorkerState.SUCCEEDED))
