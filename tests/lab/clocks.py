"""A launcher whose view of the time is shifted; all else on its machine keeps the right one."""

_SHIFTED = """
import datetime, sys
from torch.distributed.elastic.rendezvous import dynamic_rendezvous
from ddp_lib.launch import arrival
true = datetime.datetime
class Shifted(true):
    @classmethod
    def now(cls, zone=None):
        return true.now(zone) + datetime.timedelta(seconds={})
dynamic_rendezvous.datetime = arrival.datetime = Shifted
from ddp_lib.launch.main import main
sys.exit(main(sys.argv[1:]))
"""


def shifted(seconds: int, command: list[str]) -> list[str]:
    """`command`, a ddp-launch, for torch's rendezvous in which it is so many seconds later."""
    return ["python", "-c", _SHIFTED.format(seconds), *command[1:]]
