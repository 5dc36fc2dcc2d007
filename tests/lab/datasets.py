"""Data sets that tests load."""

from pathlib import Path
from typing import Any

import pytest

from ddp_lib.data.dataset import load_dataset
from ddp_lib.errors import UserError


def quiet(text: str) -> None:
    pass


def refusal(source: str, data_dir: Path, **options: Any) -> str:
    """The one line with which a data set is refused."""
    with pytest.raises(UserError) as caught:
        load_dataset(source, data_dir, log=quiet, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)
