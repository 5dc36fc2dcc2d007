"""The working directory is the reader's: what lies there replaces no module, and it may be gone."""

import os
import queue
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from ddp_lib import UserError, run_ranks
from ddp_lib.launch.main import main
from ddp_lib.model import build_model
from tests.lab.processes import TIMEOUT_S, clean_environment

# As people call their scripts; torch, numpy and multiprocessing import each of them.
NAMES = "queue copy logging random statistics numpy tqdm tempfile signal types".split()


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory that holds such scripts."""
    for name in NAMES:
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('this is my {name}.py')")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_model_is_found_there_but_no_other_module(scripts, monkeypatch):
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", os.getcwd())])
    (scripts / "net_of_mine.py").write_text("import queue, torch\nhas = torch.nn.Linear\n"
        "def net(num_classes): return has(1, num_classes)")  # fmt: skip
    monkeypatch.delitem(sys.modules, "queue")
    assert build_model("net_of_mine:net", 2).out_features == 2
    assert sys.modules["queue"].__file__ == queue.__file__
    with pytest.raises(UserError, match="'queue:Net' cannot be found"):
        build_model("queue:Net", 2)


CELL = """
import os, queue, sys
from ddp_lib import run_ranks
def rank():
    return os.environ.get("PYTHONSAFEPATH"), queue.__file__, os.getcwd() in sys.path or "" in sys.path
print(run_ranks(rank, 2))
"""


@pytest.mark.ranks
def test_ranks_start_beside_scripts_named_as_modules(scripts, tmp_path_factory):
    file = tmp_path_factory.mktemp("elsewhere") / "cell.py"
    file.write_text(CELL)
    done = subprocess.run(
        [sys.executable, str(file)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env=clean_environment(),
    )
    assert (done.stdout.strip(), done.stderr) == (str([(None, queue.__file__, False)] * 2), "")


@pytest.mark.parametrize("how", ["deleted", "forbidden"])
def test_one_that_cannot_be_used_is_named(tmp_path, monkeypatch, capsys, how):
    (folder := tmp_path / "gone").mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PWD", str(folder))
    if how == "deleted":
        folder.rmdir()
    else:  # root may look everywhere
        monkeypatch.setattr(os, "getcwd", Mock(side_effect=PermissionError(13, "Permission denied")))
    status = main(["train", "--data", "shapes"])
    error = capsys.readouterr().err
    assert status == 2
    assert f"the working directory {folder} is gone, or closed" in error and error.count("\n") == 1
    with pytest.raises(UserError, match="the working directory"):
        run_ranks(int, 1)


@pytest.mark.process
def test_the_launcher_as_a_module_starts_beside_them(scripts):
    done = subprocess.run(
        [sys.executable, "-m", "ddp_lib.launch", "stacks", "--timeout-s=0"],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env=clean_environment(),
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "--timeout-s is 0.0" in done.stderr
