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
validated; rows as `TokenBatch` describes. Adding one is a line in `_MODULES` and its place in `_AUTO_ORDER`.
"""

import functools
import importlib
import logging
import os
from types import ModuleType

ENVIRONMENT_VARIABLE = "IGRPO_KERNELS_IMPL"

_logger = logging.getLogger(__name__)

_MODULES: dict[str, str | None] = {  # name -> module imported on first use; None = not part of this version
    "torch": "igrpo_kernels.reference",
    "triton": "igrpo_kernels.triton_impl",
    "cuda": "igrpo_kernels.cuda_ops",
    "cpu": "igrpo_kernels.cpu_ops",
}
_AUTO_ORDER: dict[str, tuple[str, ...]] = {  # device type -> preference
    # "cuda" goes first once a record in benchmarks/results/ shows it on a device; until then it is by name only.
    "cuda": ("triton", "torch"),
    "cpu": ("cpu", "torch"),
}


def available_impls() -> dict[str, str]:
    """Every implementation name -> "available", or the reason it is not and what to do about it."""
    return {name: _unavailable_reason(name, None) or "available" for name in _MODULES}


def resolve_impl(impl: str, device_type: str) -> ModuleType:
    """The module that serves a call with `impl=` on tensors of this device type.

    "auto" takes the first available one of the device's preference; the environment variable IGRPO_KERNELS_IMPL
    replaces "auto" only. Raises ValueError for an unknown name, RuntimeError with the reason for an unavailable one.
    """
    if impl == "auto":
        impl = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
        source = f"{ENVIRONMENT_VARIABLE}={impl!r}"
    else:
        source = f"impl={impl!r}"
    if impl == "auto":
        order = _AUTO_ORDER.get(device_type, ("torch",))
        impl = next(name for name in order if _unavailable_reason(name, device_type) is None)
        if impl != order[0]:
            _log_fallback(device_type, impl)
    if impl not in _MODULES:
        raise ValueError(f"{source} is unknown; choose 'auto' or one of {', '.join(map(repr, _MODULES))}")
    reason = _unavailable_reason(impl, device_type)
    if reason is not None:
        raise RuntimeError(f"{source} is not available: {reason}")
    return importlib.import_module(_MODULES[impl])


@functools.cache
def _log_fallback(device_type: str, impl: str) -> None:
    """One line the first time "auto" cannot have its first choice: a slower path must not be taken silently."""
    reasons = "; ".join(
        f"{name!r}: {_unavailable_reason(name, device_type)}"
        for name in _AUTO_ORDER[device_type][: _AUTO_ORDER[device_type].index(impl)]
    )
    _logger.warning("impl='auto' uses %r on %s tensors, because %s", impl, device_type, reasons)


def _unavailable_reason(name: str, device_type: str | None) -> str | None:
    path = _MODULES[name]
    if path is None:
        return "it is not built in this version of igrpo_kernels; use impl='torch' or impl='auto'"
    try:
        module = importlib.import_module(path)
    except ImportError as error:  # reported to the caller, who asked for exactly this
        return f"{path} cannot be imported ({error}); install what it needs or use impl='torch'"
    check = getattr(module, "unavailable_reason", None)
    return None if check is None else check(device_type)
