"""Step time on more ranks, on this machine and over slower and slower links, beside the cost model.

python benchmarks/scaling.py [--full] [--steps 8]

64 images a rank, one thread each, fp32. Ranks 1, 2, 4 (and, with --full, 8) share this machine's
cores. Then 2 (and 4) machines made of network namespaces, joined by links shaped to a rate, without
a hook and with DDP's fp16 and PowerSGD hooks; these need root, and are left out, with a line, where
they cannot be made. The prediction is ddp_lib.report.scaling's: its link is fitted to bare all-reduces of
the same ranks, its step to unwrapped steps that send nothing; it never sees a DDP step.
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
sys.path.insert(0, str(HERE.parent / "tests" / "hosts"))
LIMIT_S = 600
RATES = {"1gbit": "1 Gbit/s", "100mbit": "100 Mbit/s", "20mbit": "20 Mbit/s"}


def local(ranks: int, steps: int) -> dict[str, Any]:
    from scaling_rank import LOCAL_REPEATS, LOCAL_SIZES, measure

    from ddp_lib import run_ranks

    what = ("none", steps, LOCAL_SIZES, LOCAL_REPEATS)
    return run_ranks(measure, ranks, *what, timeout_s=LIMIT_S)[0]


def on_machines(count: int, rate: str, hook: str, steps: int) -> dict[str, Any]:
    from machines import Lab

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
            if program.wait(LIMIT_S):
                raise SystemExit(f"a machine's program failed:\n{program.output}")
        line = next(line for line in programs[0].output.splitlines() if line.startswith("{"))
        return json.loads(line)


def predicted_s(found: dict[str, Any], ranks: int, hook: str) -> float | None:
    """By the cost model; None for PowerSGD, whose own arithmetic it does not know."""
    from ddp_lib.report.scaling import Step, fit_link, predict_step_s

    if ranks == 1 or hook == "PowerSGD":
        return None
    link = fit_link({int(k): v for k, v in found["all_reduce_s"].items()}, ranks)
    sent = found["gradient_bytes"] // (2 if hook == "fp16" else 1)
    return predict_step_s(Step(found["compute_s"], found["backward_s"], sent), link, ranks)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--full", action="store_true", help="8 ranks, 4 machines, 1 Gbit/s too")
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    from machines import missing

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
    for name, ranks, hook, found in cells:
        rows.append({"name": name, "unit": "ms", "runs": [1000 * s for s in found["step_s"]]})
        measured = statistics.median(found["step_s"])
        expected = predicted_s(found, ranks, hook)
        efficiency = f"{found['compute_s'] / measured:.0%} of a step that sends nothing"
        if expected is None:
            findings.append(f"{name}: {1000 * measured:.0f} ms, {efficiency}.")
            continue
        errors.append(100 * (expected / measured - 1))
        findings.append(
            f"{name}: {1000 * measured:.0f} ms, {efficiency}; predicted {1000 * expected:.0f} ms, "
            f"error {errors[-1]:+.0f} %."
        )
    sizes = [abs(error) for error in errors]
    main = (
        f"the prediction is {statistics.median(sizes):.0f} % off in the median cell, "
        f"{max(sizes):.0f} % in the worst, of {len(sizes)}."
    )
    by_name = {name: statistics.median(found["step_s"]) for name, _, _, found in cells}
    for name in [name for name in by_name if name.endswith("20 Mbit/s")]:
        ratios = [by_name[name] / by_name[f"{name}, {hook}"] for hook in ("fp16", "PowerSGD")]
        main += (
            f" {name}: fp16 makes a step {ratios[0]:.2f}, PowerSGD {ratios[1]:.1f} times as fast."
        )
    findings.insert(0, main)
    if lacks:
        findings.append(f"No machines: {lacks}.")
    sent = cells[0][3]["gradient_bytes"]
    what = f"Milliseconds a step, 64 images a rank; the gradients are {sent / 1e6:.1f} MB."
    result = save("scaling", "Step time on more ranks", what, rows, findings)
    print(table(result["rows"]))
    print(*findings, sep="\n")


if __name__ == "__main__":
    main()
