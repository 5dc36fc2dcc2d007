"""python -m ddp_lib.launch: the same as ddp-launch."""

import sys

from ddp_lib.launch.main import main

sys.exit(main())
