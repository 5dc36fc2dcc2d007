"""Links lead somewhere."""

import json
import re
from pathlib import Path

from tests.lab.pages import each_page, page_text


def anchors(path: Path) -> set[str]:
    """The ids that headings get: on GitHub for a page, in JupyterLab for a notebook."""
    text = re.sub(r"^```.*?^```", "", page_text(path), flags=re.M | re.S)
    heads = [head.replace("`", "").strip() for head in re.findall(r"^#+ (.+)$", text, re.M)]
    if path.suffix == ".ipynb":
        return {head.replace(" ", "-") for head in heads}
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def dead_links(path: Path) -> list[str]:
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page_text(path)):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        there = path.parent / file if file else path
        if not there.exists() or (anchor and anchor not in anchors(there)):
            dead.append(target)
    return dead


@each_page
def test_links_lead_somewhere(path):
    assert dead_links(path) == []


def test_a_dead_link_is_seen(tmp_path):
    notebook = {"cells": [{"cell_type": "markdown", "source": ["## Why `x` is late"]}]}
    (tmp_path / "there.ipynb").write_text(json.dumps(notebook))
    page = tmp_path / "page.md"
    page.write_text(
        "# All of it!\n[a](#all-of-it) [b](there.ipynb#Why-x-is-late) [c](https://x.org)\n"
        "[d](#all) [e](there.ipynb#Why) [f](gone.md)\n```\n# all\n```\n"
    )
    assert dead_links(page) == ["#all", "there.ipynb#Why", "gone.md"]
