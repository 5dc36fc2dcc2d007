"""The environment is read, or refused with one line, before any socket opens."""

import pytest

from ddp_lib import World
from ddp_lib.distributed.device import require_threads
from ddp_lib.distributed.environment import (
    RankEnv,
    first_host,
    read_rank_env,
    size_variable,
    tasks_per_node,
)
from ddp_lib.errors import UserError

FOUR = {"MASTER_ADDR": "m", "MASTER_PORT": "29500", "WORLD_SIZE": "4", "RANK": "3"}
SLURM = {
    "SLURM_JOB_ID": "17",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
}


def test_without_variables_a_rank_is_alone():
    assert read_rank_env({}) == RankEnv()


def test_four_variables_mean_one_process_a_machine():
    rank_env = read_rank_env(FOUR)
    assert (rank_env.rank, rank_env.world_size, rank_env.local_rank, rank_env.local_world_size) == (
        3,
        4,
        0,
        1,
    )
    assert (rank_env.node, rank_env.master_addr, rank_env.master_port) == (3, "m", 29500)


def test_torchruns_variables_are_read():
    rank_env = read_rank_env(FOUR | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1"})
    assert (rank_env.local_rank, rank_env.local_world_size, rank_env.node) == (1, 2, 1)


def test_slurm_in_a_job_step():
    rank_env = read_rank_env(SLURM)
    assert (rank_env.rank, rank_env.world_size, rank_env.local_rank, rank_env.local_world_size) == (
        3,
        4,
        1,
        2,
    )
    assert (rank_env.node, rank_env.master_addr, rank_env.source) == (1, "gpu07", "SLURM")
    assert 1024 < rank_env.master_port < 32768


def test_in_an_allocation_a_wait_in_vain_names_slurms_variables():
    assert read_rank_env(FOUR).hint == ""
    hint = read_rank_env(SLURM).hint
    assert "SLURM_PROCID=3 and SLURM_NTASKS=4" in hint and "`unset SLURM_PROCID`" in hint
    alone = {name: value for name, value in SLURM.items() if name != "SLURM_PROCID"}
    assert read_rank_env(alone) == RankEnv()  # the cure


def test_sbatch_script_is_no_step():
    outside = {k: v for k, v in SLURM.items() if k not in ("SLURM_STEP_ID", "SLURM_PROCID")}
    assert read_rank_env(outside) == RankEnv()


def test_rank_wins_over_slurm_and_flags_over_both():
    assert read_rank_env(SLURM | FOUR).source == "environment"
    assert read_rank_env(SLURM | FOUR, rank=1, world_size=2).rank == 1


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"RANK": None}, ["RANK is not set"]),
        ({"WORLD_SIZE": None}, ["WORLD_SIZE is not set"]),
        ({"MASTER_ADDR": None}, ["MASTER_ADDR is not set"]),
        ({"MASTER_ADDR": " "}, ["MASTER_ADDR"]),
        ({"MASTER_PORT": None}, ["MASTER_PORT is not set", "29500"]),
        ({"RANK": "one"}, ["RANK='one'"]),
        ({"RANK": ""}, ["RANK is empty"]),
        ({"RANK": "4"}, ["RANK=4", "0 to 3"]),
        ({"RANK": "-1"}, ["RANK=-1"]),
        ({"WORLD_SIZE": "two"}, ["WORLD_SIZE='two'"]),
        ({"WORLD_SIZE": "0"}, ["WORLD_SIZE=0"]),
        ({"MASTER_PORT": "ssh"}, ["MASTER_PORT='ssh'", "1 to 65535"]),
        ({"MASTER_PORT": "0"}, ["MASTER_PORT='0'"]),
        ({"MASTER_PORT": "65536"}, ["MASTER_PORT='65536'"]),
        ({"LOCAL_WORLD_SIZE": "5"}, ["LOCAL_WORLD_SIZE=5"]),
        ({"LOCAL_RANK": "1"}, ["LOCAL_RANK=1", "LOCAL_WORLD_SIZE=1"]),
        ({"RANK": None, "WORLD_SIZE": None}, ["MASTER_ADDR='m'", "RANK"]),
        (
            {"MASTER_ADDR": "10.0.0.1:29500"},
            ["MASTER_ADDR='10.0.0.1:29500'", "29500, belongs into MASTER_PORT"],
        ),
        ({"MASTER_ADDR": "[fd88::1]:29500"}, ["29500, belongs into MASTER_PORT"]),
        ({"MASTER_ADDR": "tcp://m"}, ["MASTER_ADDR='tcp://m'", "leave out tcp://"]),
        ({"MASTER_ADDR": "root@m"}, ["leave out root@"]),
        ({"MASTER_ADDR": "fe80::1%eth0"}, ["link-local"]),
        ({"MASTER_ADDR": "m n"}, ["one host name or address"]),
    ],
)
def test_refused_with_one_line(changes, named):
    env = {k: v for k, v in (FOUR | changes).items() if v is not None}
    with pytest.raises(UserError) as refused:
        read_rank_env(env)
    line = str(refused.value)
    assert "\n" not in line
    for part in named:
        assert part in line


def test_an_ipv6_address_may_have_brackets():
    assert read_rank_env(FOUR, master_addr="[fd88::10]").master_addr == "fd88::10"


def test_slurms_lists_of_nodes_are_read():
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    assert first_host("gpu[07-09,12],login1") == "gpu07"
    assert first_host("node1,node2") == "node1"
    assert first_host("a[1-2]b[03,05]") == "a1b03"
    assert first_host("solo") == "solo"


@pytest.mark.parametrize("text", ["2(x0)", "0", "1(x99999999999)", "1,,2", ""])
def test_a_list_of_tasks_that_cannot_be_is_refused(text):
    with pytest.raises(UserError, match="is not understood"):
        tasks_per_node(text)


def test_the_size_is_the_first_variable_that_is_a_number():
    environ = {"WORLD_SIZE": "9" * 5000, "PMI_SIZE": "two", "NNODES": "2"}
    assert size_variable(environ) == ("NNODES", 2)


def test_seconds_of_a_variable_must_be_a_number():
    with pytest.raises(UserError, match="DDP_LIB_TIMEOUT_S='soon' is no number of seconds"):
        World.join(environ={"DDP_LIB_TIMEOUT_S": "soon"})


@pytest.mark.parametrize("text", ["many", "0", "-1", "65536", "4,x"])
def test_threads_must_be_a_number_that_can_be(text):
    with pytest.raises(UserError, match=rf"OMP_NUM_THREADS='{text}' is no number of threads"):
        require_threads({"OMP_NUM_THREADS": text})
    require_threads({"OMP_NUM_THREADS": "4,2"})
