"""What all ranks agree on: values that must be equal, and results of rank 0 or of all ranks."""

import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ddp_lib.errors import UserError

if TYPE_CHECKING:
    from ddp_lib.distributed.world import World


def compare(world: "World", what: str, values: dict[str, Any], cure: str, timeout_s: float) -> None:
    """UserError, on every rank, if a value (anything JSON holds, on no device) differs between ranks.

    The message names the value, the machine, and `cure`. UserError too if a value is a tensor.
    """
    for name, value in values.items():
        if isinstance(value, torch.Tensor):
            raise UserError(
                f"{name} is a tensor, on {value.device}: compare takes plain values, such as "
                "tensor.tolist(), or a digest of it"
            )

    def conclude(answers: list[Any]) -> None:
        for name in values:
            require_equal(name, [(host, theirs.get(name)) for host, theirs in answers], cure)

    world.store_group.exchange(what, [socket.gethostname(), values], timeout_s, conclude, answered=False)


def require_equal(name: str, answers: list[tuple[str, Any]], cure: str) -> None:
    """UserError if the values in `answers`, (machine, value) pairs in rank order, are not all equal."""
    first_host, first = answers[0]
    for rank, (host, value) in enumerate(answers):
        if value != first:
            raise UserError(
                f"{name} is {value!r} for rank {rank} on {host}, but {first!r} for rank 0 on "
                f"{first_host}: {cure}"
            )


def broadcast_result(world: "World", what: str, make: Callable[[], Any], timeout_s: float) -> Any:
    """Calls `make()` on rank 0 only and returns its result (anything JSON holds) on every rank.

    A UserError of rank 0 is raised on every rank.
    """
    with world.store_group.publishing_errors():
        value = make() if world.rank == 0 else None
    return world.store_group.broadcast(what, value, timeout_s)


def all_gather_results(world: "World", what: str, make: Callable[[], Any], timeout_s: float) -> list[Any]:
    """Calls `make()` on each rank; returns all results (anything JSON holds) in rank order, on every rank.

    A UserError of any rank is raised on every rank, with the rank and machine it came from.
    """
    with world.store_group.publishing_errors():
        value = make()
    return world.store_group.exchange(what, value, timeout_s)
