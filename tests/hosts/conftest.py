"""Fixtures of the tests on several machines."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.lab.machines import Lab, Machine
from tests.lab.namespaces import missing
from tests.lab.program import Program
from tests.lab.project import ROOT

PORT = 29500


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    lacks = missing() if here else ""
    for item in here:
        item.add_marker(pytest.mark.hosts)
        if lacks:
            item.add_marker(pytest.mark.skip(reason=lacks))


@pytest.fixture(scope="session")
def tiny(images_folder: Path, shared_cache: str) -> list[str]:
    """Flags of a training of two epochs of three steps; the model is tests/lab/models.py's."""
    return [
        "--data", str(images_folder), "--data-dir", shared_cache, "--model", "tests.lab.models:Plain",
        "--global-batch-size", "210", "--epochs", "2",
    ]  # fmt: skip


@pytest.fixture
def train(tiny: list[str]) -> Callable[..., Program]:
    """train(machine, *flags, rank=None, size=2, master=None, **environment): starts ddp-launch train.

    With a rank, as one process by the four variables; else by the launcher's flags.
    """

    def start(
        machine: Machine,
        *flags: str,
        rank: int | None = None,
        size: int = 2,
        master: str = "",
        **environment: str,
    ) -> Program:
        if rank is not None:
            four = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": master, "MASTER_PORT": PORT}
            environment = {**{name: str(value) for name, value in four.items()}, **environment}
        command = ["ddp-launch", "train", *tiny, "--run-dir", str(machine.folder / "run"), *flags]
        return machine.start(command, cwd=ROOT, **environment)

    return start


@pytest.fixture
def make_lab(tmp_path: Path) -> Iterator[Callable[..., Lab]]:
    """make_lab(count, names=..., ipv4=..., ipv6=...): machines that are gone when the test ends."""
    with ExitStack() as stack:

        def make(count: int, **settings: Any) -> Lab:
            return stack.enter_context(Lab(count, tmp_path, **settings))

        yield make
