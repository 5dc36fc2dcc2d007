"""Faults on several machines: nothing is lost, and the final parameters are the unbroken run's."""

from pathlib import Path

import pytest

from tests.lab.damage import FAULTS
from tests.lab.training import STEPS_PER_EPOCH, make_images, unbroken


@pytest.fixture(scope="module")
def images(once) -> Path:
    return once("faults", lambda folder: make_images(folder / "images")) / "images"


@pytest.fixture(scope="module")
def weights(once, images) -> bytes:
    """Those that the training ends with when nothing goes wrong."""
    file = "weights"
    folder = once(
        "faults-unbroken",
        lambda folder: (folder / file).write_bytes(unbroken(images, folder / "lab")),
    )
    return (folder / file).read_bytes()


@pytest.mark.parametrize("name", FAULTS)
def test_nothing_is_lost_in_a_fault(make_lab, images, weights, name):
    lab = make_lab(3)
    outcome = FAULTS[name](lab, images, weights)
    assert (outcome.samples_lost, outcome.samples_repeated) == (0, 0), outcome
    assert outcome.bits in (True, None), outcome
    # Two steps of the epoch were done at the gate; the last checkpoint was at its begin. A full disk may show
    # only at the next one, at its end.
    assert outcome.steps_redone in (0, 2, STEPS_PER_EPOCH), outcome
