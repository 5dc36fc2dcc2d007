"""Whether the kernel has killed processes for want of memory."""

import re
from contextlib import suppress
from pathlib import Path

ROOT = Path("/")


def oom_kills(root: Path = ROOT) -> int:
    """How many processes the kernel has killed for want of memory: in this process's control group, with its
    limit (cgroup v2 or v1); on the whole machine if that has no counter. 0 where nothing says so."""
    files = []
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                files.append(root / "sys/fs/cgroup" / path.strip("/") / "memory.events")
            elif "memory" in controllers.split(","):
                files.append(root / "sys/fs/cgroup/memory" / path.strip("/") / "memory.oom_control")
    for counters in (files, [root / "proc/vmstat"]):
        counts = []
        for file in counters:
            with suppress(OSError):
                counts += re.findall(r"^oom_kill (\d+)$", file.read_text(), re.M)
        if counts:
            return sum(map(int, counts))
    return 0


OOM_KILLS = oom_kills()  # when the launcher started
