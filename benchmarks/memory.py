"""Memory of 1, 2, 4 and 8 ranks: `fit` and the conventional loop.

python benchmarks/memory.py [--steps 12] [--data shapes]

Reads the proportional set size (a page that n processes share counts 1/n for each) in /proc every 0.2 s
while the ranks train. Reports the peak of the sum over the ranks, and how much of the peak is mapped
images. ddp-launch's ranks are forks of a process that has imported torch; this process counts too. Linux
only.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from report import save, table
from throughput import ENVIRONMENT, HERE

TIMEOUT_S = 900
RANKS = (1, 2, 4, 8)


def rank_processes(parent: int, name: str) -> list[int]:
    """The ids of the ranks among the descendants of `parent`: `name` is in their command lines."""
    pids = []
    for process in psutil.Process(parent).children(recursive=True):
        try:
            line = process.cmdline()
        except psutil.NoSuchProcess:
            continue
        if any(name in word for word in line) and "torch.distributed.run" not in line:
            pids.append(process.pid)
    return pids


def pss_mib(pid: int, mapped: str = "") -> float:
    """PSS of a process, or of its mappings of files below the folder `mapped`; 0 if it has ended."""
    try:
        if not mapped:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
            return sum(map(int, re.findall(r"^Pss:\s+(\d+) kB", text, re.M))) / 1024
        total, is_below = 0, False
        for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
            if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                is_below = mapped in line
            elif is_below and line.startswith("Pss:"):
                total += int(line.split()[1])
        return total / 1024
    except (FileNotFoundError, ProcessLookupError):
        return 0.0


def measure_peak(command: list[str], name: str, mapped: str) -> tuple[float, float]:
    """Runs `command`; returns the peak of its ranks' memory and the mapped images' part of it, in MiB."""
    peak = images = 0.0
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + TIMEOUT_S
    while process.poll() is None:
        if time.monotonic() > deadline:
            process.terminate()
            raise SystemExit(f"no end within {TIMEOUT_S} s: {' '.join(command)}")
        try:
            ranks = rank_processes(process.pid, name)
        except psutil.NoSuchProcess:
            break
        now = sum(map(pss_mib, ranks))
        if now > peak:
            peak, images = now, sum(pss_mib(pid, mapped) for pid in ranks)
        time.sleep(0.2)
    if process.wait():
        raise SystemExit(f"status {process.returncode}: {' '.join(command)}")
    return peak, images


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--data", default="shapes")
    options = parser.parse_args()
    if not os.path.exists("/proc/self/smaps_rollup"):
        raise SystemExit("memory: this needs Linux, because it reads /proc/<pid>/smaps_rollup")
    rows: list[dict[str, Any]] = []
    sums: dict[str, list[float]] = {"ddp-launch train": [], "conventional loop": []}
    mapped = []
    with tempfile.TemporaryDirectory() as folder:
        from ddp_lib.data.dataset import load_dataset

        data = load_dataset(options.data, folder, log=lambda line: None)
        size = sum(split.images.nbytes for split in (data.train, data.test)) / 2**20
        data_flags = ["--data", options.data, "--data-dir", folder]
        for ranks in RANKS:
            command = [
                sys.executable,
                "-m",
                "ddp_lib.launch",
                "train",
                *data_flags,
                "--epochs",
                "1",
            ]
            command += ["--nproc-per-node", str(ranks), "--run-dir", f"{folder}/run{ranks}"]
            peak, images = measure_peak(command, "multiprocessing.forkserver", folder)
            sums["ddp-launch train"].append(peak)
            mapped.append(images)
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += ["--nproc-per-node", str(ranks), str(HERE / "contenders/conventional.py")]
            peak, _ = measure_peak(
                [*command, *data_flags, "--steps", str(options.steps)], "conventional", folder
            )
            sums["conventional loop"].append(peak)
    for name, values in sums.items():
        for ranks, value in zip(RANKS, values, strict=True):
            label = f"{name}, {ranks} rank{'s' if ranks > 1 else ''}, all together"
            rows.append({"name": label, "unit": "MiB", "runs": [value]})
    growth = {n: (v[-1] - v[0]) / (RANKS[-1] - RANKS[0]) for n, v in sums.items()}
    each = [f"{value:.0f} MiB for each further rank of {name}" for name, value in growth.items()]
    findings = [", ".join(each) + "."]
    findings.append(
        f"The images take {size:.0f} MiB on disk; `ddp-launch train` maps "
        + ", ".join(f"{m:.0f} MiB with {r} rank(s)" for r, m in zip(RANKS, mapped, strict=True))
        + "."
    )
    what = "Peak proportional set size, summed over the ranks; one run each."
    result = save("memory", "Memory by number of ranks", what, rows, findings)
    print(table(result["rows"]))
    print(*findings, sep="\n")


if __name__ == "__main__":
    main()
