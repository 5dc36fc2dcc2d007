"""Training as a whole: the same code alone, under torchrun, SLURM, in a container or a notebook.

python -m ddp_lib.train --data shapes                          one process
torchrun --nproc-per-node 2 -m ddp_lib.train --data shapes     two, by torch's launcher
ddp-launch train --nproc-per-node 2 --data shapes              two, by this package's
"""

import sys
from typing import Any

from ddp_lib.cli import parse
from ddp_lib.config import TrainConfig
from ddp_lib.data.dataset import load_dataset
from ddp_lib.data.sampler import TrainSampler
from ddp_lib.distributed.device import keep_freed_memory
from ddp_lib.distributed.world import World
from ddp_lib.processes.exit_status import as_exit_status
from ddp_lib.processes.signals import StopSignal
from ddp_lib.processes.worker import prepare
from ddp_lib.run_dir.resume import open_run, warn_of_loss
from ddp_lib.training.optim import pick_precision
from ddp_lib.training.trainer import Trainer


def fit(config: TrainConfig, world: World, stop: StopSignal | None = None) -> dict[str, Any]:
    """Trains as `config` says, resuming where its run folder allows; returns summary.json's content.

    On the CPU it sets this process's allocator, for good (see `keep_freed_memory`).
    Raises UserError for a configuration that cannot run, and where a loss is not finite;
    SystemExit(128 + signal number), after a checkpoint, when `stop` has seen a signal on any rank.
    """
    config.share(world.world_size)
    if world.device.type == "cpu":
        keep_freed_memory()
    warn_of_loss(config, world)
    # auto may mean bf16 on one machine and fp32 on another.
    precision = f"--precision {config.precision}, which here"
    equal = {**config.shared(), precision: pick_precision(config.precision, world.device)[0]}
    world.compare("flags", equal, "give every machine the same", config.join_timeout_s)
    data = load_dataset(
        config.data,
        config.data_dir,
        config.data_timeout_s,
        log=lambda text: world.say(text, every_node=True),
    )
    images = {
        "the number of training images": len(data.train),
        "the digest of the data": data.digest[:16],
    }
    cure = "copy the same data to every machine"
    world.compare("data", images, cure, config.data_timeout_s)
    sampler = TrainSampler(
        len(data.train), config.global_batch_size, world.rank, world.world_size, config.seed
    )
    with open_run(config, world, config.epochs * len(sampler)) as run:
        if run.finished is not None:
            world.say(f"{run.folder} is finished; more --epochs would go on from there")
            return run.finished
        trainer = Trainer(config, world, data, sampler, run, stop or StopSignal())
        trainer.restore(run.resumed)
        with trainer.stop.deferred():
            return trainer.run()


def main(argv: list[str] | None = None) -> int:
    """One rank as a process: its command line in, its exit status out.

    0: done; 2: refused, with one line; 128 + n: stopped by signal n, after a checkpoint.
    """
    with as_exit_status() as outcome, StopSignal() as stop:
        config = parse(TrainConfig, argv, "ddp_lib.train")
        with World.join(
            backend=config.backend,
            join_timeout_s=config.join_timeout_s,
            timeout_s=config.timeout_s,
        ) as world:
            fit(config, world, stop)
    return outcome.status


def as_rank(*flags: str) -> None:
    """A rank that ddp-launch has forked: the training with these flags; SystemExit with its status."""
    prepare()
    sys.exit(main(list(flags)))


if __name__ == "__main__":
    sys.exit(main())
