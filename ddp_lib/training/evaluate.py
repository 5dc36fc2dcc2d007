"""Exact evaluation: every image counted once, on any number of ranks."""

from dataclasses import dataclass
from itertools import chain

import torch
import torch.nn.functional as F
from torch import nn

from ddp_lib.data.batch import make_batch
from ddp_lib.data.dataset import Dataset
from ddp_lib.data.sampler import eval_batches
from ddp_lib.distributed.placement import require_device
from ddp_lib.distributed.world import World
from ddp_lib.training.ddp import share_buffers

EVAL_BATCH_SIZE = 250


@dataclass(frozen=True)
class Evaluation:
    """Numbers of right answers and images, exact over all ranks; `loss` is the mean over the images."""

    correct: int
    images: int
    loss: float

    @property
    def accuracy(self) -> float:
        return self.correct / self.images

    def __str__(self) -> str:
        return f"test accuracy {self.accuracy:.2%} ({self.correct} of {self.images})"


@torch.no_grad()
def evaluate(model: nn.Module, data: Dataset, world: World, split: str = "test") -> Evaluation:
    """Evaluates `model` (bare, not wrapped in DDP) on all images of `split`: "test" or "train".

    Each rank takes whole batches of a fixed size, so each batch and all bits of its logits are the same on
    any number of ranks. Sums and counts are added up, never means. Rank 0's BatchNorm buffers go to all ranks
    first, since they differ. Leaves the model in eval mode. Computes in the precision of the parameters, as a
    plain process that loads the weights would. UserError if the model is not on the rank's device.
    """
    require_device("the model", chain(model.parameters(), model.buffers()), world.device)
    share_buffers(model, world)
    model.eval()
    part = {"test": data.test, "train": data.train}[split]
    dtype = next(model.parameters()).dtype
    totals = torch.zeros(3, dtype=torch.float64, device=world.device)  # right, images, loss
    for indices in eval_batches(len(part), EVAL_BATCH_SIZE, world.rank, world.world_size):
        x, y = make_batch(part, indices, data, world.device, dtype)
        logits = model(x)
        totals[0] += (logits.argmax(dim=1) == y).sum()
        totals[1] += len(indices)
        totals[2] += F.cross_entropy(logits, y, reduction="sum")
    correct, images, loss = world.sum(totals).tolist()
    return Evaluation(int(correct), int(images), loss / images)
