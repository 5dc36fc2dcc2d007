"""What faults on several machines cost: causes each fault on purpose, and counts from the logs.

python benchmarks/faults.py [--only REGEX]     as root, on Linux; some minutes

The machines are network namespaces of this computer, each with its own folder as its disk. The faults and
the training are those of tests/lab/damage.py. Writes results/faults.json and the table in the README;
with --only, it replaces only those rows.
"""

import argparse
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from report import RESULTS, ROOT, into_readme, save, table

sys.path.insert(0, str(ROOT))

from tests.lab.damage import FAULTS
from tests.lab.machines import Lab
from tests.lab.namespaces import missing
from tests.lab.training import GATE, STEPS_PER_EPOCH, Outcome, make_images, unbroken

BITS = {True: "yes", False: "no", None: "the number of ranks changed"}


def row(name: str, outcome: Outcome) -> dict[str, Any]:
    return {
        "fault": name,
        "what happens": outcome.course,
        "seconds": outcome.seconds,
        "steps redone": outcome.steps_redone,
        "samples lost": outcome.samples_lost,
        "samples repeated": outcome.samples_repeated,
        "same bits at the end": BITS[outcome.bits],
    }


def save_row(new: dict[str, Any]) -> dict[str, Any]:
    """Adds the row to the results, or replaces the row of an earlier run; returns all results."""
    path = RESULTS / "faults.json"
    saved = json.loads(path.read_text())["rows"] if path.exists() else []
    by_name = {row["fault"]: row for row in [*saved, new]}
    rows = [by_name[name] for name in FAULTS if name in by_name]
    same = sum(row["same bits at the end"] == BITS[True] for row in rows)
    not_comparable = sum(row["same bits at the end"] == BITS[None] for row in rows)
    lost = sum(row["samples lost"] + row["samples repeated"] for row in rows)
    return save(
        "faults",
        "Faults on several machines",
        "Two machines without a shared disk, one rank on each, started by ddp-launch. If the table says "
        '"started again", the same command was typed again. Each fault happens '
        f"{GATE % STEPS_PER_EPOCH} steps into an epoch; the last checkpoint is that of the epoch before. "
        "Seconds are counted from the fault until the next step was done, or until everything had ended. "
        "Steps and samples are counted from the logs. The final parameters are compared with those of an "
        f"uninterrupted run. The computer's load average was {os.getloadavg()[1]:.0f}; a load above the "
        "number of its cores makes the seconds longer.",
        rows,
        [
            f"{same} of {len(rows) - not_comparable} runs end with the same bits as the uninterrupted "
            f"run; {lost} samples were lost or repeated in all {len(rows)}."
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", metavar="REGEX", help="only faults whose name matches")
    only = parser.parse_args().only
    if lacks := missing():
        raise SystemExit(f"benchmarks/faults.py: {lacks}")
    with tempfile.TemporaryDirectory() as folder:
        images = make_images(Path(folder, "images"))
        uninterrupted = unbroken(images, Path(folder, "unbroken"))
        for number, (name, fault) in enumerate(FAULTS.items()):
            if re.search(only, name):
                with Lab(3, Path(folder, str(number))) as lab:
                    result = save_row(row(name, fault(lab, images, uninterrupted)))
                    into_readme("faults", result)
    print(table(result["rows"]))


if __name__ == "__main__":
    main()
