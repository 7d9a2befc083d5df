"""What a program does to a GPU, written down while it runs on fake tensors: memory, host waits, collectives.

    trace = DeviceTrace()
    with FakeGPUMode(), trace:
        with trace.phase("step"):
            ...
    trace.phases["step"].peak                  bytes; .alive: by the line that allocated them
    trace.phases["step"].waits                 (what, line) -> times that the host had to wait for the device
    trace.phases["step"].collectives           operation -> Traffic(calls, bytes)

Tensors on the CPU are real, except inside ``fake_weights``, so that plans and lengths have their values. What a fake
tensor cannot answer is answered here: numbers are 0, ``nonzero`` finds everything. Memory counts live storages as the
caching allocator rounds them; its fragmentation, CUDA's context and what kernels take inside are not seen.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.distributed._tools.fake_collectives import CollectiveOp, collective_ops, sync_ops
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import igrpo
import igrpo_kernels

aten = torch.ops.aten
SIZED_BY_VALUES = {
    aten.nonzero.default, aten.masked_select.default, aten.unique_dim.default, aten._unique2.default,
    aten.unique_consecutive.default, aten.bincount.default,
}  # fmt: skip
"""The host waits, because the result's size is on the device."""
ROUND = 512
"""Bytes that torch's allocator rounds to."""
HERE = str(Path(__file__).parent)
PACKAGES = [Path(module.__file__ or "").parent for module in (igrpo, igrpo_kernels)]


@dataclass(frozen=True)
class Traffic:
    calls: int
    bytes: int


@dataclass
class Phase:
    """Of one part of a run."""

    peak: int = 0
    alive: Counter[str] = field(default_factory=Counter)
    """Bytes at the peak by the line that allocated them."""
    held: int = 0
    """Bytes when the phase ended."""
    waits: Counter[tuple[str, str]] = field(default_factory=Counter)
    collectives: dict[str, Traffic] = field(default_factory=dict)


class DeviceTrace(TorchDispatchMode):
    """Put it inside a ``FakeGPUMode`` within ``fake_gpus``."""

    def __init__(self) -> None:
        super().__init__()
        self.phases: dict[str, Phase] = {}
        self._fake_cpu = False
        self.current = 0
        self._alive: Counter[str] = Counter()
        self._storages: dict[int, tuple[int, str]] = {}
        self._owner = ""
        self._phase = self.phases.setdefault("", Phase())

    @contextmanager
    def phase(self, name: str) -> Iterator[Phase]:
        """What happens inside counts for ``name``, and for no phase around it."""
        before, self._phase = self._phase, self.phases.setdefault(name, Phase())
        self._see_peak()
        try:
            yield self._phase
        finally:
            self._phase.held = self.current
            self._phase = before

    def owned(self, name: str) -> Any:
        """What is allocated inside, or in a function that it decorates, is called ``name``, not by its line."""
        return patch.object(self, "_owner", name)

    def fake_weights(self) -> Any:
        """Inside, or in a function that it decorates, new tensors on the CPU are fake as well."""
        return patch.object(self, "_fake_cpu", True)

    def move(self, tensor: torch.Tensor, device: torch.device) -> None:
        """A fake tensor to another device in place, which ``Module.to`` and FSDP do through ``.data``."""
        if isinstance(tensor, FakeTensor) and tensor.device.type not in (device.type, "meta"):
            tensor.fake_device = torch.device(device.type, 0)
            self._allocated(tensor)

    def wait(self, what: str) -> None:
        self._phase.waits[what, _line()] += 1

    def __enter__(self) -> DeviceTrace:
        self._kept = (torch.UntypedStorage.resize_, FakeTensor.tolist)
        torch.UntypedStorage.resize_ = self._resizing(self._kept[0])
        FakeTensor.tolist = self._listing(self._kept[1])
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_, FakeTensor.tolist = self._kept
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # first into what this process has of it
        leaves = tree_leaves((args, kwargs))
        fakes = [x for x in leaves if isinstance(x, FakeTensor)]
        target = kwargs.get("device")
        to_cpu = target is None or torch.device(target).type == "cpu"
        if not fakes and to_cpu and not self._fake_cpu:
            with unset_fake_temporarily():
                if not kwargs.get("pin_memory"):
                    return func(*args, **kwargs)
                out = func(*args, **{**kwargs, "pin_memory": None})  # no CUDA that could pin it
                out.rehearsed_as_pinned = True
                return out
        if func is aten._pin_memory.default:
            args[0].rehearsed_as_pinned = True
            return args[0]
        on_gpu = bool(fakes) and any(x.device.type == "cuda" for x in fakes)
        out = self._answer(func, args, kwargs) if on_gpu else NotImplemented
        if out is NotImplemented:
            out = func(*args, **kwargs)
        if on_gpu or not to_cpu:
            self._note(func, args, kwargs, out)
            for tensor in tree_leaves(out):
                if isinstance(tensor, FakeTensor) and tensor.device.type == "cuda":
                    self._allocated(tensor)
        return out

    def _answer(self, func: Any, args: Any, kwargs: Any) -> Any:
        """For operations that need values; NotImplemented where shapes are enough."""
        first = args[0] if args else None
        if func is aten._local_scalar_dense.default:
            self.wait("a number read (.item, float, bool)")
            return False if first.dtype == torch.bool else 0.0 if first.is_floating_point() else 0
        if func is aten.equal.default:
            self.wait("torch.equal")
            return True
        if func in SIZED_BY_VALUES:
            self.wait(func.overloadpacket.__name__)
            if func is aten.nonzero.default:
                return torch.empty(first.numel(), max(first.dim(), 1), dtype=torch.int64, device=first.device)
        if func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
            self.wait("repeat_interleave without output_size")
        if func is aten.addmm.dtype_out:
            return kwargs["out"]
        return NotImplemented

    def _note(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        if func in collective_ops and func not in sync_ops:
            name = func.overloadpacket.__name__.strip("_")
            before = self._phase.collectives.get(name, Traffic(0, 0))
            size = CollectiveOp.get_comm_tensor_size(func, out, args, kwargs)
            self._phase.collectives[name] = Traffic(before.calls + 1, before.bytes + size)
        elif func is aten._to_copy.default or func is aten.copy_.default:
            source, result = (args[0], out) if func is aten._to_copy.default else (args[1], args[0])
            if isinstance(source, torch.Tensor) and source.device.type != result.device.type:
                asked = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
                pinned = getattr(source, "rehearsed_as_pinned", False)
                if not (asked and (source.device.type == "cuda" or pinned)):
                    self.wait(f"a copy from {_name(source)} to {_name(result)}")

    def _allocated(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._storages or _line() is _PLANNING:
            return
        self._storages[storage._cdata] = (0, "")
        self._change(storage._cdata, storage.nbytes())
        weakref.finalize(storage, self._freed, storage._cdata)

    def _change(self, key: int, nbytes: int) -> None:
        before, by = self._storages[key]
        size = -(-nbytes // ROUND) * ROUND
        if not before and size:
            by = self._owner or _line()
        self._storages[key] = (size, by)
        self.current += size - before
        self._alive[by] += size - before
        self._see_peak()

    def _freed(self, key: int) -> None:
        size, by = self._storages.pop(key)
        self.current -= size
        self._alive[by] -= size

    def _see_peak(self) -> None:
        if self.current > self._phase.peak:
            # A copy of the table at each new peak would be most of the work; within 0.1 % it is the same peak.
            if self.current > 1.001 * self._phase.alive.total():
                self._phase.alive = +self._alive
            self._phase.peak = self.current

    def _resizing(self, resize: Callable[..., Any]) -> Callable[..., Any]:
        """FSDP frees what it has gathered, and takes it back, by resizing its storage."""

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            out = resize(storage, size)
            if storage._cdata in self._storages:
                self._change(storage._cdata, size)
            return out

        return resize_

    def _listing(self, tolist: Callable[..., Any]) -> Callable[..., Any]:
        def one_wait(tensor: torch.Tensor) -> Any:
            if tensor.device.type != "cuda":
                return tolist(tensor)
            self.wait("tolist")
            zero = False if tensor.dtype == torch.bool else 0.0 if tensor.is_floating_point() else 0
            return torch.utils._pytree.tree_map(lambda _: zero, _nested(list(tensor.shape)))

        return one_wait


def _nested(shape: list[int]) -> Any:
    return [_nested(shape[1:]) for _ in range(shape[0])] if shape else 0


def _name(tensor: torch.Tensor) -> str:
    return "the GPU" if tensor.device.type == "cuda" else "the computer's memory"


_PLANNING = "shapes that DTensor works out"


def _line() -> str:
    """The project's innermost line on the stack, or the library's; backward passes run by C++ have none."""
    frame: FrameType | None = sys._getframe(2)
    found = {"fsdp": "", "own": "", "library": ""}
    while frame is not None:
        kind, file = _kind(frame.f_code.co_filename)
        if kind == "planning":
            return _PLANNING
        if kind == "fsdp":
            found["fsdp"] = found["fsdp"] or f"FSDP2, {frame.f_code.co_name}"
        elif kind and not found["own"]:
            found[kind] = found[kind] or f"{file}:{frame.f_lineno} ({frame.f_code.co_name})"
        frame = frame.f_back
    if found["fsdp"] or found["own"] or found["library"]:
        return found["fsdp"] or " < ".join(part for part in (found["own"], found["library"]) if part)
    node = torch._C._current_autograd_node()
    return f"backward, {node.name()}" if node is not None else "torch"


@functools.cache
def _kind(file: str) -> tuple[str, str]:
    """Whose code a file is, and what to call it."""
    if file.endswith(("_sharding_prop.py", "_op_schema.py")):
        return "planning", ""
    for package in PACKAGES:
        if file.startswith(f"{package}/"):
            return "" if file.startswith(HERE) else "own", package.name + file.removeprefix(str(package))
    if "/torch/" in file:
        return "fsdp" if "/fsdp/" in file else "", ""
    _, installed, short = file.rpartition("site-packages/")
    return "library" if installed else "", short
