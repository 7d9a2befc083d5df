"""The table of implementations, and which one a call gets.

`impl="torch"` is the reference (`reference.py`). The others are row kernels (`row_kernels.py`) under the fused losses
of `fused_loss.py` and `fused_linear_autograd.py`: in C++ on the CPU, in CUDA C++, in Triton. Adding one is a row in
`IMPLS` and its place in `choose_impl`.
"""

import functools
import logging
import os
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch

from igrpo_kernels.compiled_rows import CompiledRows, missing_library
from igrpo_kernels.row_kernels import RowKernels

ENVIRONMENT_VARIABLE = "IGRPO_KERNELS_IMPL"
_OLDEST_CAPABILITY = (8, 0)  # that the CUDA kernels are compiled for

# Compute capabilities on which a record in benchmarks/results/ shows impl="cuda" right, and faster than "triton".
# Elsewhere it runs by name only.
PROVEN_CUDA_CAPABILITIES: frozenset[tuple[int, int]] = frozenset()

_logger = logging.getLogger(__name__)


class Implementation(NamedTuple):
    """What stands behind a name."""

    kernels: Callable[[], RowKernels | None]
    """None = the reference computes. Called at the first use, since importing Triton takes its time."""

    unavailable_reason: Callable[[str | None], str | None]
    """Why it cannot serve tensors of a device type (None: this machine at all), and what to do; None = it can."""

    fp64: bool
    """Whether it computes in fp64; fp64 input asks for the reference's accuracy, and otherwise gets the reference."""


def available_impls() -> dict[str, str]:
    """Every implementation name -> "available", or the reason it is not and what to do about it."""
    return {name: _unavailable_reason(name, None) or "available" for name in NAMES}


def choose_impl(
    device_type: str,
    *,
    unavailable: Callable[[str], str | None],  # name -> why it cannot run on this device, None = it can
    capability: tuple[int, int] | None = None,  # of a CUDA device
    dtype: torch.dtype | None = None,  # of logits or hidden states
    vocab_size: int | None = None,
    proven: frozenset[tuple[int, int]] = PROVEN_CUDA_CAPABILITIES,
) -> tuple[str, str]:
    """What impl="auto" means: a name, and the reason for it in words. Looks at nothing but its arguments."""
    if device_type == "cpu":
        if dtype == torch.float64:
            return "torch", "fp64 asks for the reference's accuracy"
        missing = unavailable("cpu")
        return ("cpu", "the C++ kernels are built") if missing is None else ("torch", f"'cpu' cannot run: {missing}")
    if device_type != "cuda":
        return "torch", f"there are no kernels for {device_type} devices"
    reason = _against_cuda(unavailable("cuda"), capability, dtype, vocab_size, proven)
    if reason is None:
        return "cuda", "the row stays on chip, which a record on this compute capability shows to be faster"
    missing = unavailable("triton")
    if missing is None:
        return "triton", f"'cuda' is not chosen: {reason}"
    return "torch", f"'cuda' is not chosen: {reason}; 'triton' cannot run: {missing}"


def _against_cuda(
    unavailable: str | None,
    capability: tuple[int, int] | None,
    dtype: torch.dtype | None,
    vocab_size: int | None,
    proven: frozenset[tuple[int, int]],
) -> str | None:
    if unavailable is not None:
        return unavailable
    if capability not in proven:
        return f"no record in benchmarks/results/ shows it on compute capability {capability}"
    if dtype == torch.float64:
        return "it computes in fp32"
    if vocab_size is None or dtype is None:
        return None  # not known yet; too long a row is still right, only read twice
    share = on_chip_share(capability, vocab_size * dtype.itemsize)
    if share < 0.5:  # what is not on chip is read twice: 5 B/logit at a half, against at most 6
        return f"only {share:.0%} of a row of {vocab_size * dtype.itemsize} bytes stays on chip"
    return None


def on_chip_share(capability: tuple[int, int], row_bytes: int) -> float:
    """How much of a row the CUDA kernels keep on chip, 0 to 1 (csrc/cuda/launch.cuh decides exactly).

    sm_90 and later: two rows in flight in the shared memory of a cluster of 8 blocks, 227 KiB each. Before: 160 KiB of
    one block's shared memory and 144 KiB of its registers.
    """
    if capability >= (9, 0):
        return 1.0 if 2 * row_bytes <= 8 * 227 * 1024 else 0.0
    return min(1.0, (160 + 144) * 1024 / row_bytes)


def resolve_impl(
    impl: str, device_type: str, dtype: torch.dtype | None = None, vocab_size: int | None = None
) -> RowKernels | None:
    """The row kernels that serve a call with `impl=` on tensors of this device type and dtype, V columns wide.

    None = the reference. "auto" is `choose_impl`; the environment variable IGRPO_KERNELS_IMPL replaces "auto" only.
    Raises ValueError for an unknown name, RuntimeError with the reason for an unavailable one.
    """
    # While a graph is traced V may be a symbol.
    name = _resolve(impl, device_type, dtype, None if torch.compiler.is_compiling() else vocab_size)
    return None if dtype == torch.float64 and not IMPLS[name].fp64 else IMPLS[name].kernels()


def _resolve(impl: str, device_type: str, dtype: torch.dtype | None, vocab_size: int | None) -> str:
    source = f"impl={impl!r}"
    if impl == "auto" and os.environ.get(ENVIRONMENT_VARIABLE):
        impl = os.environ[ENVIRONMENT_VARIABLE]
        source = f"{ENVIRONMENT_VARIABLE}={impl!r}"
    if impl == "auto":
        capability = torch.cuda.get_device_capability() if device_type == "cuda" and torch.cuda.is_available() else None
        impl, reason = choose_impl(
            device_type,
            unavailable=lambda name: _unavailable_reason(name, device_type),
            capability=capability,
            dtype=dtype,
            vocab_size=vocab_size,
        )
        _tell_once(device_type, impl, reason)
        return impl
    if impl not in NAMES:
        raise ValueError(f"{source} is unknown; choose 'auto' or one of {', '.join(map(repr, NAMES))}")
    reason = _unavailable_reason(impl, device_type)
    if reason is not None:
        raise RuntimeError(f"{source} is not available: {reason}")
    return impl


# A graph settles it once, while it is traced. torch.compiler.assume_constant_result does just this, but importing it
# imports all of torch.compile and Triton's compiler.
_resolve._dynamo_marked_constant = True


@functools.cache
def _tell_once(device_type: str, impl: str, reason: str) -> None:
    """The first time: plain PyTorch where kernels could have run, or a library that is there but of other sources or
    another torch, is a warning, any other choice a line in the log."""
    if impl == "torch" and "cannot run" in reason:
        said = (
            f"impl='auto' computes in plain PyTorch on {device_type} tensors, several times slower than the kernels: "
            f"{reason}"
        )
    elif "builds it again" in reason:
        said = f"impl='auto' uses {impl!r} on {device_type} tensors: {reason}"
    else:
        _logger.info("impl='auto' uses %r on %s tensors: %s", impl, device_type, reason)
        return
    warnings.warn(said, RuntimeWarning, stacklevel=2)


def _unavailable_reason(name: str, device_type: str | None) -> str | None:
    try:
        IMPLS[name].kernels()
    except (ImportError, OSError) as error:  # reported to the caller, who asked for exactly this
        return f"impl={name!r} cannot be imported ({error}); install what it needs or use impl='torch'"
    return IMPLS[name].unavailable_reason(device_type)


def _triton_unavailable(device_type: str | None) -> str | None:
    if device_type not in (None, "cpu", "cuda"):
        return f"the Triton kernels run on CUDA devices, not on {device_type}; use impl='torch'"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device_type == "cpu" and not interpreted:
        return "on CPU tensors Triton only runs interpreted: start Python with TRITON_INTERPRET=1, or use impl='torch'"
    if device_type is None and not interpreted and not torch.cuda.is_available():
        return "there is no CUDA device; start Python with TRITON_INTERPRET=1 to run interpreted, or use impl='torch'"
    return None


def _cuda_unavailable(device_type: str | None) -> str | None:
    if device_type not in (None, "cuda"):
        return f"it works on CUDA tensors, not on {device_type} ones; use impl='cpu' or impl='torch'"
    if torch.version.cuda is None:
        return "this torch is built without CUDA; install a CUDA build of torch, or use impl='cpu' or impl='torch'"
    if not torch.cuda.is_available():
        return "there is no CUDA device; use impl='cpu' or impl='torch'"
    if torch.cuda.get_device_capability() < _OLDEST_CAPABILITY:
        return "it needs compute capability 8.0 or newer; use impl='triton' or impl='torch'"
    # The operators' schemas come with the CPU library.
    return missing_library("_C_cpu") or missing_library("_C_cuda")


def _cpu_unavailable(device_type: str | None) -> str | None:
    if device_type not in (None, "cpu"):
        return f"it works on CPU tensors, not on {device_type} ones; use impl='triton', 'cuda' or 'torch'"
    return missing_library("_C_cpu")


def _triton_kernels() -> RowKernels:
    from igrpo_kernels.triton_rows import TRITON  # here, because triton is heavy, and a CPU user need not have it

    return TRITON


_CPU, _CUDA = CompiledRows("cpu"), CompiledRows("cuda")
IMPLS = {
    "torch": Implementation(lambda: None, lambda _: None, fp64=True),
    "triton": Implementation(_triton_kernels, _triton_unavailable, fp64=True),
    "cuda": Implementation(lambda: _CUDA, _cuda_unavailable, fp64=False),
    "cpu": Implementation(lambda: _CPU, _cpu_unavailable, fp64=False),
}
NAMES = tuple(IMPLS)
