"""UserError: a mistake that the reader can correct."""


class UserError(Exception):
    """A problem that the reader can solve. Its text is one line that names the value and the cure. Entry
    points print that line without a traceback and exit with status 2."""


class PeerError(UserError):
    """Another rank's UserError, heard from it."""


def first_line(error: BaseException) -> str:
    """The first line of another library's exception, cut to 160 characters; its type if it is empty."""
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__


# What gloo and NCCL say on the ranks that survive when a peer is gone, or silent: a consequence of another
# rank's failure.
PEER_GONE = ("Connection closed by peer", "Connection reset", "Broken pipe", "remote process")
_TIMED_OUT = ("Timed out waiting", "timed out", "Timeout", "Application timeout")


def is_peer_gone(error: BaseException) -> bool:
    """Whether a collective failed because another rank has left or died."""
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in PEER_GONE)


def is_timeout(error: BaseException) -> bool:
    """Whether a collective failed because another rank did not come."""
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _TIMED_OUT)
