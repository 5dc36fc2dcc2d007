"""ddp-launch check's conclusions, from made-up measurements; real ones are in tests/hosts."""

from ddp_lib.launch.diagnosis import causes, table
from ddp_lib.launch.options import CheckOptions


def test_a_healthy_pair_has_no_causes():
    def machine(number: int, **changes) -> dict:
        return {
            "host": f"m{number}", "address": f"10.0.0.{number}", "interface": "eth0", "size": 2,
            "rank": number, "size_name": "WORLD_SIZE", "rank_name": "RANK", "torch": "2", "hosts": True,
            "ddp_lib": "1", "gpus": 0, "ranks": 1, "backend": "auto", "free": 2**40, "data": "",
            "troubles": [], "probe": [f"10.0.0.{number}", 1], **changes,
        }  # fmt: skip

    def row(number: int) -> dict:
        link = {"trouble": "", "seen_as": f"10.0.0.{number}", "latency_s": 1e-3, "clock_s": 0.0}
        return {"links": {str(1 - number): link}, "rate": 1e9}

    rows = [row(0), row(1)]
    assert causes([machine(0), machine(1)], rows, 15) == []
    *lines, last = table([machine(0), machine(1)], rows).splitlines()
    assert len(lines) == 3 and last.startswith("not tested: NCCL")
    (line,) = causes([machine(0), machine(1, free=5)], rows, 15)
    assert "m1 (10.0.0.1) has 0.00 GB free" in line
    (line,) = causes([machine(0, data="a"), machine(1, data="b")], rows, 15)
    assert "data is b on m1" in line
    (line,) = causes([machine(0), machine(1)], [row(0), None], 15)
    assert "m1 (10.0.0.1) came, but did not finish" in line
    assert CheckOptions().timeout_s == 30
