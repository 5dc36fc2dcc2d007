"""One rank, as ddp-launch starts it: python -m ddp_lib.rank FLAGS.

The same as ddp_lib.train, but a Ctrl-C or a killed agent ends it quietly also while torch loads.
"""

import signal
import sys

from ddp_lib.stop import leave_with_agent

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    leave_with_agent()
    from ddp_lib.train import main

    sys.exit(main())
