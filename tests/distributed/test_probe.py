"""Two machines measure the link between them; here they are one."""

from contextlib import closing

from ddp_lib.distributed.probe import Probe, bandwidth, connect, connect_all


def test_a_probe_answers_and_is_gone():
    with closing(Probe("127.0.0.1")) as probe:
        link = connect("127.0.0.1", probe.port, pings=3)
        assert (link.trouble, link.seen_as) == ("", "127.0.0.1")
        assert 0 < link.latency_s < 4 and abs(link.clock_s) < 4
        assert bandwidth("127.0.0.1", probe.port, 0.01, 20) > 0
        both = connect_all([("127.0.0.1", probe.port)] * 2)
        assert [each.trouble for each in both] == ["", ""]
        port = probe.port
    assert connect("127.0.0.1", port).trouble == "is refused"
