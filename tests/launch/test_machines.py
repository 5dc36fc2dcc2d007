"""What is refused when the machines are compared before the ranks start."""

from contextlib import nullcontext

import pytest

from ddp_lib.errors import UserError
from ddp_lib.launch.machines import require_equal, require_gpus


def machine(
    host: str,
    gpus: int = 0,
    ranks: int = 1,
    flags=(),
    files=(("own.py", "a"),),
    no_gpu="no driver",
    **versions: str,
) -> dict:
    equal = {"Python": "3.11.7", "torch": "2.14.1", "NCCL": "2.28.9", **versions}
    program = {"files": dict(files), "flags": list(flags)}
    return {"host": host, "equal": equal, "ranks": ranks, "gpus": gpus, "no_gpu": no_gpu, "program": program}


UNLIKE = {
    "another Python": ({"Python": "3.13.1"}, "Python is 3.13.1 on b, but 3.11.7 on a: install the same"),
    "another torch": ({"torch": "2.13.0"}, "torch is 2.13.0 on b, but 2.14.1 on a: install the same"),
    "no NCCL": ({"NCCL": ""}, "NCCL is not there on b, but 2.28.9 on a: install the same"),
    "another script": ({"files": [("own.py", "b")]}, "own.py differs between b and a: copy the same files"),
    "a file less": ({"files": []}, "own.py is missing on b: copy the same files"),
    "a file more": (
        {"files": [("own.py", "a"), ("x/y.py", "a")]},
        "x/y.py is missing on a: copy the same files",
    ),
    "a flag": ({"flags": ["--lr", "0.2"]}, "the flags differ: --lr 0.2 on b, but none on a"),
    "two values": (
        {"flags": ["--lr", "0.2", "--amp"]},
        "the flags differ: --lr 0.2 --amp on b, but none on a",
    ),
}


@pytest.mark.parametrize("how", UNLIKE)
def test_machines_that_differ_are_refused_with_the_cure(how):
    changes, text = UNLIKE[how]
    with pytest.raises(UserError) as refused:
        require_equal(machine("a"), machine("b", **changes))
    assert text in str(refused.value) and "or leave this out with --no-check" in str(refused.value)


def test_equal_machines_pass_whatever_their_gpus():
    require_equal(machine("a", gpus=8), machine("b", gpus=1))


@pytest.mark.parametrize(
    ("first", "other", "shown"),
    [
        ("--lr 0.1 --amp", "--lr 0.2 --amp", ("--lr 0.2 on b", "--lr 0.1 on a")),
        ("--epochs 3", "--epochs 3 --amp", ("--amp on b", "none on a")),
        ("data --lr 0.1", "images --lr 0.1", ("images on b", "data on a")),
    ],
)
def test_only_the_flags_that_differ_are_shown(first, other, shown):
    with pytest.raises(UserError) as refused:
        require_equal(machine("a", flags=first.split()), machine("b", flags=other.split()))
    assert "the flags differ: {}, but {}: give every".format(*shown) in str(refused.value)


FEWER = "b has 1 GPU(s) for 2 ranks: lower --nproc-per-node"
NONE = "b has no GPU that torch can use (no driver), but a has 8: make them work there, or hide"


@pytest.mark.parametrize(
    ("here", "gpus", "ranks", "needed", "line"),
    [
        (8, 0, 4, True, NONE),
        (8, 1, 2, True, FEWER),
        (8, 2, 2, True, ""),
        (0, 0, 2, True, ""),
        (8, 1, 2, False, ""),
        (8, 0, 2, False, ""),
    ],
)
def test_fewer_gpus_than_ranks_are_refused_for_a_script(here, gpus, ranks, needed, line):
    """Without any GPU on any machine it computes on the CPU."""
    with pytest.raises(UserError) if line else nullcontext() as refused:
        require_gpus([machine("a", gpus=here), machine("b", gpus=gpus, ranks=ranks)], needed)
    assert not line or str(refused.value).startswith(line)
