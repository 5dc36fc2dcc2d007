"""The course as a web site: one page per notebook, contents, search; needs no network, to write or to read.

nbconvert renders the cells; the frame around them is `page/`.
"""

import html
import json
import re
import shutil
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from string import Template

from ddp_lib.course.exercises import Cell, text
from ddp_lib.errors import UserError

FRAME = Path(__file__).with_name("page")
# A link to a file of the project that is no page.
_FILE = re.compile(r'href="\.\./((?:[\w-]+/)*[\w.-]+?(?<!\.md))"')
_TITLE = "Distributed data parallel training with PyTorch"


@dataclass(frozen=True)
class Page:
    """name: of its file, without .html. body: HTML."""

    name: str
    title: str
    body: str

    @property
    def link(self) -> str:
        return f"{self.name}.html"


def write_site(course: Path, out: Path) -> list[str]:
    """Writes the pages to `out`; returns lines that say so.

    UserError if there are no notebooks, or `out` cannot be written, or holds something else.
    """
    notebooks = sorted(course.glob("*.ipynb"))
    if not notebooks:
        raise UserError(f"{course} holds no notebooks: give the folder of the course")
    if out.exists() and not (out / "sections.js").exists() and any(out.iterdir()):
        raise UserError(f"{out} holds something else than this site: give another folder, or empty it")
    chapters = [_chapter(path) for path in notebooks]
    linked = sorted({name for page in chapters for name in re.findall(r'href="(\.\./[^"#]+\.md)', page.body)})
    others = [_markdown(course / name) for name in linked]
    items = "".join(f'<li><a href="{page.link}">{html.escape(page.title)}</a></li>' for page in chapters)
    index = Page("index", _TITLE, f'<h1>{_TITLE}</h1><ul class="contents">{items}</ul>')
    sections = [section for page in [*chapters, *others] for section in _sections(page)]
    try:
        out.mkdir(parents=True, exist_ok=True)
        pages = [index, *chapters]
        for previous, page, following in zip([None, *pages[:-1]], pages, [*chapters, None], strict=True):
            _write(out, page, previous, following)
        for page in others:
            _write(out, page, index)
        for name in sorted({name for page in chapters for name in _FILE.findall(page.body)}):
            (out / "files" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(course.parent / name, out / "files" / name)
        (out / "sections.js").write_text(f"const SECTIONS = {json.dumps(sections)};\n", encoding="utf-8")
        for file in ("style.css", "script.js"):
            shutil.copyfile(FRAME / file, out / file)
        with open(out / "style.css", "a", encoding="utf-8") as style:
            style.write(code_colours())
    except OSError as error:
        raise UserError(f"cannot write the site to {out}: {error}") from error
    return [f"{out / 'index.html'}: {len(chapters)} chapters, {len(sections)} sections to search"]


def read_notebook(path: Path) -> Cell:
    """The notebook; a picture's text alternative is the text below it, in italics."""
    import nbformat

    notebook: Cell = nbformat.read(path, as_version=4)
    for cell, below in pairwise(notebook["cells"]):
        if any("image/png" in output.get("data", {}) for output in cell.get("outputs", [])):
            caption = re.match(r"\*(?!\*)(.+?)\*(?!\*)", text(below), re.S)
            cell["metadata"]["alt"] = " ".join(caption[1].split()) if caption else ""
    return notebook


def to_html(notebook: Cell) -> str:
    import nbformat
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(template_name="basic")
    return str(exporter.from_notebook_node(nbformat.from_dict(notebook))[0])


def _chapter(path: Path) -> Page:
    body = to_html(read_notebook(path))
    return Page(path.stem, f"{path.stem[:2]} {first_heading(body)}", body)


def _markdown(path: Path) -> Page:
    from nbconvert.filters import markdown2html

    def plain(match: re.Match[str]) -> str:
        return match[1] + re.sub(r"[^\w-]", "", html.unescape(match[2]).lower()) + '"'

    body = markdown2html(path.read_text(encoding="utf-8"))
    body = re.sub(r'( id="|href="#)([^"]+)"', plain, body)  # as GitHub names headings
    return Page(path.stem.lower(), first_heading(body), body)


def first_heading(body: str) -> str:
    return _plain(re.search(r"<h1.*?</h1>", body, re.S)[0])  # type: ignore[index]


def _plain(body: str) -> str:
    """The text of a piece of HTML."""
    without = re.sub(r'<a class="anchor-link".*?</a>|<img[^>]*>|<style.*?</style>', "", body, flags=re.S)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", without)).split())


def _sections(page: Page) -> list[dict[str, str]]:
    """What can be found: the text from each heading to the next."""
    parts = re.split(r'(<h[1-3][^>]* id="[^"]+".*?</h[1-3]>)', page.body, flags=re.S)
    sections = []
    for heading, below in zip(parts[1::2], parts[2::2], strict=True):
        anchor = re.findall(r'id="([^"]+)"', heading)[0]
        name = page.title[:2] if page.title[:2].isdigit() else page.title
        link, words = f"{page.link}#{anchor}", _plain(heading + below).lower()
        sections.append({"page": name, "title": _plain(heading), "link": link, "text": words})
    return sections


def _write(out: Path, page: Page, previous: Page | None, following: Page | None = None) -> None:
    body = re.sub(r'href="(?:\.\./)?(?:\w+/)*(\w+)\.(?:ipynb|md)(#[^"]*)?"', _as_page, page.body)
    body = _FILE.sub(r'href="files/\1"', body)
    back = f'<a href="{previous.link}">&larr; {html.escape(previous.title)}</a>' if previous else ""
    on = f'<a href="{following.link}">{html.escape(following.title)} &rarr;</a>' if following else ""
    frame = Template((FRAME / "frame.html").read_text(encoding="utf-8"))
    whole = frame.substitute(title=html.escape(page.title), body=body, steps=back + on)
    (out / page.link).write_text(whole, encoding="utf-8")


def _as_page(link: re.Match[str]) -> str:
    name, anchor = link.groups()
    return f'href="{name if name[:2].isdigit() else name.lower()}.html{anchor or ""}"'


def code_colours() -> str:
    from pygments.formatters import HtmlFormatter

    light = HtmlFormatter(style="default").get_style_defs(".highlight")
    dark = HtmlFormatter(style="github-dark").get_style_defs('[data-theme="dark"] .highlight')
    return f"{light}\n{dark}\n.highlight {{ background: none !important; }}\n"
