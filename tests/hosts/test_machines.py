"""The machines themselves: apart, joined, and gone afterwards."""

import os
import signal
import subprocess
import sys

import psutil
import pytest

from tests.lab.machines import Lab
from tests.lab.project import ROOT

TIMEOUT_S = 30
ECHO = """
import socket, sys
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
server = socket.create_server((sys.argv[1], 7000), family=family)
print("listens")
while True:
    with server.accept()[0] as client:
        client.sendall(b"hello")
"""
ASK = """
import socket, sys
try:
    with socket.create_connection((sys.argv[1], 7000), timeout=float(sys.argv[2])) as s:
        print(s.recv(5).decode(), socket.gethostname())
except OSError as error:
    print(type(error).__name__)
"""


def test_names_addresses_and_hosts_files_are_each_machines_own(make_lab):
    lab = make_lab(2, ipv6=True)
    for machine in lab.machines:
        assert machine.run(["uname", "-n"]) == f"{machine.name}\n"
        shown = machine.run(["ip", "-brief", "address", "show", "dev", "eth0"])
        assert f"{machine.ipv4}/24" in shown and f"{machine.ipv6}/64" in shown
    m0, m1 = lab.machines
    m1.write_hosts({"m0": "127.0.1.1"})
    assert m0.run(["getent", "hosts", "m0"]).split() == [m0.address, "m0"]
    assert m1.run(["getent", "hosts", "m0"]).split() == ["127.0.1.1", "m0"]


def test_two_labs_at_once_share_nothing(make_lab, tmp_path):
    first = make_lab(2)
    with Lab(2, tmp_path / "second", names=["m0", "other"]) as second:
        server = first.machines[0].start(["python", "-c", ECHO, "0.0.0.0"])
        server.wait_for("listens", TIMEOUT_S)
        ask = ["python", "-c", ASK, first.machines[0].address, "5"]
        assert first.machines[1].run(ask) == "hello m1\n"
        assert second.machines[1].run(ask) == "ConnectionRefusedError\n"


@pytest.mark.parametrize("family", ["ipv4", "ipv6"])
def test_cable_and_ports(make_lab, family):
    m0, m1 = make_lab(2, ipv4=family == "ipv4", ipv6=family == "ipv6").machines
    server = m0.start(["python", "-c", ECHO, m0.address])
    server.wait_for("listens", TIMEOUT_S)

    def asked(timeout_s: float) -> str:
        return m1.run(["python", "-c", ASK, m0.address, str(timeout_s)]).split()[0]

    assert asked(5) == "hello"
    m0.close_ports(but=7001)
    assert asked(0.3) == "TimeoutError"
    m0.open_ports()
    m0.close_ports("7000", how="REJECT")
    assert asked(5) == "ConnectionRefusedError"
    m0.open_ports()
    m0.close_ports(but=7000)
    assert asked(5) == "hello"
    m0.cut()
    assert asked(0.3) == "TimeoutError"
    m0.plug()
    assert asked(5) == "hello"


def test_a_rate_is_a_limit(make_lab):
    m0 = make_lab(2).machines[0]
    m0.limit_rate("20mbit")
    kinds = m0.run(["tc", "qdisc", "show", "dev", "eth0"])
    assert "tbf" in kinds and "rate 20Mbit" in kinds
    m0.full_rate()
    assert "tbf" not in m0.run(["tc", "qdisc", "show", "dev", "eth0"])


def test_signals_ends_and_output_of_a_program(make_lab):
    (m0,) = make_lab(1).machines
    family = m0.start(["sh", "-c", "sleep 1000 & setsid sleep 2000 & echo both; wait"])
    family.wait_for("both", TIMEOUT_S)
    assert len(m0.processes()) == 3
    family.end()
    assert m0.processes() == []
    stopped = m0.start(["sh", "-c", "trap 'echo heard; exit 3' TERM; echo up; while :; do sleep 0.01; done"])
    stopped.wait_for("^up$", TIMEOUT_S)
    stopped.signal(signal.SIGTERM)
    assert stopped.wait(TIMEOUT_S) == 3
    assert stopped.output == "up\nheard\n"
    with pytest.raises(AssertionError, match="ended without"):
        stopped.wait_for("never", TIMEOUT_S)
    killed = m0.start(["sleep", "1000"])
    killed.signal(signal.SIGKILL)
    assert killed.wait(TIMEOUT_S) == -signal.SIGKILL


def test_nothing_is_left_of_a_killed_test_run(tmp_path):
    """The kernel removes machines and programs with the process that made them."""
    code = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from tests.lab.machines import Lab
with Lab(2, Path({str(tmp_path)!r})) as lab:
    program = lab.machines[1].start(["sh", "-c", "setsid sleep 1000 & echo up; wait"])
    program.wait_for("up", {TIMEOUT_S})
    print(*[p.pid for m in lab.machines for p in m.processes()], lab.machines[0].namespaces.pid, flush=True)
    time.sleep(1000)
"""
    maker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    left = [psutil.Process(int(pid)) for pid in maker.stdout.readline().split()]
    assert len(left) == 3
    os.kill(maker.pid, signal.SIGKILL)
    maker.communicate(timeout=TIMEOUT_S)
    _, alive = psutil.wait_procs(left, timeout=TIMEOUT_S)
    assert alive == []
