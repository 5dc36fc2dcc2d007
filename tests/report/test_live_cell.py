"""A training in a notebook: drawn if somebody looks, lines if a program keeps the output."""

import nbformat
import pytest
from nbclient import NotebookClient

from tests.lab.project import ROOT

CELLS = (
    "from ddp_lib import run_ranks\nfrom tests.lab.runs import config, train",
    "_ = run_ranks(train, 2, config('two', {images!r}, {cache!r}))",
    "_ = train(config('one', {images!r}, {cache!r}))",
    "_ = run_ranks(train, 2, config('lines', {images!r}, {cache!r}))",
)


@pytest.mark.ranks
def test_a_training_is_drawn_for_a_person_and_printed_for_a_program(
    tmp_path, images_folder, shared_cache, monkeypatch
):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # for the kernel
    cells = [cell.format(images=str(images_folder), cache=shared_cache) for cell in CELLS]
    notebook = nbformat.v4.new_notebook(cells=[*map(nbformat.v4.new_code_cell, cells)])
    client = NotebookClient(notebook, timeout=120)
    with client.setup_kernel(cwd=str(tmp_path)):
        for number, cell in enumerate(notebook.cells):
            client.kc.allow_stdin = number < 3  # as JupyterLab; nbval and nbconvert answer no input()
            client.execute_cell(cell, number)
    text = ["".join(o.get("text", "") for o in cell.outputs) for cell in notebook.cells]
    pictures = [sum("image/png" in o.get("data", {}) for o in cell.outputs) for cell in notebook.cells]
    assert pictures == [0, 1, 1, 0]
    for drawn in text[1:3]:
        assert "batch" not in drawn and "epoch" not in drawn and "; model in " in drawn
    assert "[rank 0] epoch 2/2 batch 3/3 loss" in text[3] and "epoch 2/2 done: train loss" in text[3]
