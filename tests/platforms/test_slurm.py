"""deploy/slurm/train.sbatch on a real SLURM of two nodes."""

import json
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.lab import namespaces, readme, slurm
from tests.lab.machines import Lab, Machine
from tests.lab.project import ROOT
from tests.lab.slurm import Slurm, wait_for_text

SCRIPT = "deploy/slurm/train.sbatch"
TIMEOUT_S = 600  # for what takes seconds on a free machine

lacks = namespaces.missing() or slurm.missing()
pytestmark = [
    pytest.mark.platforms,
    pytest.mark.skipif(bool(lacks), reason=lacks),
]

# A model that raises in the second step of each start: an exception in the first would end the job for good.
BREAKS = """
from ddp_lib import SimpleModel
class Net(SimpleModel):
    calls = 0
    def forward(self, x):
        self.calls += self.training
        if self.calls > 2:  # the first is thrown away
            raise RuntimeError("always")
        return super().forward(x)
"""

# A run that goes on until it is stopped, and writes a checkpoint at every chance.
LONG = "--epochs 5000 --checkpoint-every-s 0.1".split()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    folder = tmp_path_factory.mktemp("slurm")
    with Lab(2, folder) as lab, Slurm(lab, folder / "daemons") as cluster:
        yield cluster


class Job:
    def __init__(self, cluster: Slurm, folder: Path, before: list[str], words: list[str]) -> None:
        cluster.wait_until_idle()
        launch = os.path.join(os.path.dirname(sys.executable), "ddp-launch")
        self.cluster = cluster
        self.number = cluster.submit(
            *before, str(ROOT / SCRIPT), *words, cwd=folder, DDP_LAUNCH=launch, OMP_NUM_THREADS="1"
        )
        self.out = folder / f"ddp-{self.number}.out"
        self.run_dir = folder / "runs" / f"ddp-{self.number}"

    def says(self, pattern: str, count: int = 1) -> None:
        wait_for_text(self.out, pattern, TIMEOUT_S, count)

    def ends_as(self, state: str) -> str:
        """Its output, once the job has ended, in this state."""
        reached = self.cluster.wait_for_state(self.number, *slurm.ENDS, timeout_s=TIMEOUT_S)
        assert reached == state, self.out.read_text()
        return self.out.read_text()


@pytest.fixture
def submit(cluster: Slurm, tmp_path: Path, images_folder: Path, shared_cache: str):
    """Submits the script with these words behind it, from a folder of the test's own."""
    jobs = []

    def start(*words: str, before: tuple[str, ...] = ()) -> Job:
        small = ["--data", str(images_folder), "--data-dir", shared_cache]
        jobs.append(Job(cluster, tmp_path, [*before], [*small, *words]))
        return jobs[-1]

    yield start
    for job in jobs:
        cluster.run("scancel", "--quiet", job.number)


def ranks_on(machine: Machine) -> list[psutil.Process]:
    return [p for p in machine.processes() if "--run-dir" in p.cmdline() and "srun" not in p.name()]


def test_readmes_line_trains_on_two_nodes(submit, images_folder):
    [sbatch, script, *words] = shlex.split(readme.commands("By SLURM")[0])
    assert (sbatch, script) == ("sbatch", SCRIPT)
    small = words.index("shapes")
    words[small] = str(images_folder)
    job = submit(*words, "--epochs", "1")
    out = job.ends_as("COMPLETED")
    assert "rank from SLURM" in out and "requeued" not in out
    summary = json.loads((job.run_dir / "summary.json").read_text())
    assert (summary["world_size"], len(set(summary["weights_sha256"]))) == (2, 1)
    assert (job.run_dir / "cifar_net.pth").exists()
    assert {path.name for path in job.run_dir.glob("rank*.jsonl")} == {"rank0.jsonl", "rank1.jsonl"}


def test_readmes_line_for_gpus_is_understood(cluster):
    """This cluster has neither the nodes nor the GPUs, which is all that may be wrong with it."""
    line = readme.commands("By SLURM")[1].replace(SCRIPT, str(ROOT / SCRIPT))
    for wrong, reason in (
        (line, "not available|Invalid generic resource"),
        (line.replace("--nodes", "--nodez"), "unrecognized option"),
    ):
        assert re.search(reason, cluster.refused(*shlex.split(wrong)))


def test_a_tasks_sigterm_requeues_the_job_and_it_resumes(cluster, submit):
    job = submit(*LONG)
    job.says(r"batch \d+/")
    cluster.run("scancel", "--signal=TERM", f"{job.number}.0")
    job.says(r"stopped by signal 15 at step \d+ of")
    job.says("status 143, requeued")
    job.says(r"start 2\b")
    job.says(r"resuming \S+ at step [1-9]\d* of")
    assert cluster.state(job.number) == "RUNNING"


def test_a_killed_node_requeues_the_job_and_it_resumes(cluster, submit):
    job = submit(*LONG)
    job.says(r"batch \d+/")
    wait_for_text(job.run_dir / "rank0.jsonl", '"checkpoint"', TIMEOUT_S)
    node = cluster.lab.machines[1]
    assert ranks_on(node)
    node.end_all()
    # The script requeues it, or SLURM does if it misses the node before the script has seen its ranks end.
    cluster.wait_for_state(job.number, "PENDING", timeout_s=TIMEOUT_S)
    cluster.start_node(node)
    job.says(r"start 2\b")
    job.says(r"resuming \S+ at step [1-9]\d* of")


def test_a_cancelled_job_stays_away(cluster, submit):
    job = submit(*LONG)
    job.says(r"batch \d+/")
    cluster.run("scancel", job.number)
    assert "requeued" not in job.ends_as("CANCELLED")
    assert cluster.state(job.number) == "CANCELLED"


def test_a_refused_run_is_not_requeued(submit):
    job = submit("--data", "no/such/folder")
    out = job.ends_as("FAILED")
    assert "no/such/folder" in out and "requeued" not in out


def test_a_job_that_always_fails_is_requeued_as_often_as_said(cluster, submit, tmp_path):
    (tmp_path / "bad.py").write_text(BREAKS)
    job = submit("--model", "bad:Net", before=("--export=ALL,DDP_REQUEUES=1",))
    job.says(r"start 2\b")
    out = job.ends_as("FAILED")
    assert out.count(", requeued\n") == 1 and "requeued 1 times already" in out
