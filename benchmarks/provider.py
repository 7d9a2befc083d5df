"""A provider in a case: what it is, what it needs, what it can do."""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.problems import Outputs, Problem
from igrpo_kernels import available_impls

Forward = Callable[[Problem], Outputs]
"""Reads `problem.leaf` and the rest; the harness runs the backward pass from what it returns."""


@dataclass(frozen=True)
class Provider:
    """One row of a table.

    Example: ``Provider("liger", "liger", build, package="liger_kernel", install="liger-kernel==0.8.5", cuda=True)``
    """

    name: str
    """Unique in its case."""
    impl: str
    """Whose it is: triton, cuda, cpu, torch (ours), eager, compile, trl, liger, cce, pytorch, quack."""
    build: Callable[[], Forward]
    """Imports what it needs and returns the function to time."""
    package: str | None = None
    """Module that must be installed, and under what name pip knows it."""
    install: str = ""
    cuda: bool = False
    """Written in Triton or CUDA: needs a device (or Triton's interpreter)."""
    ops: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    """Variants it cannot compute; it is left out of those."""
    only: tuple[str, ...] = ()
    """The only variants it can compute; empty: all but `lacks`."""
    forward_only: bool = False
    compiled: bool = False
    """Goes through torch.compile."""
    extra_row: bool = False
    """Wants logits (B, T+1, V)."""

    def computes(self, op: str, variant: str) -> bool:
        return op in self.ops and variant not in self.lacks and (not self.only or variant in self.only)

    def missing(self, device: torch.device) -> str | None:
        """Why it cannot run here and what would change that, or None."""
        if self.impl in (states := available_impls()) and states[self.impl] != "available":
            return states[self.impl]
        if self.package and importlib.util.find_spec(self.package) is None:
            return f"not installed (pip install {self.install})"
        if self.cuda and device.type != "cuda" and not interpreted():
            return "needs a CUDA device"
        return None


def interpreted() -> bool:
    """Whether Triton kernels run on CPU tensors, line by line in Python."""
    return os.environ.get("TRITON_INTERPRET") == "1"
