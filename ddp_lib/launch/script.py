"""A program of the reader's: its command line, and the bytes that must be equal on all machines."""

import ast
import hashlib
import sys
from dataclasses import dataclass, fields
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from ddp_lib.errors import UserError
from ddp_lib.processes.stacks import is_library


@dataclass(frozen=True)
class Script:
    """`file` with `args`; module: its name if it was given as `-m MODULE`."""

    file: Path
    args: list[str]
    module: str = ""

    @property
    def name(self) -> str:
        return self.module or self.file.name

    @property
    def target(self) -> list[str]:
        """The words behind `python` that start it."""
        return [*(["-m", self.module] if self.module else [str(self.file)]), *self.args]

    def digests(self) -> dict[str, str]:
        """Path -> SHA-256 of the script, of the modules beside it that it imports, and that those import."""
        file = self.file.resolve()
        depth = len(self.module.split(".")) - (file.name != "__main__.py") if self.module else 0
        root = file.parents[depth]
        found: dict[Path, str] = {}
        pending = [file]
        while pending:
            path = pending.pop()
            if path not in found and (path == file or not is_library(str(path))):
                text = path.read_bytes()
                found[path] = hashlib.sha256(text).hexdigest()
                pending += _imported(path, text, root)
        return {str(path.relative_to(root)): digest for path, digest in found.items()}


def split(words: list[str], options: type) -> tuple[list[str], list[str]]:
    """The launcher's flags, and from the script on. options: the dataclass that has flags without a value.

    The flags of a script may have the same names, so only what stands before it is the launcher's.
    """
    switches = {field.name for field in fields(options) if hasattr(field.type, "__metadata__")}
    number = 0
    while number < len(words) and words[number].startswith("-") and words[number] != "-m":
        name = words[number].removeprefix("--").replace("-", "_")
        number += 1 if "=" in name or name in {*switches, "h", "help"} else 2
    return words[:number], words[number:]


def name_of(words: list[str]) -> str:
    """The name of the program in `words`: its module's, or its file's. UserError if there is none."""
    if not words:
        raise UserError("no script given: ddp-launch run [flags] SCRIPT [its flags], or -m MODULE")
    if words == ["-m"]:
        raise UserError("-m without a module: ddp-launch run [flags] -m MODULE [its flags]")
    return words[1] if words[0] == "-m" else Path(words[0]).name


def read_script(words: list[str]) -> Script:
    """The program in `words`: a file, or -m and a module, and its arguments. UserError if there is none."""
    if words[0] != "-m":
        file = Path(words[0])
        if not file.is_file():
            raise UserError(
                f"script {words[0]!r} is not a file here: check the path and the working directory"
            )
        return Script(file, words[1:])
    return Script(_module_file(words[1]), words[2:], words[1])


def _module_file(name: str) -> Path:
    """The file that `python -m name` would run; imports no package on the way."""
    parts = name.split(".")
    path: list[str] | None = [str(Path.cwd()), *sys.path]
    for depth in range(1, len(parts) + 2):
        full = ".".join(parts[:depth] if depth <= len(parts) else [*parts, "__main__"])
        spec = PathFinder.find_spec(full, path) or _find_editable(full, path if depth > 1 else None)
        path = spec.submodule_search_locations if spec else None
        if depth >= len(parts) and spec and spec.origin and not path:
            return Path(spec.origin)
        if not path:
            break
    raise UserError(f"-m {name}: there is no such module here: check the name and the working directory")


def _find_editable(name: str, path: list[str] | None) -> ModuleSpec | None:
    """By the finders that an editable install adds to Python's own."""
    added = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("_frozen_importlib")]
    return next(filter(None, (finder.find_spec(name, path) for finder in added)), None)


def _imported(path: Path, text: bytes, root: Path) -> list[Path]:
    """Files below `root` that the module `path` imports anywhere in its text."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return []  # Python itself will say so
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inside = path.relative_to(root).parts[: -node.level] if node.level else ()
            module = ".".join([*inside, *filter(None, [node.module])])
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    files = []
    for name in names:
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):  # importing a.b also runs a/__init__.py
            base = root.joinpath(*parts[:depth])
            files += [file for file in (base.with_suffix(".py"), base / "__init__.py") if file.is_file()]
    return files
