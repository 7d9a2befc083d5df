"""A second CUDA stream, for work that needs memory bandwidth beside matrix products that need arithmetic.

    with SideStream(device) as side:
        job = side.start(work)    after everything that the current stream has been given so far
        ...                       what the current stream is given now may run at the same time
        job()                     whatever the current stream is given from here on comes after `work`

Leaving the block joins the streams whether it ends well or not: memory that `work` touches belongs to the current
stream and may be given to others there as soon as nobody holds it, so no `record_stream` is needed, which would keep it
back until the host looks again. What `work` allocates belongs to the side stream, where work only ever starts after
what the current stream had before. Both use events alone, which CUDA records in a captured graph as a fork and its
join; no capture has been tried. Elsewhere work is done where it is started.
"""

import functools
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


class SideStream:
    """See above; `device` None = no second stream."""

    def __init__(self, device: torch.device | None):
        self.device = device
        self.stream = None if device is None or device.type != "cuda" else _second_stream(device)
        self.started = False

    def __enter__(self) -> "SideStream":
        return self

    def __exit__(self, *_: object) -> None:
        if self.started:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def start(self, work: Callable[[], T]) -> Callable[[], T]:
        """Begins `work`; the returned function makes the current stream wait for it and returns its result."""
        if self.stream is None:
            done = work()
            return lambda: done
        self.started = True
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            found, event = work(), self.stream.record_event()

        def job() -> T:
            torch.cuda.current_stream(self.device).wait_event(event)
            return found

        return job


def may_ask(x: torch.Tensor) -> bool:
    """Whether the host may look at what is on x's device: a CUDA graph that is being captured has computed nothing."""
    return x.device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


@functools.cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
