"""DDP as introductions show it: DataLoader, DistributedSampler, a plain loop; in fp32 without --fast."""

import time

import torch
import torch.distributed as dist
from common import GLOBAL_BATCH, Job
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torchvision import transforms


def main() -> None:
    dist.init_process_group("gloo")
    job = Job()
    model = DistributedDataParallel(job.model())
    optimizer = job.optimizer(model)
    loader, sampler = job.distributed_loader()
    if job.options.epochs:
        train_epochs(job, model, optimizer, loader, sampler)
    else:
        for images, labels in loader:
            optimizer.zero_grad()
            with job.autocast():
                loss = job.loss(model(images), labels)
            loss.backward()
            optimizer.step()
            if job.step_ended():
                break
        job.report()
    del model, optimizer
    dist.destroy_process_group()


def train_epochs(job, model, optimizer, loader, sampler) -> None:
    """Whole epochs with the one-cycle schedule; after each, rank 0 evaluates on all test images."""
    config = job.config
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=config.lr,
        epochs=job.options.epochs,
        steps_per_epoch=len(loader),
        pct_start=config.warmup,
        cycle_momentum=False,
    )
    seconds, epochs = 0.0, []
    for epoch in range(job.options.epochs):
        sampler.set_epoch(epoch)
        model.train()
        start = time.perf_counter()
        for images, labels in loader:
            optimizer.zero_grad()
            with job.autocast():
                loss = job.loss(model(images), labels)
            loss.backward()
            optimizer.step()
            schedule.step()
        seconds += time.perf_counter() - start
        if dist.get_rank() == 0:
            epochs.append({"seconds": seconds, "accuracy": accuracy(job, model.module)})
        dist.barrier()
    job.report(epochs=epochs)


@torch.no_grad()
def accuracy(job, model) -> float:
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(job.data.mean, job.data.std)])
    from common import PictureDataset

    model.eval()
    correct = 0
    test_set = PictureDataset(job.data.test, transform)
    for images, labels in DataLoader(test_set, batch_size=2 * GLOBAL_BATCH):
        correct += int((model(images).argmax(dim=1) == labels).sum())
    return correct / len(test_set)


if __name__ == "__main__":
    main()
