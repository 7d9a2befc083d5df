"""Which implementations exist, and which one a call gets.

An implementation is a module with four functions and no public name of its own:

    selective_log_softmax(logits (..., V), index (...), transform, *, return_entropy, row_mask) -> logps, entropy|None
    linear_selective_log_softmax(hidden (n, H), weight (V, H), bias (V,)|None, index (n,), transform, *,
                                 return_entropy, row_mask) -> logps (n,), entropy (n,)|None
    grpo_loss(logits (B, T, V) | (n, V), batch, config, num_items_in_batch, *, inplace)
        -> loss (), logps (n,), entropy (n,), metrics
    linear_grpo_loss(hidden (n, H), weight (V, H), bias (V,)|None, batch, config, num_items_in_batch)
        -> loss (), logps (n,), entropy (n,), metrics

and, if it cannot always run, `unavailable_reason(device_type: str | None) -> str | None`: one sentence saying what is
missing and what to do (None = it can run; device_type None asks about the machine in general). Inputs arrive
validated; rows as `TokenBatch` describes. Adding one is a name in NAMES, an import in `_module`, and its place in
`choose_impl`.
"""

import functools
import logging
import os
import warnings
from collections.abc import Callable
from types import ModuleType

import torch

ENVIRONMENT_VARIABLE = "IGRPO_KERNELS_IMPL"
NAMES = ("torch", "triton", "cuda", "cpu")

# Compute capabilities on which a record in benchmarks/results/ shows impl="cuda" right, and faster than "triton".
# Elsewhere it runs by name only.
PROVEN_CUDA_CAPABILITIES: frozenset[tuple[int, int]] = frozenset()

_logger = logging.getLogger(__name__)


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
) -> ModuleType:
    """The module that serves a call with `impl=` on tensors of this device type and dtype, V columns wide.

    "auto" is `choose_impl`; the environment variable IGRPO_KERNELS_IMPL replaces "auto" only. Raises ValueError for an
    unknown name, RuntimeError with the reason for an unavailable one.
    """
    # While a graph is traced V may be a symbol.
    return _module(_resolve(impl, device_type, dtype, None if torch.compiler.is_compiling() else vocab_size))


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


def _module(name: str) -> ModuleType:
    """Imported on first use; written out, because torch.compile follows import statements only."""
    if name == "torch":
        from igrpo_kernels import reference as module
    elif name == "triton":
        from igrpo_kernels import triton_impl as module
    elif name == "cuda":
        from igrpo_kernels import cuda_ops as module
    else:
        from igrpo_kernels import cpu_ops as module
    return module


@functools.cache
def _tell_once(device_type: str, impl: str, reason: str) -> None:
    """The first time: plain PyTorch where kernels could have run is a warning, any other choice a line in the log."""
    if impl == "torch" and "cannot run" in reason:
        warnings.warn(
            f"impl='auto' computes in plain PyTorch on {device_type} tensors, several times slower than the kernels: "
            f"{reason}",
            RuntimeWarning,
            stacklevel=2,
        )
    else:
        _logger.info("impl='auto' uses %r on %s tensors: %s", impl, device_type, reason)


def _unavailable_reason(name: str, device_type: str | None) -> str | None:
    try:
        module = _module(name)
    except (ImportError, OSError) as error:  # reported to the caller, who asked for exactly this
        return f"impl={name!r} cannot be imported ({error}); install what it needs or use impl='torch'"
    check = getattr(module, "unavailable_reason", None)
    return None if check is None else check(device_type)
