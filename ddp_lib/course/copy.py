"""A reader's own copy of the course, so that running and answering changes no file of the course itself."""

import hashlib
import json
import shutil
from itertools import count
from pathlib import Path

from ddp_lib.errors import UserError

# In the copy: name of a notebook -> digest of the course's notebook when it was copied.
COPIED = ".copied.json"


def copy_course(course: Path, work: Path, fresh: bool = False) -> list[str]:
    """Copies the notebooks of `course` that are missing in `work`; returns lines that say what was done.

    A notebook of `work` is never written over: if the course's has changed since, a line says so. fresh:
    moves `work` aside first. UserError if there are no notebooks, or a folder cannot be read or written.
    """
    notebooks = sorted(course.glob("*.ipynb"))
    if not notebooks:
        raise UserError(f"{course} holds no notebooks: give the folder of the course")
    lines = []
    try:
        if fresh and work.exists():
            aside = next(path for n in count(1) if not (path := Path(f"{work}-{n}")).exists())
            work.rename(aside)
            lines.append(f"{work}: your earlier copy is now {aside}")
        work.mkdir(parents=True, exist_ok=True)
        record = work / COPIED
        copied = json.loads(record.read_text()) if record.exists() else {}
        missing = [path for path in notebooks if not (work / path.name).exists()]
        changed = [
            path.stem
            for path in notebooks
            if path not in missing and copied.get(path.name) != digest_of_cells(path)
        ]
        for path in missing:
            shutil.copyfile(path, work / path.name)
            copied[path.name] = digest_of_cells(path)
        record.write_text(json.dumps(copied, indent=1) + "\n")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot copy the course from {course} to {work}: {error}") from error
    if missing:
        names = "all notebooks" if len(missing) == len(notebooks) else ", ".join(p.stem for p in missing)
        lines.append(f"{work}: copied {names} from {course}; what you do there changes no file of the course")
    if changed:
        lines.append(
            f"{work}: the course has newer versions of {', '.join(changed)}. Your copies are as you left "
            "them. To get a new one, rename or delete yours; make lab FRESH=1 moves all of them aside"
        )
    return lines


def digest_of_cells(notebook: Path) -> str:
    """Digest of the text and code of its cells: outputs do not count."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    text = json.dumps([["".join(cell["source"]), cell["cell_type"]] for cell in cells])
    return hashlib.sha256(text.encode()).hexdigest()
