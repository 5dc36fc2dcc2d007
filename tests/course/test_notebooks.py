"""A notebook's committed outputs come from one run, and nearly all are compared.

`make test` executes every notebook and compares it with its committed outputs; these tests hold what
that comparison rests on.
"""

import ast
import re

import pytest
from IPython.core.inputtransformer2 import TransformerManager

from tests.lab.notebooks import (
    NOTEBOOKS,
    STREAM,
    code_cells,
    is_compared,
    make_cell,
    make_notebook,
    read,
    source,
    tags,
)

LONGEST_CELL = 25  # lines; a list of imported names, one per line, counts once


def prints(cell: dict) -> bool:
    return any(o["output_type"] in ("stream", "execute_result") for o in cell["outputs"])


def faults(notebook: dict) -> list[str]:
    """What keeps a notebook's committed outputs from being compared. nbval passes over a cell
    without an execution count, and over a command after `!` that fails."""
    problems = []
    code = code_cells(notebook)
    counts = [cell["execution_count"] for cell in code]
    if counts != [*range(1, len(code) + 1)]:
        problems.append(f"not run from top to bottom: execution counts {counts}")
    for number, cell in enumerate(code, 1):
        ends_in_error = any(output["output_type"] == "error" for output in cell["outputs"])
        if ends_in_error != ("raises-exception" in tags(cell)):
            problems.append(f"cell {number}: an error without the tag raises-exception, or the tag alone")
        if re.search(r"^\s*!", source(cell), re.M):
            problems.append(f"cell {number}: a command after ! may fail unseen")
        text = re.sub(r"^(from \S+ import) \([^)]*\)", r"\1", source(cell), flags=re.M)
        if (lines := len(text.splitlines())) > LONGEST_CELL:
            problems.append(f"cell {number}: {lines} lines")
        if not is_compared(cell) and not re.search(r"\bassert\b", source(cell)):
            problems.append(f"cell {number}: its output is not compared, and it asserts nothing")
    printing = [cell for cell in code if prints(cell)]
    passed_over = sum(not is_compared(cell) for cell in printing)
    if passed_over > len(printing) / 4:
        problems.append(f"{passed_over} of {len(printing)} cells that print are not compared")
    return problems


def patches(notebook: dict) -> list[str]:
    """What changes the library: assignments to an attribute of what the notebook imports from ddp_lib, and
    setattr and mock's patch, which may do the same."""
    sources = [re.sub(r"^%%.*", "", source(cell)) for cell in code_cells(notebook)]
    trees = [ast.parse(TransformerManager().transform_cell(text)) for text in sources]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    imported = [
        (getattr(node, "module", "") or name.name, name.asname or name.name.partition(".")[0])
        for node in nodes
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in node.names
    ]
    own = {name for module, name in imported if module.partition(".")[0] == "ddp_lib"}
    found = []
    for node in nodes:
        changed = isinstance(node, ast.Attribute | ast.Name) and not isinstance(node.ctx, ast.Load)
        root = node
        while isinstance(root, ast.Attribute | ast.Subscript):
            root = root.value
        inside = root is not node and isinstance(root, ast.Name) and root.id in own
        if (changed and inside) or (isinstance(node, ast.Name) and node.id in ("setattr", "patch", "mock")):
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_cell_patches_the_library(path):
    assert patches(read(path)) == []


def test_a_patch_is_seen():
    before = "from ddp_lib import World as W\nimport ddp_lib.train\nimport torch.distributed as dist\n"
    for code in ("dist.all_reduce = None", "world = W()\nworld.x = 1", "W.join()", "model.weight += 1"):
        assert patches(make_notebook(make_cell(1, before + code))) == []
    for code in (
        "W.join = None",
        "ddp_lib.train.fit = None",
        "del ddp_lib.train.fit",
        "setattr(W, 'join', 1)",
        "with patch.object(W, 'join'): pass",
    ):
        assert len(patches(make_notebook(make_cell(1, before + code)))) == 1


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_was_run_from_top_to_bottom(path):
    assert faults(read(path)) == []


ERROR = {"output_type": "error", "ename": "E", "evalue": "", "traceback": []}

LOOSE = make_cell(1, "assert 1", tags=["nbval-ignore-output"], outputs=[STREAM])


def test_an_unrun_notebook_is_seen():
    tight = [make_cell(number, outputs=[STREAM]) for number in (2, 3, 4)]
    good = [
        LOOSE,
        *tight,
        make_cell(5, tags=["raises-exception"], outputs=[ERROR]),
        make_cell(None, " "),
    ]
    assert faults(make_notebook(*good)) == []
    for bad in (
        [make_cell(None)],
        [make_cell(3)],
        [make_cell(1, outputs=[ERROR])],
        [make_cell(1, tags=["raises-exception"])],
        [make_cell(1, "!ls")],
        [make_cell(1, "x = 1\n" * 26)],
        [make_cell(1, tags=["nbval-ignore-output"])],
        [LOOSE, *tight[:2]],
    ):
        assert len(faults(make_notebook(*bad))) == 1
