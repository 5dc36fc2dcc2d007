"""Starting the fork server: what this process must not lose meanwhile."""

import signal

import pytest

from ddp_lib.processes.forkserver import _block_stop_signals


def test_ctrl_c_while_the_server_starts_is_not_lost():
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), _block_stop_signals():
            signal.raise_signal(signal.SIGINT)  # to this thread: another would take it at any time
        assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    finally:
        signal.signal(signal.SIGINT, handler)
