"""What runs first in each process of `ddp-launch run`, and then becomes the script's own Python.

python -I -S exec_rank.py PYTHON WORD...: imports nothing that takes time.
"""

import os
import signal
import sys


def main(words: list[str]) -> None:
    os.environ["DDP_LIB_PREFIXED"] = "1"  # the launcher shows each line with its rank in front
    os.environ.setdefault("PYTHONFAULTHANDLER", "1")  # its log gets the stacks if it dies of SIGSEGV
    os.dup2(1, 2)  # one log for both, in the order of what was written
    if sys.platform == "linux":
        import ctypes

        # Linux sends this process SIGTERM when its launcher is gone, also if that was killed.
        prctl, pr_set_pdeathsig, pr_set_ptracer = ctypes.CDLL(None).prctl, 1, 0x59616D61
        prctl(pr_set_pdeathsig, signal.SIGTERM)
        # Where Yama lets only ancestors look at a process (Ubuntu), py-spy may look too.
        prctl(pr_set_ptracer, ctypes.c_ulong(-1))
        if os.getppid() != int(os.environ["DDP_LIB_AGENT"]):
            sys.exit(128 + signal.SIGTERM)  # it went before the call
    os.execv(words[0], words)


if __name__ == "__main__":
    main(sys.argv[1:])
