"""python -m ddp_lib.launch: the same as ddp-launch."""

import sys
from pathlib import Path

import ddp_lib

# Python has put the working directory in front: somebody's queue.py there must not replace Python's.
if not sys.flags.safe_path and Path(sys.path[0]) != Path(ddp_lib.__path__[0]).parent:
    del sys.path[0]

from ddp_lib.launch.main import main

sys.exit(main())
