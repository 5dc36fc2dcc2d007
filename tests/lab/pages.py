"""README, CONTRIBUTING and the notebooks' text, as tests read them."""

import json
import re
from pathlib import Path

import pytest

from tests.lab.project import ROOT

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "notebooks").glob("*.ipynb"))]

each_page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)


def page_text(path: Path) -> str:
    if path.suffix != ".ipynb":
        return path.read_text()
    cells = json.loads(path.read_text())["cells"]
    return "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


def code_in(text: str) -> list[str]:
    """Lines of code blocks, those that end in a backslash joined, and pieces `between backticks`."""
    fenced = r"^ *```[^\n]*\n(.*?)^ *```"
    blocks = re.findall(fenced, text, re.M | re.S)
    rest = re.sub(fenced, "", text, flags=re.M | re.S)
    indented = re.findall(r"^    (\S[^\n]*)$", rest, re.M)
    lines = [line for b in blocks for line in re.sub(r"\\\n\s*", "", b).splitlines()]
    return lines + indented + re.findall(r"`([^`\n]+)`", rest)
