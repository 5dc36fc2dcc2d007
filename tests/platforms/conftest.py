"""The platforms' tests also use the machines of tests/hosts."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "hosts")]
