"""The project's own files, as tests read them."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def make_targets() -> set[str]:
    text = (ROOT / "Makefile").read_text()
    return set(re.search(r"^\.PHONY: (.*)$", text, re.M)[1].split())
