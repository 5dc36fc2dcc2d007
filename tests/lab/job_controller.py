"""What Kubernetes' Job controller does when pods end: podFailurePolicy decides, then backoffLimit.

(The real one also waits before it makes a pod again.)
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from tests.lab.manifests import Manifest
from tests.lab.program import Program


@dataclass
class JobController:
    """Runs an Indexed Job. start(index): starts the pod of this index. counted, ignored: failures so far."""

    job: Manifest
    start: Callable[[int], Program]
    counted: int = 0
    ignored: int = 0

    def run(self, timeout_s: float) -> str:
        """The Job's condition: "Complete", or "Failed" after all its pods have been ended."""
        spec, deadline = self.job["spec"], time.monotonic() + timeout_s
        running = {index: self.start(index) for index in range(spec["completions"])}
        try:
            while running:
                assert time.monotonic() < deadline, "\n".join(p.output for p in running.values())
                for index, program in [item for item in running.items() if item[1].ended]:
                    del running[index]
                    action = self.action(program.wait(1))
                    if action == "FailJob" or self.counted > spec["backoffLimit"]:
                        return "Failed"
                    if action != "Succeeded":
                        running[index] = self.start(index)
                time.sleep(0.05)
        finally:
            for program in running.values():
                program.end()
        return "Complete"

    def action(self, status: int) -> str:
        """What the first rule that fits says to a container's exit status; counts the failure."""
        if status == 0:
            return "Succeeded"
        status = status if status > 0 else 128 - status
        for rule in self.job["spec"]["podFailurePolicy"]["rules"]:
            codes = rule.get("onExitCodes", {})
            if codes.get("operator") == "In" and status in codes["values"]:
                self.ignored += rule["action"] == "Ignore"
                return str(rule["action"])
        self.counted += 1
        return "Count"
