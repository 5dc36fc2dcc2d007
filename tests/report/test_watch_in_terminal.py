"""`ddp-launch watch` on a terminal of 80 columns, which tmux plays."""

import shutil
import subprocess
import sys
import threading
import time

import pytest

from tests.lab.logs import finish, grow
from tests.lab.processes import TIMEOUT_S

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(shutil.which("tmux") is None, reason="no tmux here: apt install tmux"),
]


@pytest.fixture
def screen(tmp_path):
    """screen(command, until): what stands there once `until` does; the first call starts `command`."""
    words = ["tmux", "-u", "-S", str(tmp_path / "tmux"), "-f", "/dev/null"]

    def tmux(*command):
        return subprocess.run([*words, *command], check=True, capture_output=True, text=True).stdout

    def wait_for(command, until):
        if not (tmp_path / "tmux").exists():
            tmux("new-session", "-d", "-x", "80", "-y", "24", "-c", str(tmp_path), f"{command}; cat")
        deadline = time.monotonic() + TIMEOUT_S
        while until not in " ".join((shown := tmux("capture-pane", "-p")).split()):
            assert time.monotonic() < deadline, shown
            time.sleep(0.1)
        return shown

    yield wait_for
    subprocess.run([*words, "kill-server"], capture_output=True)


def test_a_slow_rank_is_seen_on_a_terminal(tmp_path, screen):
    over = threading.Event()
    run = threading.Thread(target=grow, args=(tmp_path / "eight", 8, 5, over))
    run.start()
    try:
        command = f"{sys.executable} -m ddp_lib.launch watch eight"
        shown = screen(command, "! rank 5 is slow: it works 8").splitlines()
    finally:
        over.set()
        run.join()
    assert shown[0].startswith("eight: 8 ranks, step ")
    rows = [line.split()[0] for line in shown[2:10]]
    assert rows == [*"01234567"], shown  # drawn in place: each rank once
    assert [line.split()[4] for line in (shown[2], shown[7])] == ["37%", "0%"] and shown[7].endswith("!")
    assert "".join(shown[2:10]).count("█") >= 1  # of all losses, the highest
    finish(tmp_path / "eight", 8)
    ended = screen(command, "eight: finished, 8 ranks")
    assert ended.count("eight: 8 ranks, step ") == 1 and max(map(len, ended.splitlines())) <= 80
