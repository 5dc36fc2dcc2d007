"""What faults on several machines cost: makes each on purpose, and counts by the logs.

python benchmarks/faults.py [--only REGEX]     as root, on Linux; some minutes

The machines are network namespaces of this computer, each with a disk folder of its own; the faults
and the training are those of tests/hosts/damage.py. Writes results/faults.json and the table in the
README; with --only, those rows anew.
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

sys.path.insert(0, str(ROOT / "tests" / "hosts"))

from damage import FAULTS, GATE, STEPS_PER_EPOCH, Outcome, make_images, unbroken
from machines import Lab, missing

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


def keep(new: dict[str, Any]) -> dict[str, Any]:
    """Puts the row into the results, in the place of the one of an earlier run."""
    path = RESULTS / "faults.json"
    known = json.loads(path.read_text())["rows"] if path.exists() else []
    by_name = {one["fault"]: one for one in [*known, new]}
    rows = [by_name[name] for name in FAULTS if name in by_name]
    same = sum(one["same bits at the end"] == BITS[True] for one in rows)
    other = sum(one["same bits at the end"] == BITS[None] for one in rows)
    lost = sum(one["samples lost"] + one["samples repeated"] for one in rows)
    return save(
        "faults",
        "Faults on several machines",
        "Two machines without a shared disk, a rank on each, started by ddp-launch; where it says so, "
        f"the same line was started again. Each fault strikes {GATE % STEPS_PER_EPOCH} steps into an "
        "epoch; the last checkpoint is that of the epoch before. Seconds: from the fault until a step "
        "was done again, or until all had ended. Steps and samples are counted from the logs; the "
        "final parameters are compared with those of a run that nothing befell. "
        f"The computer's load average was {os.getloadavg()[1]:.0f}: more than its cores lengthens the "
        "seconds.",
        rows,
        [
            f"{same} of {len(rows) - other} runs end with the bits of the unbroken run; "
            f"{lost} samples were lost or repeated in all {len(rows)}."
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--only", default="", metavar="REGEX", help="faults in whose name it is found"
    )
    only = parser.parse_args().only
    if lacks := missing():
        raise SystemExit(f"benchmarks/faults.py: {lacks}")
    with tempfile.TemporaryDirectory() as folder:
        images = make_images(Path(folder, "images"))
        whole = unbroken(images, Path(folder, "unbroken"))
        for number, (name, fault) in enumerate(FAULTS.items()):
            if re.search(only, name):
                with Lab(3, Path(folder, str(number))) as lab:
                    result = keep(row(name, fault(lab, images, whole)))
                    into_readme("faults", result)
    print(table(result["rows"]))


if __name__ == "__main__":
    main()
