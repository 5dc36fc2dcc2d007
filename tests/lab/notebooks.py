"""The course's notebooks, as tests read them, and made-up ones."""

import json
from pathlib import Path

from tests.lab.project import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

SANITIZER = ROOT / "notebooks" / "nbval_sanitize.cfg"

UNCOMPARED = ("nbval-ignore-output", "nbval-skip")


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def code_cells(notebook: dict) -> list[dict]:
    """The cells that nbval runs: those of code that are not empty."""
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return [cell for cell in code if source(cell).strip()]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def tags(cell: dict) -> list[str]:
    return cell["metadata"].get("tags", [])


def is_compared(cell: dict) -> bool:
    return not set(UNCOMPARED) & set(tags(cell))


def make_notebook(*cells: dict) -> dict:
    return {"cells": [*cells], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


def make_cell(count, text="x = 1", tags=(), outputs=(), kind="code") -> dict:
    made = {"cell_type": kind, "source": [text], "metadata": {"tags": [*tags]}}
    return made | ({"execution_count": count, "outputs": [*outputs]} if kind == "code" else {})


STREAM = {"output_type": "stream", "name": "stdout", "text": ["1"]}
