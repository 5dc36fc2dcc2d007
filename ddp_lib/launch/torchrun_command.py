"""ddp-launch run or train --dry-run: the torchrun command that does the same on this machine."""

import os
import shlex

from ddp_lib.config import TrainConfig
from ddp_lib.distributed.addresses import (
    CHOSE_NCCL,
    is_here,
    join_host,
    name_interface,
    own_address,
    require_interfaces,
)
from ddp_lib.distributed.device import thread_budget
from ddp_lib.errors import TransientError
from ddp_lib.launch.options import Launch, count_ranks


def plain_command(launch: Launch, target: list[str], join_timeout_s: float) -> str:
    """A shell command in one line: environment, torchrun, its flags, and `target`, the program's words.

    It differs in two things: torchrun opens its store on all addresses and, unless --node-rank is given, may
    put rank 0 on another machine.
    """
    nproc = count_ranks(launch.nproc)
    threads = str(thread_budget(launch.local[1] if launch.local else nproc))
    environment = {"OMP_NUM_THREADS": threads, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    names = (*environment, "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    environment |= {name: os.environ[name] for name in names if name in os.environ}
    words = f"torchrun --nnodes {launch.nodes_text} --nproc-per-node {nproc}".split()
    words += ["--max-restarts", str(launch.max_restarts)]
    endpoint = launch.endpoint
    if endpoint is None:
        words += ["--standalone"]
    else:
        require_interfaces()
        address = own_address(endpoint, False)
        if not address:
            raise TransientError(
                f"{endpoint.host_name} does not resolve here, or there is no route to it: check the name, or "
                "give an address"
            )
        name_interface(endpoint, False, environment)
        environment.pop(CHOSE_NCCL, None)
        if launch.node_rank is not None:
            words += f"--node-rank {launch.node_rank} --master-addr {endpoint.host}".split()
            words += ["--master-port", str(endpoint.port)]
        else:
            seconds = max(1, round(join_timeout_s))
            conf = f"is_host={int(is_here(endpoint))},join_timeout={seconds},read_timeout={seconds}"
            where = join_host(endpoint.host, endpoint.port)
            words += f"--rdzv-backend c10d --rdzv-endpoint {where} --rdzv-id {launch.job}".split()
            words += ["--rdzv-conf", conf, "--local-addr", address]
    settings = [f"{name}={shlex.quote(value)}" for name, value in sorted(environment.items())]
    return " ".join([*settings, shlex.join(words + target)])


def training_flags(training: TrainConfig) -> list[str]:
    """The flags that give this configuration; defaults are left out."""
    words = []
    for name, value in vars(training).items():
        if value != getattr(TrainConfig, name):
            words += ["--" + name.replace("_", "-"), str(value)]
    return words
