"""What devices can do, from their data sheets, and how much of it a program gets."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from igrpo.settings import ConfigError


@dataclass(frozen=True)
class Device:
    """One GPU (or the CPU of this machine); rates are peaks per second."""

    name: str
    memory: float
    """Bytes; of the CPU, what this machine has is asked instead."""
    flops: float
    """Dense bf16 FLOP/s."""
    bandwidth: float
    """Memory, bytes/s."""
    link: float
    """To the GPUs of its node, bytes/s, one direction."""
    fabric: float
    """To other nodes, bytes/s per GPU."""
    per_node: int = 8
    kind: str = "cuda"


GB = 1e9
DEVICES = {
    device.name: device
    for device in (
        Device("A100-40G", 40 * GB, 312e12, 1.555e12, 300 * GB, 25 * GB),
        Device("A100-80G", 80 * GB, 312e12, 2.039e12, 300 * GB, 25 * GB),
        Device("H100-80G", 80 * GB, 989e12, 3.35e12, 450 * GB, 50 * GB),
        Device("H200-141G", 141 * GB, 989e12, 4.8e12, 450 * GB, 50 * GB),
        Device("B200-180G", 180 * GB, 2250e12, 7.7e12, 900 * GB, 50 * GB),
        Device("cpu", 16 * GB, 0.2e12, 20 * GB, 10 * GB, 1 * GB, per_node=1, kind="cpu"),
    )
}


@dataclass(frozen=True)
class Rates:
    """Shares of the peaks that are reached, and fixed costs. Guesses until a run calibrates them."""

    bandwidth: float = 0.85
    """Of memory bandwidth, while decoding."""
    prefill: float = 0.6
    """Of FLOP/s, while reading prompts."""
    decode: float = 0.8
    """Of FLOP/s, while decoding a wide batch."""
    learner: float = 0.4
    """Of FLOP/s, forward and backward together (model FLOPs, recomputation counted apart)."""
    network: float = 0.7
    """Of link and fabric."""
    decode_overhead: float = 2e-3
    """Seconds per decode step beside the kernels."""
    sync_overhead: float = 1.0
    """Seconds per weight push beside the transfer."""
    generation_scale: float = 1.0
    learner_scale: float = 1.0
    sync_scale: float = 1.0
    """Measured seconds over predicted ones, from ``--calibrate``."""


GUESSED = Rates()


@dataclass(frozen=True)
class Hardware:
    """Example: ``Hardware(DEVICES["A100-80G"], count=16, generation=8)``: 8 learn, 8 generate."""

    device: Device
    count: int
    generation: int = 0
    """Devices that only generate; 0: every device learns and generates in turns."""

    @property
    def learners(self) -> int:
        return self.count - self.generation

    @property
    def engines_on(self) -> int:
        return self.generation or self.count

    @property
    def network(self) -> float:
        """Bytes/s per device of a collective over all learners."""
        return self.device.link if self.learners <= self.device.per_node else self.device.fabric


def parse_hardware(text: str, generation: int = 0) -> Hardware:
    """``16xA100-80G``, ``A100-80G`` or ``cpu``.

    Raises:
        ConfigError: unknown device, or no device left to learn.
    """
    match = re.fullmatch(r"(?:(\d+)\s*[x×]\s*)?([\w-]+)", text.strip())
    names = {name.lower(): name for name in DEVICES}
    name = match and match[2].lower()
    if name not in names:  # H100 for H100-80G, where only one fits
        fitting = [n for n in names if name and n.startswith(f"{name}-")]
        if len(fitting) != 1:
            near = fitting or difflib.get_close_matches(name or text, names, n=1)
            hint = f"; did you mean {' or '.join(names[n] for n in near)}?" if near else ""
            raise ConfigError(f"hardware: there is no '{text}'{hint} Write COUNTxDEVICE; known: {', '.join(DEVICES)}")
        name = fitting[0]
    count = int(match[1] or 1)  # type: ignore[index]
    if count < 1 or not 0 <= generation < count:
        raise ConfigError(f"hardware: of {count} devices, {generation} that only generate leave none to learn")
    return Hardware(DEVICES[names[name]], count, generation)
