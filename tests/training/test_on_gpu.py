"""What a rank computes with a GPU of its own, without one.

torch's fake tensors have a device and a shape, but no data, and no operation mixes their devices. They know
no backward on a GPU, and DDP does not take them: `make gpu` shows these.
"""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from ddp_lib import World, evaluate
from ddp_lib.data import batch
from ddp_lib.data.dataset import Dataset, Split
from ddp_lib.training.metrics import Metrics

pytestmark = pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="torch is built for CPUs alone")

GPU = torch.device("cuda", 0)
RANK_0_OF_2 = World(world_size=2, device=GPU, backend="nccl")


class Numbers:
    """What all ranks together have counted."""

    def tolist(self) -> list[float]:
        return [60.0, 80.0, 40.0]


@pytest.fixture(autouse=True)
def fake() -> Iterator[None]:
    batch._scale_and_shift.cache_clear()
    with FakeTensorMode():
        yield
    batch._scale_and_shift.cache_clear()


@pytest.fixture
def pinned(monkeypatch) -> list[tuple[int, ...]]:
    """Shapes of the tensors that were put into pinned memory."""
    shapes: list[tuple[int, ...]] = []

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    return shapes


def images(where: torch.device | str) -> Dataset:
    pixels = torch.zeros(50, 32, 32, 3, dtype=torch.uint8, device=where)
    split = Split(pixels, torch.zeros(50, dtype=torch.int64, device=where))
    return Dataset("fake", ("a", "b"), split, split, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "")


@pytest.mark.parametrize("where", ["cpu", GPU])
def test_a_batch_is_made_on_the_gpu_or_goes_there_from_pinned_memory(pinned, where):
    data = images(where)
    x, y = batch.make_batch(data.train, torch.arange(7), data, GPU, augment=(0, 1))
    assert (x.device, x.shape, y.device) == (GPU, (7, 3, 32, 32), GPU)
    assert pinned == ([(7, 32, 32, 3), (7,)] if where == "cpu" else [])


@pytest.mark.parametrize(("free", "where"), [(2**20, "cpu"), (2**30, "cuda")])
def test_images_stay_in_the_machines_memory_if_the_gpu_has_no_room(monkeypatch, free, where):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2**34))
    assert images("cpu").to_device(GPU).train.images.device.type == where


@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_a_tensor_is_reduced_where_the_others_are(monkeypatch, where):
    reduced = []
    monkeypatch.setattr(dist, "all_reduce", lambda values, op: reduced.append(values.device))
    assert RANK_0_OF_2.sum(torch.zeros(2, device=where)).device.type == where
    assert reduced == [GPU]


def test_evaluation_and_metrics_stay_on_the_gpu(monkeypatch, pinned):
    devices = []
    monkeypatch.setattr(dist, "broadcast", lambda buffer, source: devices.append(buffer.device))

    def sum_up(world: World, totals: torch.Tensor) -> Numbers:
        devices.append(totals.device)
        return Numbers()

    monkeypatch.setattr(World, "sum", sum_up)
    monkeypatch.setattr("ddp_lib.training.evaluate.eval_batches", lambda *_: [torch.arange(7)])
    with GPU:
        model = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Flatten(), torch.nn.Linear(3072, 2))
    assert evaluate(model, images("cpu"), RANK_0_OF_2).accuracy == 0.75
    metrics = Metrics(RANK_0_OF_2, "loss")
    metrics.add("loss", torch.zeros((), device=GPU), 7)
    assert {*devices} == {GPU} and metrics._sums.device == GPU
