"""`make site`: complete, linked, and without a network."""

import json
import re
from html import unescape
from pathlib import Path
from urllib.parse import unquote

import pytest

from ddp_lib.course.site import write_site
from ddp_lib.errors import UserError
from tests.lab.notebooks import NOTEBOOKS
from tests.lab.project import ROOT


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("all") / "site"
    write_site(ROOT / "notebooks", folder)
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


def test_every_notebook_has_a_page_with_all_its_pictures(pages):
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text())["cells"]
        outputs = [output for cell in cells for output in cell.get("outputs", [])]
        pictures = sum("image/png" in output.get("data", {}) for output in outputs)
        assert pages[f"{path.stem}.html"].count('src="data:image/png') == pictures


def test_every_link_leads_somewhere(pages):
    anchors = {
        name: {unescape(i) for i in re.findall(r' id="([^"]+)"', text)} for name, text in pages.items()
    }
    links = {
        (name, link) for name, text in pages.items() for link in re.findall(r'(?:href|src)="([^"]+)"', text)
    }
    assert len(links) > 100
    for page, link in links:
        if link.startswith("data:") or re.match(r"https?://", link):
            continue
        name, _, anchor = unquote(unescape(link)).partition("#")
        assert (name or page) in pages, (page, link)
        assert not anchor or anchor in anchors[name or page], (page, link)


def test_no_page_loads_anything_from_elsewhere(pages):
    for name, text in pages.items():
        loaded = re.findall(r'<(?:script|link|img|iframe)[^>]*(?:src|href)="([^"]+)"', text)
        assert [link for link in loaded if re.match(r"(?:https?:)?//", link)] == [], name
    assert "@import" not in pages["style.css"] and "url(" not in pages["style.css"]


def test_another_folder_is_not_written(tmp_path: Path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(UserError, match="holds something else than this site"):
        write_site(ROOT / "notebooks", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
