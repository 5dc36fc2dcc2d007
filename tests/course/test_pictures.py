"""The notebooks' pictures: a laptop shows each of them whole, and the text below says what it shows."""

import base64
import struct

import pytest

from ddp_lib.course.site import read_notebook
from tests.lab.notebooks import NOTEBOOKS

# Of 1280 x 800, what JupyterLab leaves for outputs: a wider one is made smaller, a taller one is not.
HEIGHT = 600


def sizes(cell: dict) -> list[tuple[int, int]]:
    """Width and height, from the headers of its PNG pictures."""
    pngs = [output.get("data", {}).get("image/png") for output in cell.get("outputs", [])]
    return [struct.unpack(">II", base64.b64decode(png)[16:24]) for png in pngs if png]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_laptop_shows_each_picture_whole(path):
    for cell in read_notebook(path)["cells"]:
        for width, height in sizes(cell):
            assert height <= HEIGHT and width <= 1200, (cell["id"], width, height)
            assert len(cell["metadata"]["alt"]) > 20, cell["id"]
