"""What stops a run waits longer before it kills than the launcher does: the checkpoint must be written."""

import re

import pytest

from ddp_lib.launch.options import LaunchOptions
from ddp_lib.launch.start import LEAVE_S
from tests.lab.project import ROOT

FILES = {
    "deploy/compose.yaml": r"stop_grace_period: (\d+)s",
    "deploy/kubernetes/job.yaml": r"terminationGracePeriodSeconds: (\d+)",
    "deploy/kubernetes/trainjob.yaml": r"terminationGracePeriodSeconds: (\d+)",
    "deploy/slurm/train.sbatch": r"#SBATCH --signal=TERM@(\d+)",
    "README.md": r"docker stop --time (\d+)",
}


@pytest.mark.parametrize("file", FILES)
def test_it_gives_more_time_than_the_ranks_take(file):
    [seconds] = re.findall(FILES[file], (ROOT / file).read_text())
    assert int(seconds) > LaunchOptions().grace_s + LEAVE_S
