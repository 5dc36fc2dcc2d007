"""run_ranks in a real kernel."""

import textwrap

import pytest

from tests.lab.ranks import TIMEOUT_S

pytestmark = pytest.mark.ranks

CELLS = [
    "from ddp_lib import run_ranks, RankError",
    """
    def hello():
        import torch, torch.distributed as dist
        dist.init_process_group("gloo")
        value = torch.ones(1)
        dist.all_reduce(value)
        print("sum", int(value))
        return dist.get_rank()

    run_ranks(hello, 2)
    """,
    """
    def oops():
        import os
        if os.environ["RANK"] == "1":
            raise KeyError("x")

    run_ranks(oops, 2)
    """,
]


def test_output_and_errors_appear_in_the_cell(tmp_path, monkeypatch):
    """As under nbval: the output is in the cell, and the error is one short text."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.v4.new_notebook()
    notebook.cells = [nbformat.v4.new_code_cell(textwrap.dedent(c).strip()) for c in CELLS]
    monkeypatch.setenv("PYTEST_CURRENT_TEST", "x")
    client = NotebookClient(notebook, timeout=int(TIMEOUT_S), allow_errors=True)
    client.execute(cwd=str(tmp_path))
    outputs = [cell.outputs for cell in notebook.cells]
    text = "".join(o["text"] for o in outputs[1] if o["output_type"] == "stream")
    assert text == "[rank 0] sum 2\n[rank 1] sum 2\n"
    assert outputs[1][-1]["data"]["text/plain"] == "[0, 1]"
    (error,) = outputs[2]
    assert error["ename"] == "RankError"
    assert error["evalue"] == "rank 1: KeyError: 'x'\n  line 4 in oops: raise KeyError(\"x\")"
    assert len(error["traceback"]) == 1
