"""Command lines and environments."""

import os
import socket
import sys
from contextlib import chdir
from dataclasses import fields
from pathlib import Path
from random import Random
from unittest.mock import patch

import ddp_lib.launch.check
import ddp_lib.launch.main
import ddp_lib.train
from ddp_lib import TrainConfig, World
from ddp_lib.distributed import addresses
from ddp_lib.distributed.environment import _OTHERS, read_rank_env
from ddp_lib.errors import TransientError
from ddp_lib.launch.options import CheckOptions, Launch, LaunchOptions, ScriptOptions, count_ranks
from tests.lab.fuzz.judge import answered, captured, judge

NUMBERS = """0 1 2 3 4 8 16 -1 0.5 1e3 1e999 nan inf -inf 29500 65535 65536 99999999999 1_000 0x10 +2 \u0663
    \uff11 \xb2 1:2 2:1 : 1: auto gpu cpu True 0,1 all""".split()
NUMBERS += ["", " ", " 2 ", "2\n", "9" * 5000]
HOSTS = """localhost 127.0.0.1 127.0.1.1 0.0.0.0 10.0.0.1 ::1 [::1] :: fd77::10 fe80::1 fe80::1%eth0 [fe80::1]
    m m:29500 10.0.0.1:29500 [fd77::10]:29500 tcp://m tcp://m:1 root@m m,n m/24 m: : :1 [ ] [] 1 256.1.1.1
    .. m..n - --""".split()
HOSTS += ["", " ", "m n", "m\n", "\xe9.example", "\udcff", "x" * 70, "x." * 200, "\U0001f431"]
TEXTS = """a a.b a:b ddp_lib.model:SimpleModel ~ ~/x ~nobody:x / . .. /dev/null /proc /no/such - -- -h --help
    = a=b shapes cifar10 fp32 fp64 int4 gloo nccl never must SIGTERM 1 0 ' " * {} $(a)""".split()
TEXTS += ["", " ", "a b", "a\nb", "\xe9", "\udcff", "\U0001f431", "\x1b[31m", "x" * 300, "x/" * 3000]
TASKS = "1 2(x3),1 2(x0) 1(x99999999999) 1,,2 (x2) 4(x2 99999999999999".split()
NODES = "n[1-2] n1 n[ n] [1-2] n[01-02,04],m , n[-] gpu-[1-2]-[3-4]".split()
INTERFACES = [*"lo eth9 ^lo =lo lo,eth9 ,".split(), *TEXTS]
# Names of variables, and what each of them may be.
_VARIABLES = {
    """RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK MASTER_PORT SLURM_PROCID SLURM_LOCALID
    SLURM_STEP_ID SLURM_NTASKS SLURM_STEP_NUM_TASKS SLURM_NODEID SLURM_JOB_ID PET_NNODES PET_NPROC_PER_NODE
    PET_NODE_RANK PET_MAX_RESTARTS PET_MASTER_PORT PET_GRACE_S PET_NO_CHECK PET_DRY_RUN DDP_LIB_TIMEOUT_S
    OMP_NUM_THREADS COLUMNS""": NUMBERS,
    " ".join([*_OTHERS, *_OTHERS.values()]): NUMBERS,
    "SLURM_TASKS_PER_NODE SLURM_STEP_TASKS_PER_NODE": TASKS,
    "SLURM_NODELIST SLURM_JOB_NODELIST SLURM_STEP_NODELIST": NODES,
    "MASTER_ADDR PET_MASTER_ADDR PET_RDZV_ENDPOINT": HOSTS,
    "GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME": INTERFACES,
    "PET_RDZV_ID TORCHELASTIC_RUN_ID PWD HOME LANG": TEXTS,
}
VARIABLES = {name: values for names, values in _VARIABLES.items() for name in names.split()}
USUAL = {
    "RANK": "01",
    "WORLD_SIZE": "12",
    "MASTER_PORT": ["29500"],
    "MASTER_ADDR": ["m"],
    "SLURM_PROCID": "01",
}
USUAL |= {"SLURM_LOCALID": "0", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "12", "SLURM_STEP_NUM_TASKS": "2"}
TOGETHER = [("RANK", "WORLD_SIZE", "MASTER_"), ("RANK", "WORLD_SIZE", "LOCAL_"), ("SLURM_",), ("PET_",)]


def draw_environment(rng: Random) -> dict[str, str]:
    """Some variables that a launcher or a person may set, among them often such as belong together."""
    names = rng.sample(list(VARIABLES), rng.choice([0, 1, 2, 3, 5, 8]))
    if rng.random() < 0.5:
        starts = rng.choice(TOGETHER)
        names += [name for name in VARIABLES if name.startswith(starts) and rng.random() < 0.9]
    usual = rng.random()
    return {n: rng.choice(USUAL[n] if n in USUAL and rng.random() < usual else VARIABLES[n]) for n in names}


def draw_flags(rng: Random, *options: type) -> list[str]:
    words = []
    for options_of in options:
        every = [field.name for field in fields(options_of)]
        for name in rng.sample(every, min(len(every), rng.choice([0, 0, 1, 1, 2, 4]))):
            flag = "--" + (name if rng.random() < 0.2 else name.replace("_", "-"))
            values = HOSTS if "endpoint" in name else NUMBERS if rng.random() < 0.7 else TEXTS
            if "endpoint" in name and rng.random() < 0.7:
                value = f"{rng.choice(HOSTS)}:{rng.choice(['29500', *NUMBERS])}"
            else:
                value = rng.choice(values)
            if name in ("no_check", "dry_run") and rng.random() < 0.8:
                words.append(flag)
            else:
                words += [f"{flag}={value}"] if rng.random() < 0.7 else [flag, value]
    if rng.random() < 0.1:
        words.insert(rng.randint(0, len(words)), rng.choice(TEXTS))
    return words


def numeric(host: str, port: int) -> list[str]:
    """As `resolve`, but asks no name server."""
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except (socket.gaierror, UnicodeError):
        return ["127.0.0.1"] if host == "localhost" else []
    return list(dict.fromkeys(str(info[4][0]) for info in infos))


def try_command(rng: Random, folder: Path) -> None:
    """A command line under some variables, up to the start of the ranks."""
    command = rng.choice(["train", "train", "run", "check", "plot", "stacks", "dry"])
    kinds = {"train": [TrainConfig, LaunchOptions], "run": [LaunchOptions, ScriptOptions], "stacks": []}
    kinds |= {"check": [LaunchOptions, CheckOptions], "plot": [], "dry": [LaunchOptions, TrainConfig]}
    words = draw_flags(rng, *kinds[command])
    if command == "run":
        words += rng.choice([[__file__], ["-m", "json.tool"], ["-m"], [rng.choice(TEXTS)], []])
    if command in ("plot", "stacks"):
        words += rng.sample(TEXTS, rng.choice([0, 1, 2]))
        words = [w for w in words if command != "stacks" or "-h" in w] or ["--timeout-s=x"]
    words = ["train", "--dry-run", *words] if command == "dry" else [command, *words]
    environment = draw_environment(rng)

    def start(launch: Launch, join_timeout_s: float, ranks: object) -> int:
        assert launch.nodes[0] >= 1 and launch.grace_s > 0 and join_timeout_s > 0 and launch.job
        assert launch.nodes[1] == 1 or launch.endpoint is not None
        return 0 * count_ranks(launch.nproc)

    met = TransientError("would wait for the master")
    clean = {
        k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "PET_")) and k not in VARIABLES
    }
    with (
        patch.dict(os.environ, clean | environment, clear=True),
        patch.object(ddp_lib.launch.main, "start_agent", start),
        patch.object(ddp_lib.train, "run", lambda training: 0),
        patch.object(ddp_lib.launch.check, "_exit_after", lambda timeout_s: None),
        patch.object(ddp_lib.launch.check, "wait_for_name", side_effect=met),
        patch.object(addresses, "resolve", numeric),
        patch.object(sys, "warnoptions", []),
        chdir(folder),
    ):
        with captured() as read:
            status = ddp_lib.launch.main.main(words)
        out, error = read()
    what = (words, environment)
    judge(status, error, what)
    assert status == 0 or out == "", what
    assert not any(folder.iterdir()), (what, [*folder.iterdir()])


def try_rank(rng: Random, folder: Path) -> None:
    """A rank that something else has started: its variables."""
    environment = draw_environment(rng)
    with answered(environment), patch.object(addresses, "resolve", numeric):
        env = read_rank_env(environment)
        assert 0 <= env.rank < env.world_size and 0 <= env.local_rank < env.local_world_size <= env.world_size
        if env.world_size == 1 and rng.random() < 0.05:
            with World.join(environ=environment, log=lambda text: None):
                pass
