"""Which rank sees which sample: shuffled per epoch, sharded by rank, resumable, exact in evaluation."""

from collections.abc import Iterator

import torch

from ddp_lib.errors import UserError


def batch_share(global_batch_size: int, world_size: int, micro_batches: int = 1) -> int:
    """Images per rank and step. UserError if the global batch cannot be divided equally."""
    parts = world_size * micro_batches
    if global_batch_size < 1 or global_batch_size % parts:
        nearest = max(1, round(global_batch_size / parts)) * parts
        ranks = f"{world_size} ranks" + (f" x {micro_batches} micro-batches" if micro_batches > 1 else "")
        raise UserError(f"global batch size {global_batch_size} is not divisible by {ranks}: take {nearest}")
    return global_batch_size // world_size


class TrainSampler:
    """One rank's batches of indices, for a loop or as `DataLoader(batch_sampler=...)`.

    An epoch is a permutation of the n samples, the same on all ranks. Step k uses the k-th piece of
    `global_batch_size` indices. Of this piece, rank r takes every `world_size`-th index, starting with the
    r-th, as `torch.utils.data.DistributedSampler(drop_last=True)` does. An incomplete last piece is dropped.
    So each step sees the same samples, however many ranks there are.

    UserError if n is less than one global batch, or the ranks cannot divide the global batch equally.
    """

    def __init__(
        self, n: int, global_batch_size: int, rank: int = 0, world_size: int = 1, seed: int = 0
    ) -> None:
        if not 0 <= rank < world_size:
            raise UserError(f"rank {rank} of {world_size}: give a rank from 0 to {world_size - 1}")
        batch_share(global_batch_size, world_size)
        if n < global_batch_size:
            raise UserError(
                f"{n} training samples make no global batch of {global_batch_size}: "
                "take a smaller global batch size or more data"
            )
        self.n, self.global_batch_size, self.seed = n, global_batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Sets the epoch, which decides the permutation, and the step at which iteration starts. If it is
        never called, each iteration repeats the same order, as with torch's sampler."""
        self.epoch, self.start_step = epoch, start_step

    def __len__(self) -> int:
        """The number of steps in a whole epoch, also if iteration starts at a later step."""
        return self.n // self.global_batch_size

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Yields int64 tensors (global_batch_size // world_size,) of sample indices."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        permutation = torch.randperm(self.n, generator=generator)
        for step in range(self.start_step, len(self)):
            first = step * self.global_batch_size
            yield permutation[first + self.rank : first + self.global_batch_size : self.world_size]


def eval_batches(n: int, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[torch.Tensor]:
    """One rank's batches of indices; all ranks together cover 0..n-1 exactly once, without padding.

    The data is cut into chunks of `batch_size` (the last may be shorter), and chunk j goes to rank
    j % world_size. Which samples are in a chunk does not depend on the number of ranks, and so neither do the
    bits that a model computes from it. Ranks may get different numbers of chunks, or none, so do not call a
    collective inside a loop over them.
    """
    for first in range(rank * batch_size, n, world_size * batch_size):
        yield torch.arange(first, min(first + batch_size, n))
