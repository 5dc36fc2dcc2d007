"""How a rank's failure becomes an exit status and one line."""

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ddp_lib.errors import UserError
from ddp_lib.processes.signals import AGENT

# What gloo and NCCL say on the ranks that survive when a peer is gone: a consequence, not a cause.
PEER_GONE = ("Connection closed by peer", "Connection reset", "Broken pipe", "remote process")
_TIMED_OUT = ("Timed out waiting", "timed out", "Timeout", "Application timeout")


@dataclass
class Outcome:
    status: int = 0


@contextmanager
def as_exit_status(prog: str = "ddp-launch") -> Iterator[Outcome]:
    """Turns what is raised inside into `outcome.status`, and says it: one line for a UserError.

    Under ddp-launch the line is left to the agent, which names the first failure of all ranks.
    """
    outcome = Outcome()
    try:
        yield outcome
    except UserError as error:
        outcome.status = 2
        _tell(prog, str(error), secondary=False)
    except KeyboardInterrupt:
        outcome.status = 130
    except BrokenPipeError:
        # What read the output (`| head`) has ended: nothing more can be said there, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        outcome.status = 128 + signal.SIGPIPE
        if AGENT in os.environ:  # the agent must say why a rank has left
            _tell(prog, "nothing reads the output any more: send it to a file", secondary=False)
    except SystemExit as leaving:
        outcome.status = leaving.code if isinstance(leaving.code, int) else int(bool(leaving.code))
    except Exception as error:
        outcome.status = 1
        text = " ".join(str(error).split())[:300]
        if isinstance(error, RuntimeError) and any(sign in text for sign in PEER_GONE):
            _tell(prog, f"another rank is gone: see its own output ({text})", secondary=True)
        elif isinstance(error, RuntimeError) and any(sign in text for sign in _TIMED_OUT):
            _tell(
                prog, f"waited for another rank in vain, --timeout-s long ({text})", secondary=True
            )
        else:
            traceback.print_exc()
            line = f"{type(error).__name__}: {text} (its traceback stands above)"
            _tell(prog, line, secondary=False)


def _tell(prog: str, line: str, secondary: bool) -> None:
    """Prints the line, or leaves it where the agent reads it."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        now = time.time()
        # torch reads the first three; ddp-launch the rest, to find the cause among failures that
        # came within one second.
        extra = {
            "timestamp": str(int(now)),
            "py_callstack": line,
            "time": now,
            "secondary": secondary,
        }
        with open(path, "w") as file:
            json.dump({"message": {"message": line, "extraInfo": extra}}, file)
    if AGENT not in os.environ:
        rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
        print(f"{prog}: error: {rank}{line}", file=sys.stderr, flush=True)
