"""ddp-launch's commands: as one rank, as an agent, or as neither."""

import os

import pytest

from ddp_lib import TrainConfig
from ddp_lib.launch import main as launch
from ddp_lib.launch.ranks import ForkedRanks

CASES = {
    "alone": ({}, [], "agent"),
    "docker run -e": ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "m"}, [], "rank"),
    "half of it": ({"MASTER_ADDR": "m"}, [], "rank"),  # refused there, by name
    "flags win": ({"RANK": "0", "WORLD_SIZE": "2"}, ["--nproc-per-node", "2"], "agent"),
    "flags win, torchrun's spelling": ({"RANK": "0"}, ["--nproc_per_node=2"], "agent"),
    "srun": ({"SLURM_PROCID": "1", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2"}, [], "rank"),
    "srun, one task": (
        {"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "1"},
        [],
        "agent",
    ),
    "sbatch script": ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, [], "agent"),
}


@pytest.mark.parametrize(("environment", "flags", "expected"), CASES.values(), ids=CASES)
def test_who_starts_the_rank(environment, flags, expected, monkeypatch):
    import ddp_lib.train

    for name in list(os.environ):
        if name.startswith("SLURM") or name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    calls: list[tuple[str, TrainConfig]] = []

    def rank(config: TrainConfig) -> int:
        calls.append(("rank", config))
        return 0

    def agent(options: object, join_timeout_s: float, ranks: ForkedRanks) -> int:
        calls.append(("agent", ranks.args[0]))
        return 0

    monkeypatch.setattr(ddp_lib.train, "run", rank)
    monkeypatch.setattr(launch, "start_agent", agent)
    train = ["--epochs", "3", "--run-dir=a b"]
    assert launch.main(["train", *train[:2], *flags, *train[2:]]) == 0
    assert calls == [(expected, TrainConfig(epochs=3, run_dir="a b"))]


def test_plot_prints_what_it_wrote(monkeypatch, capsys):
    import ddp_lib.report.plots

    monkeypatch.setattr(ddp_lib.report.plots, "plot_run", lambda folder, out: (folder, out))
    assert launch.main(["plot", "runs/a"]) == 0
    assert launch.main(["plot", "runs/a", "--out", "b.png"]) == 0
    assert capsys.readouterr().out == "('runs/a', None)\n('runs/a', 'b.png')\n"
