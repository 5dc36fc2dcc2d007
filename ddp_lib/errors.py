"""UserError: a mistake that the reader can correct."""

import re

# Exit statuses, by which a job scheduler decides: see README. 75 is EX_TEMPFAIL of sysexits.h.
WILL_FAIL_AGAIN, MAY_PASS = 2, 75


class UserError(Exception):
    """A problem that the reader can solve. Its text is one line that names the value and the cure. Entry
    points print that line without a traceback and exit with its status."""

    status = WILL_FAIL_AGAIN

    def _render_traceback_(self) -> list[str]:
        """For IPython: the line, without the stack of this package."""
        return [f"{type(self).__name__}: {self}"]


class TransientError(UserError):
    """A problem that may be gone at the next start: a peer that is late, a link that is down, a full disk."""

    status = MAY_PASS


class PeerError(UserError):
    """Another rank's UserError, heard from it, with its status."""

    def __init__(self, text: str, status: int = WILL_FAIL_AGAIN) -> None:
        super().__init__(text)
        self.status = status


LONGEST_S = 1_000_000


def require_seconds(name: str, seconds: float) -> None:
    """UserError, which says `name`, unless this timeout is above 0 and at most eleven days: the system counts
    some timeouts in milliseconds, in 32 bits."""
    if not (isinstance(seconds, (int, float)) and 0 < seconds <= LONGEST_S):
        raise UserError(f"{name} is {seconds!r}: give a number of seconds above 0, up to {LONGEST_S}")


NO_SHM = "/dev/shm has no room or cannot be written: in a container, give --shm-size 1g"
# Limits of the system or of the user: what Python and torch say when one is reached, and what to do. First
# stands the errno's own text, as os.strerror and C++ give it.
_LIMITS = (
    (("Too many open files",), "too many open files: raise `ulimit -n`, or start fewer ranks or workers"),
    (
        ("Resource temporarily unavailable", "can't start new thread", "unable to start watchdog thread"),
        "no more processes or threads: raise `ulimit -u` or the container's limit of pids, or start fewer "
        "ranks or workers",
    ),
    (
        ("Cannot allocate memory", "can't allocate memory", "MemoryError", "bad_alloc", "map segment"),
        "the memory cannot be had: take a smaller batch, fewer ranks or workers, or raise `ulimit -v`",
    ),
    (("File too large",), "a file may not be so large: raise `ulimit -f`"),
    (
        ("unable to allocate shared memory", "unable to open shared memory", "torch_shm_manager"),
        NO_SHM,
    ),
)


def text_of(error: BaseException) -> str:
    """What the exception says; empty if that cannot be had, as of somebody's own class."""
    try:
        return str(error)
    except Exception:
        return ""


def limit_reached(error: BaseException) -> str:
    """The limit of the system that this exception, or the one it came from, met, and the cure; empty if it
    is none, or a GPU's (see `gpu_cause`)."""
    if gpu_cause(text_of(error)):
        return ""
    texts: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(texts) < 10:
        texts.append(f"{type(cause).__name__}: {text_of(cause)}"[:2000])
        cause = cause.__cause__ or cause.__context__
    lines = (line for signs, line in _LIMITS for text in texts if any(sign in text for sign in signs))
    return next(lines, "")


def first_line(error: BaseException) -> str:
    """The first line of another library's exception, cut to 160 characters; its type if it is empty."""
    lines = text_of(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__


# What gloo and NCCL say on the ranks that survive when a peer is gone, or silent: a consequence of another
# rank's failure.
PEER_GONE = (
    "Connection closed by peer",
    "Connection reset",
    "Broken pipe",
    "remote process",
    "ncclRemoteError",
    "NCCL communicator was aborted",
    "Connection was likely closed",
    "Connection closed by remote peer",
    "connectFullMesh failed",
)
_TIMED_OUT = (
    "Timed out",
    "timed out",
    "Timeout",
    "Application timeout",
    "wait timeout",
    "Wait timeout",
    "Watchdog caught collective",
)


def lost_a_peer(text: str) -> bool:
    """Whether this is what torch says when another rank has left, died or does not come."""
    return any(sign in text for sign in (*PEER_GONE, *_TIMED_OUT))


def is_peer_gone(error: BaseException) -> bool:
    """Whether a collective failed because another rank has left or died."""
    return isinstance(error, RuntimeError) and any(sign in text_of(error) for sign in PEER_GONE)


def is_timeout(error: BaseException) -> bool:
    """Whether a collective failed because another rank did not come."""
    return isinstance(error, RuntimeError) and any(sign in text_of(error) for sign in _TIMED_OUT)


# What NCCL and CUDA say, the most telling signs first, and the cure.
_GPU_CURES = (
    (
        "[Dd]uplicate GPU|Multiple Ranks are using the same GPU",
        "two ranks have taken one GPU, or slices of one (MIG): start one rank per GPU, and set LOCAL_RANK if "
        "you start the ranks yourself; slices need NCCL 2.30 or newer and NCCL_MULTI_RANK_GPU_ENABLE=1",
    ),
    ("[Mm]ismatched NCCL version|NCCL version mismatch", "install the same torch on every machine"),
    (
        r"/dev/shm|shared memory|fallocate|No space left",
        "/dev/shm is too small: in a container give --shm-size 1g or more, in Kubernetes mount an emptyDir "
        "with medium: Memory there",
    ),
    (
        "driver version is insufficient|driver on your system is too old|Insufficient driver|unsupported PTX",
        "the NVIDIA driver is too old for this torch: update it, or install a torch for an older CUDA",
    ),
    (
        "no (socket )?interface found|No (usable listening|IP) interface found",
        "NCCL finds no network interface: correct NCCL_SOCKET_IFNAME and NCCL_IB_HCA, or unset them",
    ),
    ("Too many open files", "raise `ulimit -n`, or start fewer ranks"),
    ("out of memory", "the GPU is full: end what else runs there (nvidia-smi), or lower the batch size"),
    (
        "ibv_reg_mr|memlock",
        "InfiniBand needs locked memory: ulimit -l unlimited; in Docker --ulimit memlock=-1",
    ),
    (
        "Connection (refused|timed out)|No route to host|[Cc]onnect to .* failed",
        "open all ports between the machines, and set NCCL_SOCKET_IFNAME to the interface that joins them",
    ),
    ("remote process|ncclRemoteError|by (remote )?peer", "another rank ended first: look at its output"),
    ("NCCL error|nccl[A-Z]", "start again with NCCL_DEBUG=WARN: NCCL then prints what failed"),
    (
        "device-side assert",
        "an index is out of range, such as a label: CUDA_LAUNCH_BLOCKING=1 shows the line",
    ),
    ("invalid device ordinal", "there is no GPU of this number here: take cuda:LOCAL_RANK, or world.device"),
    ("CUDA error|Cuda failure", "the GPU or its driver fails: look at nvidia-smi, and at dmesg for Xid"),
)


def gpu_cause(text: str) -> tuple[str, str] | None:
    """What NCCL or CUDA failed of, and the cure, from the text of torch's exception; None if it is another's.

    torch puts the cause last, behind "Last error:", below lines that are the same for many causes.
    """
    lines = [line.strip() for line in text.strip().splitlines()[:20]]
    if not lines or not re.search("NCCL|nccl|CUDA|Cuda|NVIDIA", lines[0]):
        return None
    cure = next((cure for sign, cure in _GPU_CURES if re.search(sign, "\n".join(lines))), None)
    if cure is None:
        return None
    last = next((number for number, line in enumerate(lines) if line.endswith("Last error:")), len(lines))
    # Without it, the first line says at least which kind, such as unhandled system error.
    told = next(filter(None, lines[last + 1 :]), re.sub(r"^.*NCCL error in: [^,]*, ", "", lines[0]))
    return told[:200], cure
