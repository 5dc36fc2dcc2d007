"""What faults on several machines cost: makes each on purpose, and counts by the logs.

python benchmarks/faults.py [--only WORD]      as root, on Linux; some minutes

The machines are network namespaces of this computer, each with a disk folder of its own; the faults
and the training are those of tests/hosts/faults.py. Writes results/faults.json and the table in the
README.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from report import ROOT, into_readme, save, table

sys.path.insert(0, str(ROOT / "tests" / "hosts"))

from faults import FAULTS, GATE, STEPS_PER_EPOCH, Outcome, make_images, unbroken
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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", metavar="WORD", help="faults whose name holds it")
    only = parser.parse_args().only
    if lacks := missing():
        raise SystemExit(f"benchmarks/faults.py: {lacks}")
    began, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        images = make_images(Path(folder, "images"))
        whole = unbroken(images, Path(folder, "unbroken"))
        for number, (name, fault) in enumerate(FAULTS.items()):
            if only in name:
                with Lab(3, Path(folder, str(number))) as lab:
                    rows.append(row(name, fault(lab, images, whole)))
                print(*rows[-1].values(), sep=" | ", flush=True)
    seconds = time.monotonic() - began
    if only:
        return
    result = save(
        "faults",
        "Faults on several machines",
        "Two machines without a shared disk, a rank on each, started by ddp-launch; the same line "
        f"again where it says so. Each fault strikes {GATE % STEPS_PER_EPOCH} steps into an epoch; "
        "checkpoints are written at each epoch's end. Seconds: from the fault until a step is "
        "done again, or until all have ended. Steps and samples are counted from the logs on the "
        "master; the final parameters are compared with those of a run that nothing befell.",
        rows,
        [f"All {len(rows)} faults together took {seconds:.0f} s."],
    )
    into_readme("faults", result)
    print(table(result["rows"]))


if __name__ == "__main__":
    main()
