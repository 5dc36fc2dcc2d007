"""What NCCL, CUDA and torch.compile say, translated."""

import pytest
import torch
from torch._dynamo.exc import TorchRuntimeError
from torch._inductor.exc import InductorError, InvalidCxxCompiler

from ddp_lib.errors import gpu_cause, limit_reached
from ddp_lib.training.ddp import compile_cure

# As torch formats it; the last line is NCCL's own.
NCCL = """NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.cpp:77, unhandled system error (run with \
NCCL_DEBUG=WARN for details), NCCL version 2.27.5
ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error.
Last error:
{}
"""
SAME_GPU = "Multiple Ranks are using the same GPU/Partition. Set NCCL_MULTI_RANK_GPU_ENABLE=1 to enable it."
SAID = {
    SAME_GPU: "one rank per GPU",  # from NCCL 2.30 on
    "Mismatched NCCL version detected : rank 0 version 22705 rank 1 version 23007": "the same torch",
    "Duplicate GPU detected : rank 0 and rank 1 both on CUDA device c1000": "one rank per GPU",
    "Error while creating shared memory segment /dev/shm/nccl-a1 (size 9637888)": "--shm-size",
    "Cuda failure 35 'CUDA driver version is insufficient for CUDA runtime version'": "driver is too old",
    "Bootstrap : no socket interface found": "NCCL_SOCKET_IFNAME",
    "Cuda failure 2 'out of memory'": "the GPU is full",
    "Call to ibv_reg_mr failed with error Cannot allocate memory": "locked memory",
    "socketStartConnect: Connect to 10.0.0.2<4711> failed : Connection refused": "open all ports",
    "socketProgress: Connection closed by remote peer m1<4711>": "another rank ended first",
    "Call to open failed: Too many open files": "ulimit -n",
    "Call to bind failed: Address already in use": "NCCL_DEBUG=WARN",
}


@pytest.mark.parametrize(("said", "cure"), SAID.items())
def test_the_last_line_of_nccl_is_kept_and_translated(said, cure):
    cause = gpu_cause(NCCL.format(said))
    assert cause[0] == said and cure in cause[1]
    assert not limit_reached(RuntimeError(NCCL.format(said)))


@pytest.mark.parametrize(
    ("text", "cause", "cure"),
    [
        (NCCL.partition("\n")[0], "unhandled system error", "NCCL_DEBUG=WARN"),
        ("CUDA out of memory. Tried to allocate 2.00 GiB.", "CUDA out of memory", "lower the batch size"),
        ("The NVIDIA driver on your system is too old (found 11040).", "The NVIDIA driver", "update it"),
        ("CUDA error: device-side assert triggered\nCUDA kernel errors", "device-side", "a label"),
        ("CUDA error: an illegal memory access", "illegal memory", "nvidia-smi"),
    ],
)
def test_what_has_no_last_line(text, cause, cure):
    found = gpu_cause(text)
    assert cause in found[0] and cure in found[1]


@pytest.mark.parametrize(
    "text", ["", "Connection refused", "bad\nNCCL error: /dev/shm", "WorkNCCL(SeqNum=1)"]
)
def test_other_texts_are_left_alone(text):
    assert gpu_cause(text) is None


COMPILING = {
    "no compiler": (InductorError(InvalidCxxCompiler("g++-99"), None), "install a C++ compiler"),
    "no C compiler for triton": (
        InductorError(RuntimeError("Failed to find C compiler."), None),
        "C++ compiler",
    ),
    "no triton": (InductorError(RuntimeError("Cannot find a working triton"), None), "install the triton"),
    "the model": (TorchRuntimeError("Dynamo failed to run FX node"), "leave the flag out"),
    "too little memory": (torch.OutOfMemoryError("CUDA out of memory"), None),
    "too little memory inside": (InductorError(torch.OutOfMemoryError("CUDA out of memory"), None), None),
    "a lost peer": (RuntimeError("Connection closed by peer [10.0.0.2]:4711"), None),
    "the model's own": (RuntimeError("shape '[3]' is invalid"), None),
}


@pytest.mark.parametrize(("error", "cure"), COMPILING.values(), ids=COMPILING)
def test_only_a_failure_to_compile_is_one(error, cure):
    found = compile_cure(error)
    assert found == cure or cure in found
