"""Shows in minutes, on a machine with one GPU or more, that what the other tests show on CPUs works there.

make gpu [PYTHON=/path/to/python] [PARTS=nccl,resume] [REPORT=file]      or: python benchmarks/on_gpu.py

Parts: environment tests shared nccl script resume check notebooks bench. The default leaves out the last
two, which take minutes; PARTS=all takes all. Each part is a process with a timeout. The report, one Markdown
file, is written after each part, so an interrupted run loses nothing. Installs nothing.

Exit status: 0 all parts work; 1 one does not; 3 there is no GPU. With --dry-run all runs on the CPU, with
gloo instead of NCCL: it shows that everything works but what only a GPU can show. It takes longer, and may.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from report import machine, versions

ROOT = Path(__file__).resolve().parent.parent
HERE = Path(__file__).resolve()
LAUNCH = [sys.executable, "-m", "ddp_lib.launch"]
NO_GPU = 3
# How many times longer a part may take on a CPU.
ON_CPU = 4


def call(*words: str, cwd: Path = ROOT) -> str:
    """Runs a command, and shows and returns what it prints. SystemExit if it fails."""
    process = subprocess.Popen(
        words, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=1
    )
    text = ""
    for line in process.stdout or ():
        print(line, end="", flush=True)  # at once: this part may be ended at its timeout
        text += line
    if process.wait():
        raise SystemExit(f"{' '.join(words)[:200]} ended with status {process.returncode}")
    return text


def gpus() -> int:
    import torch

    return torch.cuda.device_count()


def run_self(name: str, ranks: int, *flags: str) -> None:
    """Starts the function `name` of this file on so many ranks."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["run", f"--nproc-per-node={ranks}", "--log-dir", folder, *flags]
        call(*LAUNCH, *words, str(HERE), f"--rank={name}")


# The parts. Each prints what it saw, and raises if something is wrong.


def environment() -> None:
    """Versions, GPUs, and what is missing."""
    import torch

    nccl = torch.cuda.nccl.version() if torch.distributed.is_nccl_available() else "none"
    print(
        f"Python {sys.version.split()[0]}, torch {torch.__version__}, CUDA {torch.version.cuda}, NCCL {nccl}"
    )
    for number in range(gpus()):
        found = torch.cuda.get_device_properties(number)
        print(
            f"GPU {number}: {found.name}, {found.total_memory >> 20} MiB, compute {found.major}.{found.minor}"
        )
    driver = Path("/proc/driver/nvidia/version")
    print(driver.read_text().splitlines()[0] if driver.exists() else "no NVIDIA driver is loaded")
    if Path("/dev/shm").exists():
        print(f"/dev/shm: {shutil.disk_usage('/dev/shm').free >> 20} MiB free")
    needed = "cloudpickle filelock lazy_loader matplotlib numpy pandas PIL psutil torchvision tqdm tyro"
    missing = [name for name in [*needed.split(), "pytest", "nbval"] if find_spec(name) is None]
    print("missing:", ", ".join(missing) or "nothing")


def tests() -> None:
    """The tests marked gpu."""
    call(sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests")


def shared() -> None:
    """Two ranks on one GPU, by gloo with tensors on the GPU."""
    run_self("average", 2, "--no-check")


def nccl() -> None:
    """A group of one rank under NCCL; of all GPUs, if there are two or more."""
    for ranks in {1, max(1, gpus())}:
        run_self("reduce", ranks)


def script() -> None:
    """examples/own_script with half precision and a loss scaler."""
    from tests.lab.images import write_images

    with tempfile.TemporaryDirectory() as folder:
        data, examples = str(write_images(Path(folder) / "data", 630, 131)), ROOT / "examples" / "own_script"
        launch = ["run", f"--nproc-per-node={min(2, gpus() or 2)}", "--log-dir", f"{folder}/logs"]
        flags = ["--data", data, "--epochs", "2", "--batch-size", "48"]
        for name, out in (("ddp.py", "--out"), ("ddp_with_pieces.py", "--run-dir")):
            call(*LAUNCH, *launch, str(examples / name), *flags, out, f"{folder}/{name}.out")


def resume() -> None:
    """A run that is killed and started again ends with the bits of an uninterrupted one."""
    import psutil

    with tempfile.TemporaryDirectory() as folder:

        def train(name: str) -> list[str]:
            flags = ["--data", "shapes", "--data-dir", folder, "--run-dir", str(Path(folder) / name)]
            epochs = "8" if gpus() else "3"  # a GPU is fast: time to be killed
            return [*LAUNCH, "train", *flags, "--epochs", epochs, "--checkpoint-every-s", "0.2"]

        def digests(name: str) -> object:
            return json.loads((Path(folder) / name / "summary.json").read_text())["weights_sha256"]

        call(*train("whole"))
        log = Path(folder) / "killed" / "rank0.jsonl"
        process = psutil.Popen(train("killed"), cwd=ROOT)
        while not (log.exists() and log.read_text().count('"epoch": 1,') > 5):
            if process.poll() is not None:
                raise SystemExit("the run ended before it could be killed")
            time.sleep(0.02)
        for started in [process, *process.children(recursive=True)]:
            started.kill()
        process.wait()
        again = call(*train("killed"))
        assert "resuming" in again, again
        assert digests("killed") == digests("whole"), "the bits differ after the resume"
        print("the bits are equal to those of the uninterrupted run")


def check() -> None:
    """ddp-launch check --gpus on this machine."""
    call(*LAUNCH, "check", "--gpus", "--timeout-s", "60")


def notebooks() -> None:
    """All notebooks, unchanged, against their outputs."""
    several = ["-n", "auto", "--dist", "loadscope"] if find_spec("xdist") else []
    nbval = "--nbval --nbval-current-env --nbval-cell-timeout 180".split()
    words = ["notebooks", *nbval, "--nbval-sanitize-with", "notebooks/nbval_sanitize.cfg"]
    call(sys.executable, "-m", "pytest", "-q", *several, *words)


def bench() -> None:
    """The gpu benchmark, five short rounds on the built-in images."""
    flags = ["--data", "shapes", "--no-compile"]
    flags += ["--epochs=8", "--rounds=5"] if gpus() else ["--epochs=2", "--rounds=1", "--cpu"]
    call(sys.executable, "benchmarks/gpu.py", *flags)


PARTS: dict[str, tuple[Callable[[], None], int]] = {  # with the timeout, seconds
    "environment": (environment, 60),
    "tests": (tests, 60),
    "shared": (shared, 60),
    "nccl": (nccl, 60),
    "script": (script, 90),
    "resume": (resume, 90),
    "check": (check, 60),
    "notebooks": (notebooks, 300),
    "bench": (bench, 180),
}
LONG = ("notebooks", "bench")


# What ranks run, by --rank=NAME.


def average() -> None:
    """DDP on both ranks of one device averages gradients as one process does with the whole batch."""
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    device = torch.device("cuda", 0) if gpus() else torch.device("cpu")
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model, x = torch.nn.Linear(16, 4).to(device), torch.randn(8 * size, 16).to(device)
    model(x).square().mean().backward()
    whole = model.weight.grad.clone()
    model.zero_grad()
    net = DistributedDataParallel(model)
    net(x[8 * rank : 8 * rank + 8]).square().mean().backward()
    torch.testing.assert_close(model.weight.grad, whole)
    print(f"rank {rank} of {size} on {device}: gloo averages the gradients")
    del net
    dist.destroy_process_group()


def reduce() -> None:
    """The group has NCCL for tensors on GPUs and gloo for others; collectives and DDP work in it."""
    import torch
    import torch.distributed as dist

    from ddp_lib import World, warm_up, wrap

    with World.join() as world:
        size = world.world_size
        for where in {world.device, torch.device("cpu")}:
            values = torch.ones(3, device=where)
            dist.all_reduce(values)
            assert values.tolist() == [size] * 3, where
            assert world.sum(torch.ones(3, device=where)).tolist() == [size] * 3, where
        kind = dist.get_backend_config()
        assert not gpus() or "nccl" in kind, kind
        net = wrap(torch.nn.Linear(8, 8).to(world.device), world)
        warm_up(net, torch.ones(4, 8, device=world.device))
        print(f"rank {world.rank} of {size} on {world.device}: the group is {kind}")
        del net


RANKS = {"average": average, "reduce": reduce}


def run_part(name: str, report: Path, slower: int) -> bool:
    """Runs a part as a process and appends to the report; whether it works within `slower` times its
    timeout."""
    began, timeout_s = time.monotonic(), slower * PARTS[name][1]
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(
            [sys.executable, str(HERE), f"--part={name}"], stdout=out, stderr=out, start_new_session=True
        )
        try:
            status = process.wait(timeout_s)
            ended = f"FAILS, status {status}" if status else "works"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            ended = f"FAILS, not done within {timeout_s} s"
        out.seek(0)
        text = out.read()
    line = f"{name}: {ended} ({time.monotonic() - began:.0f} s)"
    print(line, flush=True)
    with open(report, "a") as file:
        file.write(f"\n## {line}\n\n{PARTS[name][0].__doc__}\n\n```\n{text.strip()[-6000:]}\n```\n")
    return ended == "works"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--parts", default="", help=f"of {', '.join(PARTS)}, with commas; or all")
    parser.add_argument("--report", type=Path, default=ROOT / "runs" / "gpu.md")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    sys.path.insert(0, str(ROOT))
    if options.rank or options.part:
        RANKS[options.rank]() if options.rank else PARTS[options.part][0]()
        return 0
    if options.dry_run:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    asked = (
        options.parts.replace(" ", "").split(",") if options.parts else [p for p in PARTS if p not in LONG]
    )
    parts = [*PARTS] if asked == ["all"] else asked
    if unknown := [name for name in parts if name not in PARTS]:
        parser.error(f"--parts {unknown[0]!r} is unknown: use {', '.join(PARTS)}, or all")
    if not (options.dry_run or gpus()):
        print("make gpu: this machine has no GPU that torch can use; --dry-run shows the rest on the CPU")
        return NO_GPU
    options.report.parent.mkdir(parents=True, exist_ok=True)
    where = "CPU, dry run" if options.dry_run else "GPU"
    made_by = ", ".join(f"{name} {value}" for name, value in (machine() | versions()).items())
    title = f"# What works on {socket.gethostname()}, {where}, {time.strftime('%F %H:%M')}"
    options.report.write_text(f"{title}\n\n{made_by}\n")
    parts = ["environment", *(name for name in parts if name != "environment")]
    works = [run_part(name, options.report, ON_CPU if options.dry_run else 1) for name in parts]
    print(f"report: {options.report}")
    return 0 if all(works) else 1


if __name__ == "__main__":
    sys.exit(main())
