"""`%ranks` on two machines: a cell runs on the ranks of both, and only who knows the token may join."""

import json

from tests.lab.notebooks import make_cell, make_notebook
from tests.lab.processes import TIMEOUT_S

CELLS = [
    "%load_ext ddp_lib\n%ranks 1 --nnodes 2 --rdzv-endpoint m0:29600",
    "%%ranks\nimport socket, torch, torch.distributed as dist\nprint('on', socket.gethostname())",
    "%%ranks\nx = torch.ones(1)\ndist.all_reduce(x)\nprint('sum', int(x))",
]


def test_a_cell_runs_on_the_ranks_of_both_and_a_wrong_token_is_refused(make_lab, tmp_path):
    master, other = make_lab(2).machines
    (tmp_path / "cells.ipynb").write_text(json.dumps(make_notebook(*(make_cell(None, c) for c in CELLS))))
    notebook = master.start(["python", "-m", "IPython", "cells.ipynb"], tmp_path, IPYTHONDIR=str(tmp_path))
    *join, token = notebook.wait_for("ddp-launch join", TIMEOUT_S).partition(": ")[2].split()
    wrong = other.start([*join, token[::-1]])
    assert wrong.wait(TIMEOUT_S) == 2
    assert "m0:29600 refuses this token: copy the line" in wrong.output and wrong.output.count("\n") == 1
    right = other.start([*join, token, "--nproc-per-node", "1"])
    assert notebook.wait(TIMEOUT_S) == 0 and right.wait(TIMEOUT_S) == 0, notebook.output + right.output
    assert notebook.output.partition(token)[2].splitlines()[1:] == [
        f"refused {other.address}: it does not know this notebook's token",
        f"{other.address} has joined with 1 rank(s)",
        "ranks 0-1: ready",
        "[rank 0] on m0",
        "[rank 1] on m1",
        "[ranks 0-1] sum 2",
    ]
    assert master.left() == other.left() == []
