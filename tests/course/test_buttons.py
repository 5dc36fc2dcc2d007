"""`make buttons`: from one address, into README and notebooks, and away again."""

import json
import re
import shutil
from pathlib import Path

import pytest

from ddp_lib.course.buttons import write_buttons
from ddp_lib.course.exercises import read_exercises
from ddp_lib.errors import UserError
from tests.course.test_notebooks import faults
from tests.lab.project import ROOT

ADDRESS = "https://github.com/somebody/a-course"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    return tmp_path


def name_repository(project: Path, address: str | None) -> None:
    path = project / "pyproject.toml"
    text = re.sub(r"^\[project\.urls\]\nRepository = .*\n", "", path.read_text(), flags=re.M)
    path.write_text(text + f'[project.urls]\nRepository = "{address}"\n' if address else text)


def pages(project: Path) -> dict[str, bytes]:
    paths = [project / "README.md", *sorted(project.glob("notebooks/*.ipynb"))]
    return {path.name: path.read_bytes() for path in paths}


def test_the_pages_have_the_buttons_of_the_address_in_pyproject(project):
    before = pages(project)
    write_buttons(project)
    assert pages(project) == before


def test_buttons_and_first_cell_come_with_an_address_and_go_without(project):
    name_repository(project, None)
    write_buttons(project)
    bare = pages(project)
    for address in (ADDRESS + "-old", ADDRESS):
        name_repository(project, address)
        assert address in write_buttons(project)[0]
    with_buttons = pages(project)
    for name, text in with_buttons.items():
        links = re.findall(r"\]\((https://[^)]*a-course[^)]*)\)", text.decode())
        opened = "00_start_here.ipynb" if name == "README.md" else name
        assert [f"/blob/main/notebooks/{opened}" in link for link in links] == [True, True, False]
        assert "a-course-old" not in text.decode()
        if name != "README.md":
            notebook = json.loads(text)
            assert faults(notebook) == []
            assert read_exercises(notebook) == read_exercises(json.loads(bare[name]))
            [first, *_] = (cell for cell in notebook["cells"] if cell["cell_type"] == "code")
            assert f'"{ADDRESS}"' in "".join(first["source"])
    write_buttons(project)
    assert pages(project) == with_buttons
    name_repository(project, None)
    assert "none" in write_buttons(project)[0]
    assert pages(project) == bare


def test_what_cannot_be_written_is_named(project):
    name_repository(project, "https://example.org/course")
    with pytest.raises(UserError, match=r"'https://example\.org/course': Colab"):
        write_buttons(project)
    (project / "pyproject.toml").write_text("[project")
    with pytest.raises(UserError, match=r"cannot write the buttons of .*: Expected"):
        write_buttons(project)
    with pytest.raises(UserError, match=r"cannot write the buttons of .*pyproject\.toml"):
        write_buttons(project / "notebooks")
