"""What a rank of `ddp-launch run` printed: a file per rank, and what its last traceback says."""

import re
import time
from dataclasses import dataclass
from pathlib import Path
from traceback import FrameSummary

from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, LogsDest, LogsSpecs

from ddp_lib.errors import PEER_GONE, lost_a_peer
from ddp_lib.launch.flight_recorder import name_dumps
from ddp_lib.processes.signals import STARTS
from ddp_lib.processes.stacks import describe, is_library
from ddp_lib.processes.temporary import temporary_folder
from ddp_lib.run_dir.log import name_disk_errors

# Of a log, so many bytes are searched for the last traceback.
_TAIL = 1 << 18
_MESSAGE = 4000  # characters of an exception's message that are searched
# Where a traceback starts, with the line before: of a destructor or a thread, Python says so there.
_TRACEBACK = re.compile(r"(?:^(?P<before>.*)\n)?^Traceback \(most recent call last\):\n", re.M)
_ASIDE = ("Exception ignored", "Exception in thread")
_FRAME = re.compile(
    r'^ +File "(?P<file>[^"\n]+)", line (?P<line>\d+), in (?P<function>.+)\n(?: {4,}(?P<source>\S.*)\n)?',
    re.M,
)
# What faulthandler writes if the process dies of SIGSEGV or SIGABRT: innermost frames first.
_FATAL = "Fatal Python error: "
_FATAL_FRAME = re.compile(r'^  File "(?P<file>[^"\n]+)", line (?P<line>\d+) in (?P<function>.+)$', re.M)
_EXCEPTION = re.compile(r"^(?P<type>[A-Za-z_][\w.]*)(?:: (?P<text>.*))?$", re.M)


def _say_start(env: dict[str, str], starts: int, local: tuple[int, int] | None, dumps: str) -> None:
    """Tells a rank, by its environment, of its earlier starts and its neighbours, and where dumps go."""
    env[STARTS] = str(starts)
    name_dumps(env, dumps)
    if local:
        env["LOCAL_RANK"], env["LOCAL_WORLD_SIZE"] = map(str, local)


class NoLogs(DefaultLogsSpecs):
    """The ranks write to the launcher's own output, and torch's error files go with the launcher. local: as
    in RankLogs. folder: where they write dumps, if it is there."""

    def __init__(self, local: tuple[int, int] | None, folder: Path) -> None:
        super().__init__(str(temporary_folder()))
        self.local, self.starts, self.dumps = local, 0, ""
        self.begins = str(folder.absolute() / f"collectives-{time.strftime('%Y%m%d-%H%M%S')}")

    def _make_log_dir(self, log_dir: str | None, rdzv_run_id: str) -> str:
        """torch would make a folder that is named as the job, however long that name is."""
        return str(temporary_folder())

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        self.dumps = f"{self.begins}.{self.starts}.rank"
        for env in envs.values():
            _say_start(env, self.starts, self.local, self.dumps)
        self.starts += 1
        return super().reify(envs)


class RankLogs(LogsSpecs):
    """torch's description of where ranks write. Both streams of rank R go to `folder`/rank<R>.log, or
    rank<R>.restart<N>.log after N restarts; those of `shown` local ranks (None: all) go to the screen too.

    local: local rank and number of local ranks, if this launcher's only rank has neighbours on its machine.
    """

    def __init__(self, folder: Path, shown: set[int] | None, local: tuple[int, int] | None) -> None:
        super().__init__(str(folder))
        # Absolute, since a script may change its working directory.
        self.folder, self.shown, self.local = folder.absolute(), shown, local
        self.starts = 0  # torch's own count leaves out those after a change of an elastic job's machines
        self.dumps = ""
        self.paths: dict[int, Path] = {}  # by global rank, of the last start

    @property
    def root_log_dir(self) -> str:
        return str(self.folder)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        with name_disk_errors(self.folder, "or name another --log-dir"):
            self.folder.mkdir(parents=True, exist_ok=True)
        logs, errors = {}, {}
        again, self.starts = self.starts, self.starts + 1
        self.paths.clear()
        self.dumps = str(self.folder / f"collectives.{again}.rank")
        for local_rank, env in envs.items():
            _say_start(env, again, self.local, self.dumps)
            name = f"rank{env['RANK']}" + (f".restart{again}" if again else "")
            logs[local_rank] = str(self.folder / f"{name}.log")
            errors[local_rank] = env["TORCHELASTIC_ERROR_FILE"] = str(self.folder / f".{name}.error.json")
            self.paths[int(env["RANK"])] = Path(logs[local_rank])
        shown = {
            r: log
            for r, log in logs.items()
            if self.shown is None or (self.local[0] if self.local else r) in self.shown
        }
        return LogsDest(logs, dict.fromkeys(logs, ""), shown, {}, errors)


@dataclass(frozen=True)
class LastException:
    """line: its type and the first line of its message; text: all of it and what came after; where: the
    innermost line of the reader's own code, empty if none; inside: the file that raised it."""

    line: str
    text: str
    where: str
    inside: str

    @property
    def at_end(self) -> bool:
        """Whether nothing was printed after it: its message may have more lines, but they are few."""
        return self.text.count("\n") < 40

    @property
    def lost_a_peer(self) -> bool:
        """Whether a collective or the store raised it since another rank has left or did not come."""
        if self.line.startswith("torch.distributed."):
            return lost_a_peer(self.text)
        # RuntimeError is of everybody: only what gloo says counts.
        signs = (*PEER_GONE, "Timed out waiting", "Application timeout")
        plain = self.line.startswith("RuntimeError:")
        of_torch = "torch/" in self.inside and "torch/utils/data" not in self.inside
        here = of_torch or not is_library(self.inside)
        return plain and here and any(sign in self.text[:_MESSAGE] for sign in signs)


def last_exception(text: str) -> LastException | None:
    """The exception with which a Python program ended, from what it printed; None if there is none."""
    starts = [*_TRACEBACK.finditer(text)]
    ends = [*(start.start() for start in starts[1:]), len(text)]
    blocks = [
        text[start.end() : end]
        for start, end in zip(starts, ends, strict=False)
        if not (start["before"] or "").startswith(_ASIDE)
    ]
    frames = list(_FRAME.finditer(blocks[-1])) if blocks else []
    exception = _EXCEPTION.search(blocks[-1], frames[-1].end()) if frames else None
    if exception is None:
        return None
    own = [frame for frame in frames if not is_library(frame["file"])]
    where = ""
    if own:
        frame = own[-1]
        place = FrameSummary(frame["file"], int(frame["line"]), frame["function"], line=frame["source"] or "")
        where = describe(place)
    text = blocks[-1][exception.start() :]
    return LastException(exception[0].strip(), text, where, frames[-1]["file"])


def split_fatal(text: str, died: bool) -> tuple[str, str]:
    """What a process printed before faulthandler's stacks, and the line of the reader's own code at which it
    then stood, empty if not known. died: whether it died of a signal; else the stacks are another process's,
    such as a DataLoader's worker."""
    before, fatal, stacks = f"\n{text}".rpartition(f"\n{_FATAL}") if died else (text, "", "")
    if not fatal:
        return text, ""
    # The thread that got the signal; or the main thread, which is last, if that runs no Python.
    threads = sorted(stacks.split("\n\n")[::-1], key=lambda thread: not thread.startswith("Current thread"))
    frames = (frame for thread in threads for frame in _FATAL_FRAME.finditer(thread))
    own = next((frame for frame in frames if not is_library(frame["file"])), None)
    place = FrameSummary(own["file"], int(own["line"]), own["function"]) if own else None
    return before[1:], describe(place) if place else ""


def read_tail(path: Path) -> str:
    """The end of a log, as text; empty if there is no such file."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return re.sub(r"^\[rank\d+\]: ?", "", text, flags=re.M)  # torch's, once there is a process group
