"""Slides of each notebook: of every section the heading, its first paragraph and its main cells.

These are the first that prints something short, and the first picture. A deck is one HTML page that needs no
network: arrow keys, or scrolling, lead on; printed, each slide is a page.
"""

import html
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from string import Template

from ddp_lib.course.exercises import Cell, text
from ddp_lib.course.site import FRAME, Page, code_colours, first_heading, read_notebook, to_html

_NEXT = "next-slide"  # a cell that says so begins one
_LINES = 24  # that a slide shows


@dataclass
class _Section:
    heading: str
    text: str
    code: list[Cell] = field(default_factory=list)


def write_slides(notebooks: list[Path], out: Path) -> int:
    """Writes a deck per notebook, and index.html, to the folder `out`; returns the number of slides.

    OSError if `out` cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    frame = Template((FRAME / "slides.html").read_text(encoding="utf-8"))
    decks = [_deck(path) for path in notebooks]
    items = "".join(f'<li><a href="{page.link}">{html.escape(page.title)}</a></li>' for page in decks)
    index = Page("index", "Slides", f"<section><h1>Slides</h1><ul>{items}</ul></section>")
    for page in [*decks, index]:
        whole = frame.substitute(title=html.escape(page.title), slides=page.body)
        (out / page.link).write_text(whole, encoding="utf-8")
    for file in ("style.css", "slides.css", "slides.js"):
        shutil.copyfile(FRAME / file, out / file)
    with open(out / "slides.css", "a", encoding="utf-8") as style:
        style.write(code_colours())
    return sum(page.body.count("<section>") for page in decks)


def _deck(path: Path) -> Page:
    notebook = read_notebook(path)
    cells: list[Cell] = []
    for section in _sections(notebook["cells"]):
        for slide in _slides(section):
            cells += [{"cell_type": "raw", "metadata": {}, "source": _NEXT}, *slide]
    body = to_html({**notebook, "cells": [{**cell, "id": f"slide-{n}"} for n, cell in enumerate(cells)]})
    # To pages of the course: there are none beside the slides.
    body = re.sub(r'<a href="(?!https?:)[^"]*"[^>]*>(.*?)</a>', r"\1", body, flags=re.S)
    slides = "".join(f"<section>{slide}</section>\n" for slide in body.split(_NEXT)[1:])
    return Page(path.stem, f"{path.stem[:2]} {first_heading(body)}", slides)


def _sections(cells: list[Cell]) -> list[_Section]:
    """Up to the exercises."""
    sections: list[_Section] = []
    for cell in cells:
        if cell["cell_type"] == "code":
            sections[-1].code.append(cell)
            continue
        # Without what stands in fences, where # is a comment.
        prose = re.sub(r"^```.*?^```", "", text(cell), flags=re.S | re.M)
        for heading, body in re.findall(r"^(#{1,3} [^\n]*)\n?(.*?)(?=^#{1,3} |\Z)", prose, re.S | re.M):
            if heading == "## Exercises":
                return sections
            sections.append(_Section(heading, body.strip().partition("\n\n")[0]))
    return sections


def _slides(section: _Section) -> list[list[Cell]]:
    """One with the text and code, with what that prints where there is room; then one with the picture."""
    short = section.text if section.text.count("\n") < _LINES / 2 else ""  # no long tables
    head = _markdown(f"{section.heading}\n\n{short}")
    if section.heading.startswith("# "):
        return [[head]]
    if not section.code:
        return [[head]] if short else []
    pictures = [cell for cell in section.code if "alt" in cell["metadata"]]
    plain = [cell for cell in section.code if cell not in pictures]
    printing = [cell for cell in plain if 0 < _printed(cell) < _LINES]
    cell = [*printing, *plain, *pictures][0]
    fits = cell in printing and (
        _printed(cell) < 6 or text(cell).count("\n") + _printed(cell) + short.count("\n") < _LINES
    )
    slides = [[head, cell if fits else {**cell, "outputs": []}]]
    if cell in printing and not fits:
        slides.append([_markdown(section.heading), {**cell, "source": ""}])
    for cell in pictures[:1]:
        shown = [output for output in cell["outputs"] if "image/png" in output.get("data", {})]
        caption = _markdown(f"*{cell['metadata']['alt']}*")
        slides.append([_markdown(section.heading), {**cell, "source": "", "outputs": shown}, caption])
    return slides


def _printed(cell: Cell) -> int:
    """How many lines it prints, long ones broken."""
    printed = "".join("".join(output.get("text", "")) for output in cell["outputs"])
    return sum(1 + len(line) // 100 for line in printed.splitlines())


def _markdown(source: str) -> Cell:
    return {"cell_type": "markdown", "metadata": {}, "source": source}
