"""GPUs that are not there: fake tensors whose device is ``cuda``, on a torch without CUDA, in a process group of one.

    with fake_gpus(count=8, memory=80 * 2**30):
        ...                                    ``FakeGPUMode`` works on "cuda"; collectives are answered at once

Sizes, dtypes and devices are right, values are not there. What Python asks of ``torch.cuda`` is answered here, what
autograd asks in C++ by ``fake_gpu.cpp`` (``fake_gpu_library.load``, before torch is imported).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

CAPABILITY = (8, 0)


class FakeGPUMode(FakeTensorMode):
    """``FakeTensorMode`` that never tries the device."""

    avoid_device_init = property(lambda self: True)  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)


class _Stream:
    """Everything is done as soon as it is asked for."""

    device, device_index, device_type, stream_id, cuda_stream = torch.device("cuda", 0), 0, 1, 0, 0

    def __init__(self, *_: Any, **__: Any):
        self.priority = 0

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()

    def query(self) -> bool:
        return True

    def is_capturing(self) -> bool:
        return False

    def wait_stream(self, other: Any) -> None:
        pass

    wait_event = synchronize = wait_stream


class _Event:
    def __init__(self, *_: Any, **__: Any):
        pass

    def record(self, stream: Any = None) -> None:
        pass

    wait = synchronize = record

    def query(self) -> bool:
        return True


@contextmanager
def fake_gpus(
    count: int,
    memory: int,
    on_wait: Callable[[str], None] = lambda what: None,
    gathered: Callable[[Any], list[Any]] | None = None,
) -> Iterator[None]:
    """This process as the first of ``count``, each with a GPU of ``memory`` bytes.

    Args:
        on_wait: told when the host waits for the whole device.
        gathered: what all processes' objects are, from this one's; None: the same ``count`` times.

    Raises:
        RuntimeError: ``fake_gpu_library.load()`` has not run, or not before torch was imported.
    """
    if str(torch._C._get_accelerator()) != "cuda":
        raise RuntimeError("call igrpo.plan.fake_gpu_library.load() before anything imports torch")
    everyone = gathered or (lambda mine: [mine] * count)
    launched = {"WORLD_SIZE": str(count), "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": str(count)}
    launched |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # nobody is asked
    sharded = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
    environment = launched | sharded if count > 1 else {"RANK": "0", "WORLD_SIZE": "1"}
    gather = {"all_gather_object": lambda out, mine, group=None: out.__setitem__(slice(None), everyone(mine))}
    with ExitStack() as stack:
        fused = stack.enter_context(torch.library._scoped_library("aten", "IMPL"))
        for name in ("silu_backward", "mish_backward"):
            # Without their CUDA kernels torch would take these apart, into several times the memory.
            fused.impl(name, lambda grad, given: torch.empty_like(given), "CUDA")
        stack.enter_context(patch.dict(os.environ, environment))
        for module, made in ((torch.cuda, _cuda(memory, on_wait)), (torch.accelerator, _accelerator()), (dist, gather)):
            stack.enter_context(patch.multiple(module, **made))
        stack.callback(lambda: dist.is_initialized() and dist.destroy_process_group())
        if count > 1:
            dist.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
        yield


def _cuda(memory: int, on_wait: Callable[[str], None]) -> dict[str, Any]:
    stream = _Stream()
    card = SimpleNamespace(
        name="fake", total_memory=memory, major=CAPABILITY[0], minor=CAPABILITY[1], multi_processor_count=108,
        warp_size=32, max_threads_per_multi_processor=2048, shared_memory_per_block_optin=166912,
        regs_per_multiprocessor=65536, L2_cache_size=40 << 20, gcnArchName="", uuid="0",
    )  # fmt: skip

    answers: dict[str, Any] = {
        "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0, "is_bf16_supported": True,
        "get_device_name": "fake", "get_device_properties": card, "get_device_capability": CAPABILITY,
        "current_stream": stream, "default_stream": stream, "is_current_stream_capturing": False,
        "_is_in_bad_fork": False, "mem_get_info": (memory, memory), "max_memory_allocated": 0, "memory_allocated": 0,
        "memory_reserved": 0, "get_rng_state_all": [],
    }  # fmt: skip
    silent = ("set_device", "set_stream", "_lazy_init", "init", "empty_cache", "manual_seed", "manual_seed_all")
    made = {name: _answer(value) for name, value in answers.items()} | {name: _answer(None) for name in silent}
    guards = dict.fromkeys(("StreamContext", "device", "device_of", "stream"), nullcontext)
    waits = {"synchronize": lambda device=None: on_wait("torch.cuda.synchronize")}
    return made | guards | waits | {"Stream": _Stream, "Event": _Event}


def _accelerator() -> dict[str, Any]:
    answers = {
        "is_available": True, "device_count": 1, "current_device_index": 0, "set_device_index": None,
        "current_accelerator": torch.device("cuda"), "current_stream": _Stream(),
    }  # fmt: skip
    return {name: _answer(value) for name, value in answers.items()}


def _answer(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value
