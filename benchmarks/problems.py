"""What every provider of a case is given, and the fp64 truth it has to agree with."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.shapes import Shape
from igrpo_kernels import (
    GRPOLossConfig,
    grpo_loss,
    linear_grpo_loss,
    linear_selective_log_softmax,
    selective_log_softmax,
)

CONFIGS = {
    "gspo": {"importance_sampling_level": "sequence"},
    "kl": {"beta": 0.04},
    "entropy bonus": {"entropy_coef": 0.01},
}
# Clock and gate use different old log-probs. The clock's are those of training, hardly a token clipped: a clipped row
# costs some kernels less. The gate's put tokens on both sides of both borders of the clip range, log 0.8 = -0.22 and
# log 1.2 = 0.18, but further from them than bf16 is coarse: which side a token on the border falls is no error.
CLOCK_NOISE = 0.01
GATE_LOG_RATIOS = (-0.6, -0.35, -0.1, 0.05, 0.35, 0.6)
REF_NOISE = 1.5  # large, so that a loss that leaves the KL term out is far from the truth
GSPO_NOISE = 0.3
TRUTH_SEQUENCES = 2

Outputs = dict[str, Tensor]
"""Any of: loss (), logps (B, T), entropy (B, T)."""


@dataclass
class Problem:
    """Tensors on the device. `leaf` (and `weight`) carry the gradient; a turn begins with `begin`."""

    op: str
    shape: Shape
    variant: str
    device: torch.device
    ids: Tensor  # (B, T)
    advantages: Tensor  # (B,) fp32
    mask: Tensor  # (B, T) fp32, ones
    pristine: Tensor  # (B, T, V) logits, or (B, T, H) hidden states
    weight: Tensor | None  # (V, H), or None for operations on logits
    upstream: Tensor  # (B, T) fp32: gradient of the log-probs where the operation ends there
    clock_old: Tensor | None = None  # (B, T) fp32
    gate_old: Tensor | None = None
    ref: Tensor | None = None
    old: Tensor | None = None
    leaf: Tensor = field(default_factory=lambda: torch.empty(0))
    storage: Tensor | None = None

    @property
    def config(self) -> GRPOLossConfig:
        return GRPOLossConfig(**CONFIGS.get(self.variant, {}))

    @property
    def linear(self) -> bool:
        return self.weight is not None

    @property
    def wants_entropy(self) -> bool:
        return self.variant in ("entropy", "entropy bonus")

    def begin(self, extra_row: bool = False) -> None:
        """Fresh inputs without gradients: what an in-place provider did to them is undone.

        `extra_row`: logits as (B, T+1, V) whose last row per sequence predicts nothing, as some peers insist on.
        """
        if self.weight is not None:
            self.weight.grad = None
            self.leaf = self.pristine.detach().requires_grad_()
            return
        B, T, V = self.pristine.shape
        if self.storage is None:  # one buffer for all layouts
            self.storage = self.pristine.new_empty(B * (T + 1) * V)
        self.leaf = None
        if extra_row:
            view = self.storage.view(B, T + 1, V)
            view[:, T:].zero_()
            view[:, :T].copy_(self.pristine)
        else:
            view = self.storage[: B * T * V].view(B, T, V)
            view.copy_(self.pristine)
        self.leaf = view.detach().requires_grad_()

    def backward(self, outputs: Outputs) -> None:
        """From the loss, or from the log-probs (and entropies) with the same upstream gradient for everyone."""
        if "loss" in outputs:
            outputs["loss"].backward()
        else:
            torch.autograd.backward(list(outputs.values()), [self.upstream] * len(outputs))

    def gradients(self) -> Outputs:
        found = {} if self.leaf.grad is None else {"input gradient": self.leaf.grad[:, : self.shape.T]}
        if self.weight is not None and self.weight.grad is not None:
            found["weight gradient"] = self.weight.grad
        return found


def make_problem(op: str, shape: Shape, variant: str, device: torch.device) -> Problem:
    """The same numbers for the same arguments on the same kind of device."""
    generator = torch.Generator(device).manual_seed(0)
    B, T, V, H = shape.B, shape.T, shape.V, shape.H

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    weight = None
    if op.startswith("linear"):
        pristine = randn(B, T, H).to(shape.dtype)
        weight = (2 * H**-0.5 * randn(V, H)).to(shape.dtype).requires_grad_(variant != "frozen head")
    else:
        pristine = torch.stack([(2 * randn(T, V)).to(shape.dtype) for _ in range(B)])  # fp32 for one sequence only
    ids = torch.randint(V, (B, T), generator=generator, device=device)
    advantages = torch.where(torch.arange(B, device=device) % 2 == 0, 1.0, -0.5)
    if variant == "cross entropy":
        advantages = torch.ones_like(advantages)
    problem = Problem(
        op, shape, variant, device, ids, advantages, torch.ones(B, T, device=device), pristine, weight,
        upstream=randn(B, T) / shape.tokens,
    )  # fmt: skip
    if "loss" in op and variant != "cross entropy":
        logps = torch.stack([_logps(problem, b) for b in range(B)])
        problem.clock_old = logps + CLOCK_NOISE * randn(B, T)
        width = 1 if variant == "gspo" else T  # one ratio per sequence, or per token
        chosen = torch.randperm(B * width, generator=generator, device=device) % len(GATE_LOG_RATIOS)
        problem.gate_old = logps - torch.tensor(GATE_LOG_RATIOS, device=device)[chosen].view(B, width)
        problem.ref = logps + REF_NOISE * randn(B, T)
        if variant == "gspo":  # tokens differ from their sequence's mean, or a token-level loss would be right too
            noise = GSPO_NOISE * randn(B, T)
            problem.gate_old += noise - noise.mean(-1, keepdim=True)
    return problem


@torch.no_grad()
def _logps(problem: Problem, b: int) -> Tensor:
    """(T,) log-probs of one sequence, by the reference."""
    if problem.weight is None:
        return selective_log_softmax(problem.pristine[b], problem.ids[b], impl="torch")
    return linear_selective_log_softmax(problem.pristine[b], problem.weight, problem.ids[b], impl="torch")


def truth(problem: Problem) -> Callable[[Outputs], float]:
    """Measures outputs and gradients against fp64 PyTorch: the largest error of any tensor, relative to its maximum.

    Materialised logits are checked on the first and the last sequence, since fp64 copies of all would not fit; every
    sequence has the same weight in the loss, so gradients of a subset differ by a factor. The fused linear is checked
    whole: its dW depends on every token.
    """
    B = problem.shape.B
    rows = list(range(B)) if problem.linear or B <= TRUTH_SEQUENCES else [0, B - 1]
    share = len(rows) / B
    expected, gradients = _fp64(problem, rows)

    def error(outputs: Outputs, needs_grad: bool) -> float:
        # A provider that knows only the cross-entropy has another loss with the same gradient.
        compared = [(outputs[name][rows], wanted) for name, wanted in expected.items()
                    if name in outputs and name != "loss"]  # fmt: skip
        if needs_grad:
            found = problem.gradients()
            for name, wanted in gradients.items():
                if name not in found:
                    return float("inf")
                scale = 1.0 if problem.linear or "loss" not in problem.op else 1 / share
                part = found[name] if name == "weight gradient" else found[name][rows]
                compared.append((part.double() * scale, wanted))
        if "loss" in outputs and problem.variant != "cross entropy" and len(rows) == B:
            compared.append((outputs["loss"], expected["loss"]))
        worst = 0.0
        for got, wanted in compared:
            difference = float((got.double() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))
            worst = max(worst, difference if difference == difference else float("inf"))
        return worst

    return error


def _fp64(problem: Problem, rows: list[int]) -> tuple[Outputs, Outputs]:
    """Reference outputs and gradients of the chosen sequences, with the gate's old log-probs."""

    def pick(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[rows].double()

    leaf = problem.pristine[rows].double().requires_grad_()
    weight = None if problem.weight is None else problem.weight.detach().double().requires_grad_()
    inputs = (leaf,) if weight is None else (leaf, weight)
    ids = problem.ids[rows]
    if "loss" in problem.op:
        function = grpo_loss if weight is None else linear_grpo_loss
        out = function(
            *inputs, ids, pick(problem.advantages), old_per_token_logps=pick(problem.gate_old),
            ref_per_token_logps=pick(problem.ref) if problem.config.beta else None, config=problem.config, impl="torch",
        )  # fmt: skip
        out.loss.backward()
        outputs = {"loss": out.loss.detach()}
    else:
        function = selective_log_softmax if weight is None else linear_selective_log_softmax
        found = function(*inputs, ids, return_entropy=True, impl="torch")
        used = found if problem.wants_entropy else found[:1]
        torch.autograd.backward(list(used), [pick(problem.upstream)] * len(used))
        outputs = dict(zip(("logps", "entropy"), (x.detach() for x in used), strict=False))
    gradients = {"input gradient": leaf.grad}
    if weight is not None and problem.variant != "frozen head":
        gradients["weight gradient"] = weight.grad
    return outputs, gradients
