"""A notebook's first cell can be run again, and what it makes goes with its process."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ddp_lib.distributed.addresses import wait_until_true
from tests.lab.notebooks import NOTEBOOKS, code_cells, read, source
from tests.lab.processes import TIMEOUT_S, clean_environment
from tests.lab.project import ROOT

FIRST = {path.stem: source(code_cells(read(path))[0]) for path in NOTEBOOKS}

TWICE = """
import os

for name, cell in {cells!r}.items():
    notebook, values = {{}}, []
    for _ in range(2):
        exec(cell, notebook)
        values.append({{key: str(v) for key, v in notebook.items() if key.isupper()}} | {{"": os.getcwd()}})
    assert values[0] == values[1] and "WORK" in values[0], (name, values)
"""


def left(folder: Path) -> list[Path]:
    """What is in the folder, but for torch.compile's cache."""
    return [path for path in folder.iterdir() if "inductor" not in path.name]


@pytest.mark.process
def test_the_first_cells_do_the_same_when_run_again(tmp_path):
    cells = {name: re.sub(r"^%.*$", "", text, flags=re.M) for name, text in FIRST.items()}
    command = [sys.executable, "-c", TWICE.format(cells=cells)]
    env = clean_environment() | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert left(tmp_path) == []


@pytest.mark.process
def test_what_a_notebook_writes_goes_also_if_its_kernel_is_killed(tmp_path):
    cell = re.sub(r"^%.*$", "", FIRST["07_when_it_breaks"], flags=re.M)
    env = clean_environment() | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", f"{cell}\n(WORK / 'mine').touch()\nprint(WORK, flush=True)\ninput()"]
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as kernel:
        work = Path(kernel.stdout.readline().decode().strip())
        assert (work / "mine").exists()
        kernel.kill()
    assert wait_until_true(lambda: left(tmp_path) == [], time.monotonic() + TIMEOUT_S)
