"""With or without GPUs: what the notebooks' ranks choose on machines with 1, 2 and 4 of them.

`tests/lab/record_devices.py` stands in for these machines, and records the choice of every rank.
"""

import json
import os
import subprocess
import sys

import pytest

from tests.lab.notebooks import NOTEBOOKS
from tests.lab.project import ROOT

RECORDER = ROOT / "tests" / "lab" / "record_devices.py"

# Launches whose ranks take GPUs where each can have one of its own, with the number of ranks. All others mean
# the CPU.
ON_GPUS = {
    ("01_process_groups", "on_own_device"): 2,
    ("01_process_groups", "join_by_library"): 4,
    ("01_process_groups", "%ranks 4"): 4,
    ("03_ddp_wrapping", "%ranks 2"): 2,
    ("04_training_run", "on_its_device"): 2,
}


def kind(ranks: list[list[str]]) -> str:
    """What the ranks of one launch chose together. Machines that `run_nodes` rehearses share their GPUs."""
    if not ranks:
        return "no group"
    backends, devices = zip(*ranks, strict=True)
    if set(backends) <= {"gloo", "none"} and set(devices) == {"cpu"}:
        return "cpu"
    if "refused" in backends:
        return "refused"
    own = len(set(devices)) == len(devices) and all(device.startswith("cuda:") for device in devices)
    joined = set(backends) <= {"nccl", "cpu:gloo,cuda:nccl"} or len(ranks) == 1
    return "a GPU each" if own and joined else f"clash: {sorted(set(zip(backends, devices, strict=True)))}"


def wrong_choices(launches: list[dict]) -> list[str]:
    wrong = []
    for launch in launches:
        notebook, name = launch["notebook"], launch["launch"]
        for gpus, ranks in launch["chosen"].items():
            wanted = {"cpu", "no group"}
            if (notebook, name) in ON_GPUS:
                wanted = {"a GPU each" if int(gpus) >= ON_GPUS[notebook, name] else "cpu"}
            if kind(ranks) not in wanted:
                wrong.append(f"{notebook} cell {launch['cell']}, {name}, {gpus} GPU(s): {kind(ranks)}")
    return wrong


@pytest.mark.process
def test_every_rank_gets_the_cpu_or_a_gpu_of_its_own(tmp_path):
    command = [sys.executable, str(RECORDER), *map(str, NOTEBOOKS)]
    env = os.environ | {"TMPDIR": str(tmp_path)}  # for what the notebooks leave behind
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    launches = [json.loads(line) for line in done.stdout.splitlines()]
    assert wrong_choices(launches) == []
    assert {(launch["notebook"], launch["launch"]) for launch in launches} >= ON_GPUS.keys()


def test_a_rank_on_another_one_s_gpu_is_seen():
    def launch(*ranks: list[str], name: str = "f") -> list[dict]:
        return [{"notebook": "01_process_groups", "cell": 1, "launch": name, "chosen": {"2": [*ranks]}}]

    gpu_0, gpu_1, cpu = ["nccl", "cuda:0"], ["nccl", "cuda:1"], ["gloo", "cpu"]
    assert wrong_choices(launch(cpu, cpu)) == []
    assert wrong_choices(launch(gpu_0, gpu_1, name="on_own_device")) == []
    for ranks in ((gpu_0, gpu_1), (gpu_0, gpu_0), (cpu, gpu_0), (["none", "cuda:0"],)):
        assert len(wrong_choices(launch(*ranks))) == 1
    assert len(wrong_choices(launch(gpu_0, gpu_0, name="on_own_device"))) == 1
