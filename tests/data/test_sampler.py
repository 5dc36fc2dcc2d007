import random
from itertools import chain

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from ddp_lib.data.sampler import SeededDataset, TrainSampler, eval_batches
from ddp_lib.errors import UserError


class Sized:
    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("n", [42, 84, 85, 100, 125])  # whole batches, whole shards, neither
@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (3, 5)])
def test_selects_what_torchs_distributed_sampler_selects(
    n: int, world_size: int, seed: int, epoch: int
) -> None:
    per_rank = 42 // world_size
    for rank in range(world_size):
        ours = TrainSampler(n, 42, rank, world_size, seed)
        torchs: DistributedSampler[int] = DistributedSampler(
            Sized(n),  # type: ignore[arg-type]
            num_replicas=world_size,
            rank=rank,
            seed=seed,
            drop_last=True,
        )
        ours.set_epoch(epoch)
        torchs.set_epoch(epoch)
        theirs = list(torchs)
        batches = [batch.tolist() for batch in ours]
        assert len(batches) == len(ours) == len(theirs) // per_rank
        assert batches == [theirs[k * per_rank : (k + 1) * per_rank] for k in range(len(ours))]


def test_any_number_of_ranks_sees_the_same_global_batches() -> None:
    def global_batches(world_size: int) -> list[set[int]]:
        shards = [list(TrainSampler(1000, 210, r, world_size, seed=1)) for r in range(world_size)]
        steps = list(zip(*shards, strict=True))
        assert all(len(torch.cat(step)) == 210 for step in steps)
        return [set(torch.cat(step).tolist()) for step in steps]

    alone = global_batches(1)
    assert [len(batch) for batch in alone] == [210] * 4  # the incomplete fifth is dropped
    assert len(set.union(*alone)) == 840  # none twice
    for world_size in (2, 3, 7, 210):
        assert global_batches(world_size) == alone


def test_starts_in_the_middle_of_an_epoch() -> None:
    sampler = TrainSampler(100, 10, rank=1, world_size=2)
    sampler.set_epoch(4)
    whole = [batch.tolist() for batch in sampler]
    for step in (0, 3, 9, 10):
        sampler.set_epoch(4, start_step=step)
        assert [batch.tolist() for batch in sampler] == whole[step:]
        assert len(sampler) == 10
    sampler.set_epoch(4)
    assert [batch.tolist() for batch in sampler] == whole


def test_epochs_and_seeds_differ() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = TrainSampler(100, 100, seed=seed)
        sampler.set_epoch(epoch)
        (batch,) = sampler
        assert batch.dtype == torch.int64
        return batch.tolist()

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(7, 0)


def test_is_a_batch_sampler_for_a_data_loader() -> None:
    sampler = TrainSampler(20, 8, rank=1, world_size=2)
    loader = DataLoader(TensorDataset(torch.arange(20)), batch_sampler=sampler)  # type: ignore[arg-type]
    assert len(loader) == 2
    assert [x.tolist() for (x,) in loader] == [batch.tolist() for batch in sampler]


@pytest.mark.parametrize("batches", [TrainSampler(20, 8), list(eval_batches(20, 8))], ids=["train", "eval"])
def test_a_data_loader_reads_plain_ints(batches) -> None:
    by_number = {n: n for n in range(20)}  # a tensor is no key of it
    assert [x.tolist() for x in DataLoader(by_number, batch_sampler=batches)] == [b.tolist() for b in batches]
    (first, *_) = batches
    assert type(torch.cat([first, first])) is type(first + 0) is torch.Tensor


@pytest.mark.parametrize("n", [1, 2, 5, 24, 25, 26, 1000])
@pytest.mark.parametrize("batch_size", [1, 5, 25, 1001])
def test_evaluation_is_exact_on_any_number_of_ranks(n: int, batch_size: int) -> None:
    alone = [batch.tolist() for batch in eval_batches(n, batch_size)]
    assert list(chain(*alone)) == list(range(n))
    for world_size in (1, 2, 3, 7, 64):
        shares = [
            [batch.tolist() for batch in eval_batches(n, batch_size, rank, world_size)]
            for rank in range(world_size)
        ]
        assert sorted(chain(*shares)) == alone  # the same batches, each on one rank
        assert shares[0][0] == alone[0]


@pytest.mark.parametrize(
    ("n", "batch", "rank", "world_size", "words"),
    [
        (100, 128, 0, 1, "100 training samples make no global batch of 128"),
        (0, 1, 0, 1, "0 training samples"),
        (1000, 2, 0, 3, "global batch size 2 is less than one image for each of 3 ranks: take 3"),
        (1000, 0, 0, 2, "global batch size 0"),
        (1000, -4, 0, 2, "global batch size -4"),
        (1000, 100, 2, 2, "rank 2 of 2"),
        (1000, 100, -1, 2, "rank -1 of 2"),
    ],
)
def test_impossible_sizes_and_ranks_are_refused(
    n: int, batch: int, rank: int, world_size: int, words: str
) -> None:
    with pytest.raises(UserError, match=words) as caught:
        TrainSampler(n, batch, rank, world_size)
    assert "\n" not in str(caught.value)


class Drawn(torch.utils.data.Dataset):
    """Each sample draws from all three generators."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> list[float]:
        return [index, torch.rand(()).item(), random.random(), np.random.random()]


def drawn(workers: int, epoch: int, ranks: int, start_step: int = 0) -> dict:
    """What is drawn for each sample of an epoch that starts at a step, over all ranks."""
    samples = {}
    for rank in range(ranks):
        sampler = TrainSampler(12, 4, rank, ranks, with_epoch=True)
        sampler.set_epoch(epoch, start_step)
        loader = torch.utils.data.DataLoader(
            SeededDataset(Drawn(), seed=3), batch_sampler=sampler, num_workers=workers, collate_fn=list
        )
        samples |= {index: values for batch in loader for index, *values in batch}
    return samples


@pytest.mark.process
def test_a_samples_augmentation_is_fixed_by_seed_epoch_and_index():
    first = drawn(workers=0, epoch=1, ranks=1)
    assert len({tuple(values) for values in first.values()}) == 12
    assert drawn(workers=2, epoch=1, ranks=2) == first
    rest = drawn(workers=1, epoch=1, ranks=1, start_step=2)
    assert len(rest) == 4 and rest.items() <= first.items()
    assert not drawn(workers=0, epoch=2, ranks=1).items() & first.items()


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def test_making_a_sample_leaves_the_generators_alone():
    seed_all(1)
    want = torch.rand(()).item(), random.random(), np.random.random()
    seed_all(1)
    SeededDataset(Drawn())[0, 5]
    assert (torch.rand(()).item(), random.random(), np.random.random()) == want
