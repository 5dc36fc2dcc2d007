"""Hugging Face accelerate, used as in its quick tour: prepare, backward, step."""

import torch.nn.functional as F
from accelerate import Accelerator
from common import Job


def main() -> None:
    job = Job()
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if job.options.fast else "no")
    model = job.model()
    model, optimizer, loader = accelerator.prepare(model, job.optimizer(model), job.loader(shuffle=True))
    for images, labels in loader:
        optimizer.zero_grad()
        with accelerator.autocast():
            loss = F.cross_entropy(model(images), labels)
        accelerator.backward(loss)
        optimizer.step()
        if job.step_ended():
            break
    job.report()
    del model, optimizer, loader
    accelerator.end_training()


if __name__ == "__main__":
    main()
