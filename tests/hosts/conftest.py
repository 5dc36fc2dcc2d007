"""Fixtures of the tests on several machines."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from machines import Lab, missing


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    lacks = missing() if here else ""
    for item in here:
        item.add_marker(pytest.mark.hosts)
        if lacks:
            item.add_marker(pytest.mark.skip(reason=lacks))


@pytest.fixture
def make_lab(tmp_path: Path) -> Iterator[Callable[..., Lab]]:
    """make_lab(count, names=..., ipv4=..., ipv6=...): machines that are gone when the test ends."""
    with ExitStack() as stack:

        def make(count: int, **settings: Any) -> Lab:
            return stack.enter_context(Lab(count, tmp_path, **settings))

        yield make
