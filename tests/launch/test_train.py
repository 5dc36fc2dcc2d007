"""ddp-launch train, as a reader uses it."""

import json
import signal
import subprocess

import pytest

from tests.lab.processes import TRAIN, clean_environment, end, wait_until
from tests.lab.project import ROOT


@pytest.mark.ranks
def test_a_training_is_stopped_resumed_and_finished(started, images_folder, shared_cache, tmp_path):
    folder, temporary = tmp_path / "run", tmp_path / "tmp"
    temporary.mkdir()
    command = [
        *TRAIN, "--nproc-per-node", "2", "--run-dir", str(folder),
        "--data", str(images_folder), "--data-dir", shared_cache,
        "--model", "tests.lab.models:Plain", "--global-batch-size", "210", "--epochs",
    ]  # fmt: skip

    def train(epochs: int) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [*command, str(epochs)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=clean_environment() | {"TMPDIR": str(temporary)},
        )
        started.append(process)
        return process

    process = train(10000)
    log = folder / "rank0.jsonl"
    wait_until(lambda: log.exists() and '"loss"' in log.read_text())
    process.send_signal(signal.SIGINT)
    status, _, err = end(process)
    assert (status, err) == (130, [])
    assert (folder / "checkpoint.pt").exists()
    last = json.loads(log.read_text().splitlines()[-1])
    assert last["event"] == "end"
    status, _, err = end(train(last["step"] // 3 + 1))
    assert (status, err) == (0, [])
    starts = [line for line in map(json.loads, log.read_text().splitlines()) if "start" in line]
    assert [line["step"] for line in starts] == [0, last["step"]]
    left = [path.name for path in temporary.iterdir() if "inductor" not in path.name]  # torch.compile's cache
    assert left == []
