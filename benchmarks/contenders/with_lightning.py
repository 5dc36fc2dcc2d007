"""Lightning, used as in its introduction: a LightningModule and a Trainer with strategy "ddp"."""

import logging
import warnings

import lightning
import torch.nn.functional as F
from common import WORLD_SIZE, Job


class Module(lightning.LightningModule):
    def __init__(self, job: Job) -> None:
        super().__init__()
        self.job, self.net = job, job.model()

    def training_step(self, batch, batch_index):
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def configure_optimizers(self):
        return self.job.optimizer(self.net)

    def on_train_batch_end(self, outputs, batch, batch_index) -> None:
        self.job.step_ended()


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    job = Job()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=WORLD_SIZE,
        strategy="ddp",
        precision="bf16-mixed" if job.options.fast else "32-true",
        max_steps=job.options.steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(job), job.loader(shuffle=True))
    job.report()


if __name__ == "__main__":
    main()
