"""A rank's own refusal is told by every rank, whichever rank it is and whatever started them."""

import os
import socket
import sys

import pytest

from ddp_lib import load_dataset
from tests.lab.joining import four, outcome, start
from tests.lab.ports import free_port

pytestmark = pytest.mark.ranks

HOST = socket.gethostname()
# Files may grow to 60 kB only: the log fits, the checkpoint does not, as on a full disk.
TRAIN = """
import os, resource, sys
if os.environ["RANK"] == os.environ["FULL_DISK"]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
from ddp_lib.train import main
sys.exit(main(os.environ["FLAGS"].split()))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on file sizes")
@pytest.mark.parametrize("full", [0, 1])
def test_a_full_disk_is_named_on_every_rank(tmp_path, images_folder, shared_cache, full):
    load_dataset(str(images_folder), shared_cache)  # decoded by a process without the limit
    port = free_port()
    flags = f"--data {images_folder} --data-dir {shared_cache} --epochs 1 --global-batch-size 210"
    flags += " --model tests.lab.models:Plain --precision fp32"
    started = []
    for rank in (0, 1):
        run_dir = tmp_path / str(rank)  # a disk of its own for each, so that each rank writes
        variables = four(rank, port) | {"FULL_DISK": full, "FLAGS": f"{flags} --run-dir {run_dir}"}
        variables |= {"OMP_NUM_THREADS": 1, "PYTHONPATH": os.getcwd()}
        started.append(start(code=TRAIN, **variables))
    for rank, process in enumerate(started):
        status, text = outcome(process)
        errors = [line for line in text.splitlines() if "error:" in line]
        assert len(errors) == 1 and "Traceback" not in text, text
        assert f"cannot write {tmp_path / str(full)}" in errors[0], text
        named = f"rank {full}: " if rank == full else f"rank {full} on {HOST}: "
        assert f"error: {named}cannot write" in errors[0]
        assert status == 75
