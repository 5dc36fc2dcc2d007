"""The course as it is written for readers and for a class, once for all tests that look at it."""

from pathlib import Path

import pytest

from ddp_lib.course.classroom import write_class
from ddp_lib.course.site import write_site
from tests.lab.once import Once
from tests.lab.project import ROOT


@pytest.fixture(scope="session")
def site_folder(once: Once) -> Path:
    return once("site", lambda folder: write_site(ROOT / "notebooks", folder))


@pytest.fixture(scope="session")
def class_folder(once: Once) -> Path:
    plan = ROOT / "docs" / "teaching.md"
    return once("class", lambda folder: write_class(ROOT / "notebooks", plan, folder))
