"""Who is to blame for a collective that timed out, from what torch's flight recorder has written."""

import os
import pickle
from pathlib import Path

import pytest

from ddp_lib.launch.flight_recorder import read_calls, summarize, who_is_behind
from tests.lab.own_script import RUN, START
from tests.lab.ports import free_port
from tests.lab.processes import end, start_piped

MINE = {"filename": "/home/me/train.py", "line": 41, "name": "step"}
TORCH = {"filename": "/usr/lib/python3/site-packages/torch/distributed/c10d.py", "line": 9, "name": "f"}
AT = "at train.py line 41 in step"


def entry(number: int, what: str, done: bool, sizes=((4,),), group: str = "0", frames=(TORCH, MINE), **more):
    """As torch writes it."""
    return {
        "process_group": (group, "default_pg"),
        "collective_seq_id": number,
        "profiling_name": f"nccl:{what}",
        "state": "completed" if done else "started",
        "input_sizes": [list(size) for size in sizes],
        "frames": list(frames),
        **more,
    }


DONE = [entry(1, "broadcast", True), entry(2, "all_reduce", True)]
WAITS = entry(3, "all_reduce", False)
# Each: the entries of ranks 0, 1 and 2, and the line.
CASES = {
    "one did not come": (
        [[*DONE, WAITS], DONE, [*DONE, WAITS]],
        f"rank(s) 1 did not come to collective number 3, all_reduce of [[4]], which rank 0 called {AT}: rank "
        f"1's last was number 2, all_reduce of [[4]] {AT}",
    ),
    "two did not come": ([DONE, [*DONE, WAITS], DONE], "rank(s) 0, 2 did not come to collective number 3"),
    "another collective": (
        [[*DONE, WAITS], [*DONE, entry(3, "broadcast", False)], [*DONE, WAITS]],
        f"the ranks' collectives differ: collective number 3, all_reduce of [[4]], which rank 0 called {AT}, "
        f"is broadcast of [[4]] on rank 1 {AT}",
    ),
    "another size": (
        [[*DONE, entry(3, "all_reduce", False, [(2, 2)])], [*DONE, WAITS]],
        "all_reduce of [[2, 2]], which rank 0 called",
    ),
    "sizes that may differ": ([[*DONE, entry(3, "gather", False)], [entry(3, "gather", False, [])]], ""),
    "DDP's, without a line": (
        [[*DONE, entry(3, "allreduce_coalesced", False, frames=[TORCH])], DONE],
        "allreduce_coalesced of [[4]], which rank 0 called: rank 1's",
    ),
    "a later one is queued": ([[*DONE, WAITS, entry(4, "all_reduce", False)], DONE], "collective number 3"),
    "another group": ([[*DONE, entry(1, "all_reduce", False, group="1")], DONE], ""),
    "sent to one": ([[*DONE, entry(3, "send", False, is_p2p=True)], DONE], ""),
    "all wait for the same": ([[*DONE, WAITS], [*DONE, WAITS]], ""),
    "gloo's": ([[*DONE, WAITS], [entry(2, "all_reduce", False, retired=True)]], "rank(s) 1 did not come"),
}  # fmt: skip


@pytest.mark.parametrize(("ranks", "line"), CASES.values(), ids=CASES)
def test_who_did_not_come(ranks, line):
    said = who_is_behind({rank: summarize(entries) for rank, entries in enumerate(ranks)})
    assert line in said if line else not said


class Harmful:
    def __reduce__(self):
        return os.system, ("false",)


@pytest.mark.parametrize(
    "content", [pickle.dumps(Harmful()), pickle.dumps({"entries": DONE})[:-9], b"", None]
)
def test_a_dump_that_is_no_dump_is_left_out(tmp_path, content):
    prefix = f"{tmp_path}/calls."
    Path(f"{prefix}0").write_bytes(pickle.dumps({"entries": DONE}))
    if content is not None:
        Path(f"{prefix}1").write_bytes(content)
    assert [*read_calls(prefix, [0, 1])] == [0]


# What NCCL's watchdog does on each rank when a collective times out. Rank 1 does not come to the third.
WATCHDOG = """
os.environ["TORCH_FR_BUFFER_SIZE"] = "100"
join()
step()
step()
if rank == 0:
    dist.all_reduce(torch.ones(3), async_op=True)  # the third
time.sleep(0.5)
dump = torch._C._distributed_c10d._dump_fr_trace()
Path(os.environ["TORCH_FR_DUMP_TEMP_FILE"] + str(rank)).write_bytes(dump)
print("Watchdog caught collective operation timeout", flush=True)
os.abort()
"""


@pytest.mark.ranks
@pytest.mark.parametrize("machines", [1, 2])
def test_ranks_that_the_watchdog_ended_are_compared(tmp_path, started, machines):
    script = tmp_path / "own.py"
    script.write_text(START + WATCHDOG)
    flags = [f"--nproc-per-node={2 // machines}", f"--nnodes={machines}"]
    if machines > 1:
        flags.append(f"--rdzv-endpoint=127.0.0.1:{free_port()}")
    for number in range(machines):
        words = [*RUN, *flags, f"--node-rank={number}", f"--log-dir=logs{number}", str(script)]
        started.append(start_piped(words, tmp_path))
    for process in started:
        status, _, err = end(process)
        line, _, dumps = err[-1].partition("; a dump of each rank: ")
        assert line.startswith(
            "ddp-launch: error: rank(s) 1 did not come to collective number 3, all_reduce of [[3]], which "
            "rank 0 called at own.py line "
        ), err
        assert (
            "in <module>: dist.all_reduce(torch.ones(3), async_op=True)  # the third: rank 1's last" in line
        )
        assert status == 75
        folder = Path(dumps.partition("*, which")[0]).parent
        assert len([*folder.glob("collectives.0.rank*")]) == 2 // machines
