"""`ddp-launch watch` on a terminal of 80 columns, which tmux plays."""

import shutil
import subprocess
import sys
import threading
import time

import psutil
import pytest

from tests.lab.logs import finish, grow
from tests.lab.processes import TIMEOUT_S

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(shutil.which("tmux") is None, reason="no tmux here: apt install tmux"),
]

WATCH = f"{sys.executable} -m ddp_lib.launch watch eight"


class Screen:
    """Of a terminal that runs a command, and then cat."""

    def __init__(self, folder, command):
        self.words = ["tmux", "-u", "-S", str(folder / "tmux"), "-f", "/dev/null"]
        self.tmux("new-session", "-d", "-x", "80", "-y", "24", "-c", str(folder), f"{command}; cat")

    def tmux(self, *command):
        return subprocess.run([*self.words, *command], check=True, capture_output=True, text=True).stdout

    def wait_for(self, until):
        """What stands there once `until` does."""
        deadline = time.monotonic() + TIMEOUT_S
        while until not in " ".join((shown := self.tmux("capture-pane", "-p")).split()):
            assert time.monotonic() < deadline, shown
            time.sleep(0.1)
        return shown

    def terminate(self):
        """SIGTERM to what runs there now."""
        shell = psutil.Process(int(self.tmux("display-message", "-p", "#{pane_pid}")))
        shell.children()[0].terminate()


@pytest.fixture
def screen(tmp_path):
    shown = Screen(tmp_path, f"echo before; {WATCH}; {WATCH}")
    yield shown
    shown.tmux("kill-server")


def test_a_slow_rank_is_seen_on_a_terminal_of_any_size(tmp_path, screen):
    over = threading.Event()
    run = threading.Thread(target=grow, args=(tmp_path / "eight", 8, 5, over))
    run.start()
    try:
        shown = screen.wait_for("! rank 5 is slow: it works 8").splitlines()
        screen.tmux("resize-window", "-x", "60")
        screen.wait_for("others' med")  # cut off
        screen.tmux("resize-window", "-x", "80")
        again = screen.wait_for("others' median").splitlines()
        screen.terminate()
        screen.wait_for("before eight: 8 ranks")
    finally:
        over.set()
        run.join()
    for lines in (shown, again):
        assert lines[0].startswith("eight: 8 ranks, step ")
        rows = [line.split()[0] for line in lines[2:10]]
        assert rows == [*"01234567"], lines  # drawn in place: each rank once
    assert [line.split()[4] for line in (shown[2], shown[7])] == ["37%", "0%"] and shown[7].endswith("!")
    assert "".join(shown[2:10]).count("█") >= 1  # of all losses, the highest
    finish(tmp_path / "eight", 8)
    ended = screen.wait_for("eight: finished, 8 ranks")
    assert "eight: no longer watched" in ended and max(map(len, ended.splitlines())) <= 80
