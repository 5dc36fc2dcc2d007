"""`make site`, and the slides of `make class`: complete, linked, and without a network."""

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


def read_all(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


@pytest.fixture(scope="module")
def site(site_folder) -> dict[str, str]:
    return read_all(site_folder)


@pytest.fixture(scope="module")
def slides(class_folder) -> dict[str, str]:
    return read_all(class_folder / "slides")


@pytest.fixture(params=["site", "slides"])
def pages(request) -> dict[str, str]:
    return request.getfixturevalue(request.param)


def test_every_notebook_has_a_page_with_all_its_pictures(site):
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text())["cells"]
        outputs = [output for cell in cells for output in cell.get("outputs", [])]
        pictures = sum("image/png" in output.get("data", {}) for output in outputs)
        assert site[f"{path.stem}.html"].count('src="data:image/png') == pictures


def test_steps_lead_from_the_contents_through_the_chapters(site):
    names = ["index", *(path.stem for path in NOTEBOOKS)]
    for number, name in enumerate(names):
        beside = names[max(0, number - 1) : number] + names[number + 1 : number + 2]
        assert re.findall(r'href="(\w+)\.html"', site[f"{name}.html"].partition("<footer>")[2]) == beside


def test_every_picture_has_a_text_alternative(pages):
    for name, text in pages.items():
        assert all(re.search(r' alt="[^"]{20}', tag) for tag in re.findall(r"<img[^>]*>", text)), name


def test_slides_show_the_sections_and_no_exercise(slides):
    for path in NOTEBOOKS:
        deck = slides[f"{path.stem}.html"]
        assert 12 <= deck.count("<section>") <= 35
        assert "What to remember" in deck and "Exercises" not in deck and "Solution" not in deck
        headed = [re.findall(r"<h\d", slide) for slide in deck.split("<section>")[1:]]
        assert all(len(heads) == 1 for heads in headed)


def test_every_link_leads_somewhere(pages):
    anchors = {
        name: {unescape(i) for i in re.findall(r' id="([^"]+)"', text)} for name, text in pages.items()
    }
    links = {
        (name, link) for name, text in pages.items() for link in re.findall(r'(?:href|src)="([^"]+)"', text)
    }
    assert len(links) > 30
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
        assert not name.endswith(".css") or ("@import" not in text and "url(" not in text)


def test_another_folder_is_not_written(tmp_path: Path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(UserError, match="holds something else than this site"):
        write_site(ROOT / "notebooks", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
