"""ddp-launch's commands: as one rank, as an agent, or as neither."""

import os
import platform
import re
from importlib.metadata import version
from unittest.mock import Mock

import pytest

import ddp_lib
from ddp_lib import TrainConfig
from ddp_lib.launch import main as launch
from ddp_lib.launch.options import Launch
from ddp_lib.launch.ranks import ForkedRanks, Ranks

FOUR = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "m", "MASTER_PORT": "7"}
SRUN = {"SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2"}
SRUN |= {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
MEET = ["--nnodes=2", "--rdzv-endpoint=h:7"]

# environment, the launcher's flags, and what happens: this process is the rank itself, or an agent of so many
# machines, or it ends with a line that has these words.
CASES = {
    "alone": ({}, [], 1),
    "docker run -e": (FOUR, [], "rank"),
    "half of it": ({"MASTER_ADDR": "m"}, [], "MASTER_ADDR='m' RANK"),
    "the four, restarts": (FOUR, ["--max-restarts=2"], 2),
    "the four, one rank here": (FOUR, ["--nproc_per_node=1", "--nnodes=2", "--rdzv-id=a"], 2),
    "the four, two ranks here": (FOUR, ["--nproc_per_node=2"], "--nproc-per-node RANK=0 WORLD_SIZE=2"),
    "the four, three machines": (FOUR, ["--nnodes=3"], "--nnodes WORLD_SIZE=2"),
    "the four, elastic": (FOUR, ["--nnodes=1:2"], "--nnodes WORLD_SIZE=2"),
    "the four, another number": (FOUR, ["--node-rank=1"], "--node-rank RANK=0"),
    "the four of a machine": (FOUR, [*MEET, "--nproc-per-node=4"], 2),
    "the four of all ranks": (FOUR | {"WORLD_SIZE": "8"}, [*MEET, "--nproc-per-node=4"], 2),
    "the four and one machine": (FOUR, ["--rdzv-endpoint=h:7"], "--nnodes WORLD_SIZE=2"),
    "torchrun": (FOUR | {"TORCHELASTIC_RUN_ID": "a"}, [], "rank"),
    "torchrun restarts": (
        FOUR | {"TORCHELASTIC_RUN_ID": "a"},
        ["--max-restarts=1"],
        "--max-restarts TORCHEL",
    ),
    "torchrun, another job": (FOUR | {"TORCHELASTIC_RUN_ID": "a"}, ["--rdzv-id=b"], "--rdzv-id TORCHEL"),
    "Kubeflow 1": (FOUR | {"PET_NNODES": "2", "PET_MASTER_ADDR": "m"}, [], 2),
    "srun": (SRUN, [], "rank"),
    "srun, restarts": (SRUN, ["--max-restarts=2"], 2),
    "srun, ranks of one machine": (SRUN, ["--nproc-per-node=2"], "--nproc-per-node SLURM_PROCID=1 NTASKS=2"),
    "srun per machine": (SRUN, [*MEET, "--nproc-per-node=4"], 2),
    "srun per rank": (SRUN | {"SLURM_NTASKS": "8"}, [*MEET, "--nproc-per-node=4"], "--nnodes SLURM_NTASKS=8"),
    "srun, one task": (SRUN | {"SLURM_NTASKS": "1"}, ["--nproc-per-node=2"], 1),
    "sbatch script": ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, [], 1),
    "mpirun": ({"OMPI_COMM_WORLD_SIZE": "2"}, ["--nproc-per-node=2"], "OMPI_COMM_WORLD_SIZE RANK"),
    "mpirun, one process": ({"OMPI_COMM_WORLD_SIZE": "1"}, [], 1),
    "mpirun per machine": ({"OMPI_COMM_WORLD_SIZE": "2"}, MEET, 2),
    "MPICH": ({"PMI_SIZE": "2"}, [], "PMI_SIZE RANK WORLD_SIZE"),
    "a script's own": ({"NNODES": "2", "NODE_RANK": "1"}, [], "NNODES RANK WORLD_SIZE"),
    "half a script's own": ({"NODE_RANK": "1"}, [], "NODE_RANK RANK WORLD_SIZE"),
    "a script's own, as flags": ({"NNODES": "2", "NODE_RANK": "1"}, [*MEET, "--node-rank=1"], 2),
}


@pytest.mark.parametrize("command", ["train", "run", "check", "--dry-run"])
@pytest.mark.parametrize(("environment", "flags", "expected"), CASES.values(), ids=CASES)
def test_one_rule_for_variables_and_flags(environment, flags, expected, command, monkeypatch, capsys):
    import ddp_lib.launch.check
    import ddp_lib.launch.torchrun_command
    import ddp_lib.train

    for name in list(os.environ):
        if re.match("SLURM|PET_|TORCHELASTIC|RANK|WORLD_SIZE|LOCAL_|GROUP_|MASTER_|OMPI|PMI|NNODES", name):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    config, calls = TrainConfig(epochs=3, run_dir="a b"), []

    def agent(options: Launch, join_timeout_s: float, ranks: Ranks | list[str]) -> int:
        calls.append(options.nodes[1])
        if isinstance(ranks, ForkedRanks):
            assert ranks.args == (config,)
        return 0

    monkeypatch.setattr(ddp_lib.train, "run", lambda training: calls.append("rank") or training != config)
    monkeypatch.setattr(launch, "start_agent", agent)
    plain = ddp_lib.launch.torchrun_command
    monkeypatch.setattr(plain, "plain_command", lambda options, words, s: agent(options, s, words))
    train = ["--epochs", "3", "--run-dir=a b"]
    if command == "check":
        monkeypatch.setattr(ddp_lib.launch.check, "_exit_after", lambda timeout_s: None)
        monkeypatch.setattr(
            ddp_lib.launch.check, "wait_for_name", found := Mock(side_effect=InterruptedError)
        )
        status = launch.main(["check", *flags])
        calls += ["check"] * found.called
    elif command == "run":
        status = launch.main(["run", *flags, __file__])
    else:
        dry = ["--dry-run"] * (command == "--dry-run")
        status = launch.main(["train", *train[:2], *flags, *dry, *train[2:]])
    error = capsys.readouterr().err
    if expected not in (1, 2, "rank"):
        assert (status, calls, error.count("\n")) == (2, [], 1)
        assert [word for word in expected.split() if word not in error] == []
    elif command == "check":
        assert calls == (["check"] if expected != 1 else [])
    else:
        as_agent = 2 if expected == "rank" and command != "train" else expected
        assert (status, calls) == (0, [as_agent])


def test_the_versions_are_named(capsys):
    assert launch.main(["--version"]) == 0
    assert capsys.readouterr().out.split() == [
        "ddp-launch", f"{ddp_lib.__version__},", "torch", f"{version('torch')},",
        "Python", platform.python_version(),
    ]  # fmt: skip


def test_plot_prints_what_it_wrote(monkeypatch, capsys):
    import ddp_lib.report.plots

    monkeypatch.setattr(ddp_lib.report.plots, "plot_run", lambda folder, out: (folder, out))
    assert launch.main(["plot", "runs/a"]) == 0
    assert launch.main(["plot", "runs/a", "--out", "b.png"]) == 0
    assert capsys.readouterr().out == "('runs/a', None)\n('runs/a', 'b.png')\n"
