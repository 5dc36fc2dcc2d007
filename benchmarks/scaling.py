"""Step time on more ranks, on this machine and over slow links, measured and predicted.

python benchmarks/scaling.py [--full] [--steps 8]

64 images per rank, one thread per rank, fp32. First, 1, 2 and 4 ranks (with --full also 8) run on this
machine's cores. Then 2 machines (with --full also 4), made of network namespaces whose links are limited
to a rate, run without a hook and with DDP's fp16 and PowerSGD hooks. These need root; if they cannot be
made, they are left out, and the report says so. The prediction is that of ddp_lib.report.scaling. Its link
is fitted to plain all-reduces of the same ranks, and its step to steps without DDP, which send nothing.
It never sees a DDP step.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from report import save, table

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
TIMEOUT_S = 600
RATES = {"1gbit": "1 Gbit/s", "100mbit": "100 Mbit/s", "20mbit": "20 Mbit/s"}


def local(ranks: int, steps: int) -> dict[str, Any]:
    from scaling_rank import LOCAL_REPEATS, LOCAL_SIZES, measure

    from ddp_lib import run_ranks

    arguments = ("none", steps, LOCAL_SIZES, LOCAL_REPEATS)
    return run_ranks(measure, ranks, *arguments, timeout_s=TIMEOUT_S)[0]


def on_machines(count: int, rate: str, hook: str, steps: int) -> dict[str, Any]:
    from tests.lab.machines import Lab

    with tempfile.TemporaryDirectory() as folder, Lab(count, Path(folder)) as lab:
        for machine in lab.machines:
            machine.limit_rate(rate)
        command = ["python", str(HERE / "scaling_rank.py"), "--hook", hook, "--steps", str(steps)]
        programs = [
            machine.start(
                command,
                MASTER_ADDR=lab.machines[0].address,
                MASTER_PORT="29500",
                WORLD_SIZE=str(count),
                RANK=str(rank),
                OMP_NUM_THREADS="1",
            )
            for rank, machine in enumerate(lab.machines)
        ]
        for program in programs:
            if program.wait(TIMEOUT_S):
                raise SystemExit(f"a machine's program failed:\n{program.output}")
        line = next(line for line in programs[0].output.splitlines() if line.startswith("{"))
        return json.loads(line)


def predicted_s(measured: dict[str, Any], ranks: int, hook: str) -> float | None:
    """Seconds per step by the cost model; None for PowerSGD, whose arithmetic the model leaves out."""
    from ddp_lib.report.scaling import Step, fit_link, predict_step_s

    if ranks == 1 or hook == "PowerSGD":
        return None
    link = fit_link({int(k): v for k, v in measured["all_reduce_s"].items()}, ranks)
    sent = measured["gradient_bytes"] // (2 if hook == "fp16" else 1)
    return predict_step_s(Step(measured["compute_s"], measured["backward_s"], sent), link, ranks)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--full", action="store_true", help="8 ranks, 4 machines, 1 Gbit/s too")
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    from tests.lab.namespaces import missing

    cells: list[tuple[str, int, str, dict[str, Any]]] = []
    for ranks in (1, 2, 4, 8) if options.full else (1, 2, 4):
        name = f"this machine, {ranks} rank{'s' if ranks > 1 else ''}"
        cells.append((name, ranks, "none", local(ranks, options.steps)))
    lacks = missing()
    rates = tuple(RATES) if options.full else ("100mbit", "20mbit")
    for count in () if lacks else (2, 4) if options.full else (2,):
        for rate in rates:
            for hook in ("none", "fp16", "PowerSGD"):
                name = f"{count} machines, {RATES[rate]}" + ("" if hook == "none" else f", {hook}")
                cells.append((name, count, hook, on_machines(count, rate, hook, options.steps)))
    rows, findings, errors = [], [], []
    for name, ranks, hook, measured in cells:
        rows.append({"name": name, "unit": "ms", "runs": [1000 * s for s in measured["step_s"]]})
        step_s = statistics.median(measured["step_s"])
        expected = predicted_s(measured, ranks, hook)
        speed = f"{measured['compute_s'] / step_s:.0%} of the speed without communication"
        if expected is None:
            findings.append(f"{name}: {1000 * step_s:.0f} ms, {speed}.")
            continue
        errors.append(100 * (expected / step_s - 1))
        findings.append(
            f"{name}: {1000 * step_s:.0f} ms, {speed}; predicted {1000 * expected:.0f} ms, "
            f"error {errors[-1]:+.0f} %."
        )
    sizes = [abs(error) for error in errors]
    main_finding = (
        f"the prediction is off by {statistics.median(sizes):.0f} % in the median and by "
        f"{max(sizes):.0f} % in the worst of {len(sizes)} cases."
    )
    by_name = {name: statistics.median(measured["step_s"]) for name, _, _, measured in cells}
    for name in [name for name in by_name if name.endswith("20 Mbit/s")]:
        ratios = [by_name[name] / by_name[f"{name}, {hook}"] for hook in ("fp16", "PowerSGD")]
        main_finding += (
            f" {name}: a step is {ratios[0]:.2f} times as fast with fp16, {ratios[1]:.1f} times with "
            "PowerSGD."
        )
    findings.insert(0, main_finding)
    if lacks:
        findings.append(f"Not measured on several machines: {lacks}.")
    sent = cells[0][3]["gradient_bytes"]
    what = f"Milliseconds per step, 64 images per rank; the gradients are {sent / 1e6:.1f} MB."
    result = save("scaling", "Step time on more ranks", what, rows, findings)
    print(table(result["rows"]))
    print(*findings, sep="\n")


if __name__ == "__main__":
    main()
