"""Faults on several machines: nothing is lost, and the final parameters are the unbroken run's."""

from pathlib import Path

import pytest

from tests.lab.damage import FAULTS, make_images, unbroken


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("faults") / "images")


@pytest.mark.parametrize("name", FAULTS)
def test_fault(make_lab, images, tmp_path, name):
    lab = make_lab(3)
    whole = unbroken(images, images.parent / "unbroken")
    outcome = FAULTS[name](lab, images, whole)
    assert (outcome.samples_lost, outcome.samples_repeated) == (0, 0), outcome
    assert outcome.bits in (True, None), outcome
    # Two steps of the epoch were done at the gate; the last checkpoint was at its begin.
    assert outcome.steps_redone in (0, 2), outcome
