"""Named real shapes, and the bytes and FLOPs each operation cannot do without.

GPU    4k to 32k tokens of real vocabularies; every variant at one of them, the plain loss at all
CPU    the same list of cases on few tokens
toy    a few tokens and tens of columns: every line runs, and the times mean nothing
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Shape:
    """B sequences of T completion tokens over V columns; H is the width of the hidden states before the head."""

    name: str
    B: int
    T: int
    V: int
    H: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def tokens(self) -> int:
        return self.B * self.T

    @property
    def logits(self) -> int:
        return self.B * self.T * self.V

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


QWEN = Shape("qwen2.5", 8, 1024, 151_936, 4096)
GPU_LOGITS = (
    QWEN,
    Shape("qwen2.5", 4, 1024, 151_936, 4096),
    Shape("qwen2.5", 16, 1024, 151_936, 4096),
    Shape("qwen2.5", 32, 1024, 151_936, 4096),
    Shape("llama3", 8, 1024, 128_256, 4096),
    Shape("smollm2", 16, 1024, 49_152, 576),
    Shape("gemma", 4, 1024, 262_144, 2048),
)
GPU_LINEAR = (
    QWEN,
    Shape("qwen2.5", 8, 1024, 151_936, 2048),
    Shape("qwen2.5", 4, 1024, 151_936, 4096),
    Shape("qwen2.5", 16, 1024, 151_936, 4096),
    Shape("llama3", 8, 1024, 128_256, 4096),
    Shape("gemma", 4, 1024, 262_144, 2048),
)
CPU_LOGITS = (
    Shape("smollm2", 4, 96, 49_152, 576),
    Shape("smollm2", 4, 96, 49_152, 576, torch.float32),
    Shape("qwen2.5", 4, 32, 151_936, 896),
)
CPU_LINEAR = (
    Shape("smollm2", 4, 32, 49_152, 576),
    Shape("smollm2", 4, 16, 49_152, 576),
    Shape("smollm2", 4, 64, 49_152, 576),
    Shape("smollm2", 4, 32, 49_152, 576, torch.float32),
    Shape("qwen2.5", 4, 16, 151_936, 896),
)
TOY = (Shape("toy", 2, 5, 96, 16), Shape("toy", 2, 4, 33, 16, torch.float32))

VARIANTS = ("token", "gspo", "kl", "entropy bonus", "cross entropy")
"""`token` is the plain clipped loss. `cross entropy` has every ratio and advantage 1, so that its gradient is that of
the mean negative log-likelihood: what lets kernels that know only cross-entropy compete."""


def cases_of(kind: str) -> dict[str, list[tuple[Shape, str]]]:
    """Operation -> the (shape, variant) pairs to run on a machine of this kind: "cuda", "cpu" or "toy"."""
    logits, linear = {"cuda": (GPU_LOGITS, GPU_LINEAR), "cpu": (CPU_LOGITS, CPU_LINEAR), "toy": (TOY, TOY)}[kind]
    every = [(logits[0], v) for v in VARIANTS] + [(shape, "token") for shape in logits[1:]]
    every_linear = [(linear[0], v) for v in (*VARIANTS, "frozen head")] + [(shape, "token") for shape in linear[1:]]
    short = linear[:1] if kind == "cpu" else linear[:2]
    log_probs = [s for s in logits if s.dtype == torch.bfloat16 and s.T <= QWEN.T]
    return {
        "selective_log_softmax": [(logits[0], "entropy")] + [(s, "logps") for s in log_probs],
        "grpo_loss": every,
        "linear_selective_log_softmax": [(shape, v) for shape in short for v in ("logps", "entropy")],
        "linear_grpo_loss": every_linear,
    }


def minimum_bytes(op: str, shape: Shape, variant: str) -> dict[str, int]:
    """Pass -> bytes of logits that have to cross the memory bus, read and written, however clever the kernel.

    Log-probs read the logits once; their gradient reads them again, since the upstream gradient arrives after the
    forward pass, and writes as much. A token-level loss knows each row's coefficient when it has read the row: one read
    and one write. A sequence-level one knows it when the sequence has ended, and reads once more. The cross-entropy
    and the losses with a KL term or an entropy bonus are token-level.
    """
    once = shape.logits * shape.dtype.itemsize
    if op == "selective_log_softmax":
        return {"fwd": once, "bwd": 2 * once, "fwd+bwd": 3 * once}
    if op == "grpo_loss":
        return {"fwd+bwd": 3 * once if variant == "gspo" else 2 * once}
    return {}


def minimum_flops(op: str, shape: Shape, variant: str) -> dict[str, int]:
    """Pass -> FLOPs of the matmuls that cannot be avoided: logits, dX and dW, 2·n·H·V each."""
    one = 2 * shape.tokens * shape.H * shape.V
    if op == "linear_selective_log_softmax":
        return {"fwd": one, "bwd": 2 * one, "fwd+bwd": 3 * one}
    if op == "linear_grpo_loss":
        return {"fwd+bwd": 2 * one if variant == "frozen head" else 3 * one}
    return {}
