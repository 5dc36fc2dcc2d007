"""Buttons that open the course on Colab, Kaggle and Codespaces, and the cell that installs it there.

They are made from one address, `Repository` of [project.urls] in pyproject.toml. Without it there are none.
"""

import json
import re
import tomllib
from pathlib import Path

from ddp_lib.course.exercises import PREPARE, Cell
from ddp_lib.errors import UserError

_BUTTONS = "buttons"  # the id of a notebook's cell with the buttons; PREPARE that of the cell that installs
_IN_README = re.compile(r"<!-- buttons: written by make buttons -->.*?<!-- buttons: end -->\n\n", re.S)
_INSTALL = """\
# Where the course is missing, as on Colab and Kaggle, this installs it. Elsewhere it does nothing.
import importlib.util
import os
import subprocess
import sys

if importlib.util.find_spec("ddp_lib") is None:
    if not os.path.isdir("course"):
        subprocess.run(["git", "clone", "--quiet", "--depth", "1", ADDRESS, "course"], check=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "-e", "./course"], check=True)
    sys.path.insert(0, os.path.abspath("course"))  # this process began before the installation
    importlib.invalidate_caches()"""


def write_buttons(project: Path) -> list[str]:
    """Writes the buttons into README.md and the notebooks of `project`, or removes them; returns what it did.

    UserError if the address is none that the buttons can open, or a file cannot be read or written.
    """
    try:
        settings = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))
        address = settings["project"].get("urls", {}).get("Repository", "").removesuffix("/")
        if address and not re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", address):
            raise UserError(
                f"Repository in pyproject.toml is {address!r}: Colab, Kaggle and Codespaces open "
                "https://github.com/OWNER/NAME only; name that, or remove the line"
            )
        notebooks = sorted((project / "notebooks").glob("*.ipynb"))
        if not notebooks:
            raise UserError(f"{project / 'notebooks'} holds no notebooks: give the folder of the project")
        readme = project / "README.md"
        texts = {readme: _with_line(readme.read_text(encoding="utf-8"), address, notebooks[0].name)}
        for path in notebooks:
            notebook = _with_cells(json.loads(path.read_text(encoding="utf-8")), address, path.name)
            texts[path] = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
        changed = [path for path, text in texts.items() if path.read_text(encoding="utf-8") != text]
        for path in changed:
            path.write_text(texts[path], encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write the buttons of {project}: {error}") from error
    return [f"{len(changed)} files changed; buttons: {address or 'none, pyproject.toml names no Repository'}"]


def buttons(address: str, notebook: str) -> str:
    """Markdown: links that open the notebook."""
    name = address.removeprefix("https://github.com/")
    colab = f"https://colab.research.google.com/github/{name}/blob/main/notebooks/{notebook}"
    kaggle = f"https://www.kaggle.com/kernels/welcome?src={address}/blob/main/notebooks/{notebook}"
    codespaces = f"https://codespaces.new/{name}"
    return f"**Run it on** [Colab]({colab}) · [Kaggle]({kaggle}) · [Codespaces]({codespaces})"


def install_code(address: str) -> str:
    """The code of a notebook's first cell."""
    return _INSTALL.replace("ADDRESS", json.dumps(address))


def _with_line(readme: str, address: str, first: str) -> str:
    readme = _IN_README.sub("", readme)
    if not address:
        return readme
    title, _, rest = readme.partition("\n\n")
    line = f"<!-- buttons: written by make buttons -->\n{buttons(address, first)}\n<!-- buttons: end -->"
    return f"{title}\n\n{line}\n\n{rest}"


def _with_cells(notebook: Cell, address: str, name: str) -> Cell:
    """The cells stand below the title. Outputs stay as they are, for the first cell prints nothing; only the
    counts of the other cells change."""
    cells = [cell for cell in notebook["cells"] if cell.get("id") not in (_BUTTONS, PREPARE)]
    shift = bool(address) - any(cell.get("id") == PREPARE for cell in notebook["cells"])
    for part in [part for cell in cells for part in (cell, *cell.get("outputs", []))]:
        if part.get("execution_count"):
            part["execution_count"] += shift
    if address:
        link = {"id": _BUTTONS, "cell_type": "markdown", "metadata": {}}
        code = {"id": PREPARE, "cell_type": "code", "metadata": {"tags": [PREPARE]}, "execution_count": 1}
        cells[1:1] = [
            link | {"source": [buttons(address, name)]},
            code | {"outputs": [], "source": install_code(address).splitlines(keepends=True)},
        ]
    return notebook | {"cells": cells}
