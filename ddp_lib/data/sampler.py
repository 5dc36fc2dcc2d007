"""Which rank sees which sample: shuffled per epoch, sharded by rank, resumable, exact in evaluation."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ddp_lib.errors import UserError


class Indices(torch.Tensor):
    """An int64 tensor of sample numbers. Iterated over, as a DataLoader does, it gives plain ints: a 0-d
    tensor is no key for pandas and dicts. What torch computes from it is a plain tensor."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __iter__(self) -> Iterator[int]:
        return iter(self.tolist())


def batch_share(global_batch_size: int, world_size: int, rank: int = 0, micro_batches: int = 1) -> int:
    """Images of `rank` per step: the ranks' shares are equal, or differ by one. UserError if the global batch
    has less than one image for each micro-batch of each rank."""
    parts = world_size * micro_batches
    if global_batch_size < parts:
        ranks = f"{world_size} ranks" + (f" x {micro_batches} micro-batches" if micro_batches > 1 else "")
        raise UserError(
            f"global batch size {global_batch_size} is less than one image for each of {ranks}: take {parts} "
            "or more"
        )
    return global_batch_size // world_size + (rank < global_batch_size % world_size)


class TrainSampler:
    """One rank's batches of indices, for a loop or as `DataLoader(batch_sampler=...)`.

    An epoch is a permutation of the n samples, the same on all ranks. Step k uses the k-th piece of
    `global_batch_size` indices. Of this piece, rank r takes every `world_size`-th index, starting with the
    r-th, as `torch.utils.data.DistributedSampler(drop_last=True)` does. An incomplete last piece is dropped.
    So each step sees the same samples, however many ranks there are. If the global batch is not divisible by
    the number of ranks, the first ranks get one sample more: multiply each rank's mean loss by
    len(batch) * world_size / global_batch_size.

    with_epoch: yields lists of (epoch, index), for a SeededDataset in a DataLoader.

    UserError if n is less than one global batch, or a rank would get no sample.
    """

    def __init__(
        self,
        n: int,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        with_epoch: bool = False,
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
        self.rank, self.world_size, self.with_epoch = rank, world_size, with_epoch
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Sets the epoch, which decides the permutation, and the step at which iteration starts. If it is
        never called, each iteration repeats the same order, as with torch's sampler."""
        self.epoch, self.start_step = epoch, start_step

    def __len__(self) -> int:
        """The number of steps in a whole epoch, also if iteration starts at a later step."""
        return self.n // self.global_batch_size

    def __iter__(self) -> Iterator[Any]:
        """Yields `Indices`, `batch_share` of them, or lists if with_epoch."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        permutation = torch.randperm(self.n, generator=generator)
        for step in range(self.start_step, len(self)):
            first = step * self.global_batch_size
            share = permutation[first + self.rank : first + self.global_batch_size : self.world_size]
            indices = share.as_subclass(Indices)
            yield [(self.epoch, index) for index in indices] if self.with_epoch else indices


class SeededDataset(Dataset[Any]):
    """`dataset`, whose random augmentation depends only on (seed, epoch, index).

    So a sample is augmented alike on any rank, by any DataLoader worker and after a restart. Its keys are
    (epoch, index), as TrainSampler(with_epoch=True) yields them. While a sample is made, the generators of
    torch, Python's random and numpy.random are seeded.
    """

    def __init__(self, dataset: Any, seed: int = 0) -> None:
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        # numpy's SeedSequence mixes the three well: neighbouring seeds give unrelated numbers.
        words = np.random.SeedSequence((self.seed, epoch, index)).generate_state(2)
        before = random.getstate(), np.random.get_state()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(words[0]) << 32 | int(words[1]))
            random.seed(int(words[0]))
            np.random.seed(words[1])
            try:
                return self.dataset[index]
            finally:
                random.setstate(before[0])
                np.random.set_state(before[1])


def eval_batches(n: int, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[Indices]:
    """One rank's batches of indices; all ranks together cover 0..n-1 exactly once, without padding.

    The data is cut into chunks of `batch_size` (the last may be shorter), and chunk j goes to rank
    j % world_size. Which samples are in a chunk does not depend on the number of ranks, and so neither do the
    bits that a model computes from it. Ranks may get different numbers of chunks, or none, so do not call a
    collective inside a loop over them.
    """
    for first in range(rank * batch_size, n, world_size * batch_size):
        yield torch.arange(first, min(first + batch_size, n)).as_subclass(Indices)
