"""What is expensive to make, made once for all of pytest's workers."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

TIMEOUT_S = 600  # for another worker's making


@dataclass(frozen=True)
class Once:
    """once(name, make): make(folder) fills a new folder, whose path is returned, also to the workers
    that come later."""

    shared: Path

    def __call__(self, name: str, make: Callable[[Path], object]) -> Path:
        folder, done = self.shared / name, self.shared / f"{name}.done"
        with FileLock(self.shared / f"{name}.lock", timeout=TIMEOUT_S):
            if not done.exists():
                folder.mkdir()
                make(folder)
                done.touch()
        return folder
