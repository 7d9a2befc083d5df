"""Self-distillation (SDPO): how far the policy is from a teacher that saw more, over the teacher's top k per token.

With t_j and l_j the log-probabilities of teacher and policy at the teacher's ids j = 1..k, each with its whole
vocabulary below it, and one more bucket for the rest of it, T_0 = 1 - sum exp(t_j) and P_0 = 1 - sum exp(l_j):

    D = sum_b T_b·(log T_b - log P_b)                        distillation_alpha 0: KL(teacher || policy), forward
    D = sum_b P_b·(log P_b - log T_b)                        distillation_alpha 1: KL(policy || teacher), reverse
    D = a·KL(T || M) + (1 - a)·KL(P || M), M = a·T + (1 - a)·P                    between them

    loss = (1 - w)·loss + w·sum of D·(what the token's loss is multiplied with: its denominator, loss_weights)

Two distributions over k + 1 buckets: D >= 0, 0 where they are equal, at most the divergence over the whole vocabulary,
and that itself for k = V. TRL's `distillation_add_tail=True`; what it computes without, over the k tokens alone, does
not see mass that the policy has elsewhere. A rest is at least 1e-7, as there: below it is rounding. An entry without
mass (t_j = -inf, or the id -1) belongs to the rest; a row without any has D = 0.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from igrpo_kernels.batch import TokenBatch, values_may_be_read
from igrpo_kernels.loss_metrics import teacher_metrics
from igrpo_kernels.losses import times
from igrpo_kernels.objective import reduction_weights
from igrpo_kernels.types import GRPOLossConfig

_LEAST_REST = 1e-7
_ROUNDING = 3e-2  # bf16 log-probs are off by 2^-9 of themselves, their sum by up to entropy·2^-9: 12 nats, 0.024


class Teacher(NamedTuple):
    """Checked against the tokens of a call."""

    ids: Tensor
    """(n, k) int64, within the vocabulary."""
    logps: Tensor
    """(n, k) fp64; -inf: no entry, NaN: the row is refused."""
    alpha: float

    @classmethod
    def of(
        cls,
        ids: Tensor | None,  # (*shape of completion_ids, k)
        logps: Tensor | None,
        batch: TokenBatch,
        config: GRPOLossConfig,
        vocab_size: int,
        kept: object | None = None,  # sets of a sampling_mask
    ) -> Teacher | None:
        """None without a weight for it.

        Raises:
            ValueError: the teacher is missing, or has another shape, dtype or device; beside a sampling_mask, outside
                of which the policy has no mass; on the CPU also an id outside the vocabulary or twice in a row, or no
                log-probabilities (elsewhere the row becomes NaN).
            NotImplementedError: inside torch.compile.
        """
        if config.distillation_weight == 0.0:
            return None
        if ids is None or logps is None:
            raise ValueError(
                f"distillation_weight={config.distillation_weight} needs teacher_topk_ids and teacher_topk_logps, got "
                "None; pass both or set distillation_weight=0.0"
            )
        if kept is not None:
            raise ValueError(
                "distillation_weight and sampling_mask cannot be combined: the teacher's tokens may be outside of the "
                "sets, where the policy has no mass; sample without top_k, top_p and min_p, or drop one of them"
            )
        if torch.compiler.is_compiling():
            raise NotImplementedError("distillation_weight does not work inside torch.compile; call the loss outside")
        _check(ids, logps, batch)
        k = ids.shape[-1]
        ids, logps = ids.detach().reshape(-1, k).long(), logps.detach().reshape(-1, k).double()
        none = ~batch.mask[:, None] | (ids == -1) | (logps == -torch.inf)
        outside = ~none & ((ids < 0) | (ids >= vocab_size))
        ordered = torch.where(none, -1 - torch.arange(k, device=ids.device), ids).sort(-1).values
        twice = (ordered.diff(dim=-1) == 0).any(-1, keepdim=True)
        too_much = logps.masked_fill(none, -torch.inf).exp().sum(-1, keepdim=True) > 1.0 + _ROUNDING
        if values_may_be_read(ids):
            _refuse(ids, outside, twice, too_much, vocab_size)
        logps = logps.masked_fill(outside | twice | too_much, torch.nan).masked_fill(none, -torch.inf)
        return cls(ids.masked_fill(none | outside, 0), logps, config.distillation_alpha)

    def divergence(self, logps: Tensor, rows: Tensor | None = None) -> Tensor:
        """D (m,) of the policy's log-probabilities (m, k) fp64, differentiable; of some rows (m,), or of all."""
        teacher = self.logps if rows is None else self.logps[rows]
        t = torch.cat([teacher, _rest(teacher)], -1)
        policy = logps.masked_fill(teacher == -torch.inf, -torch.inf)
        p = torch.cat([policy, _rest(policy)], -1)
        if self.alpha == 0.0:
            return _kl(t, p)
        if self.alpha == 1.0:
            return _kl(p, t)
        # Of logarithms: where both exp underflow, the log of their sum has a NaN for a gradient.
        mixture = torch.logaddexp(t + math.log(self.alpha), p + math.log1p(-self.alpha))
        return self.alpha * _kl(t, mixture) + (1.0 - self.alpha) * _kl(p, mixture)

    def add(
        self,
        found: tuple[Tensor, dict[str, Tensor]],  # loss () and metrics without it
        divergence: Tensor,  # (n,) D
        batch: TokenBatch,
        config: GRPOLossConfig,
        num_items_in_batch: Tensor | float | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss () and its metrics with it, differentiable in D."""
        (loss, metrics), w = found, config.distillation_weight
        weights = reduction_weights(batch, config, num_items_in_batch)
        drawn = w * times(weights, divergence).sum(dtype=torch.float64).to(loss.dtype)
        taught = (self.logps != -torch.inf).any(-1)  # NaN is an entry
        metrics = metrics | teacher_metrics(divergence, taught)
        return drawn if w == 1.0 else (1.0 - w) * loss + drawn, metrics


def _rest(logps: Tensor) -> Tensor:
    """log of what is left of 1 (..., 1)."""
    return (1.0 - logps.exp().sum(-1, keepdim=True)).clamp(min=_LEAST_REST).log()


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum p·(log p - log q), 0 where p = 0, in value and in gradient."""
    p = log_p.exp()
    none = p == 0
    return (p * (log_p.masked_fill(none, 0.0) - log_q.masked_fill(none, 0.0))).sum(-1)


def _check(ids: Tensor, logps: Tensor, batch: TokenBatch) -> None:
    if ids.shape != logps.shape or ids.shape[:-1] != batch.shape or ids.shape[-1:] in ((), (0,)):
        raise ValueError(
            f"teacher_topk_ids has shape {tuple(ids.shape)} and teacher_topk_logps {tuple(logps.shape)}: both must be "
            f"{(*batch.shape, 'k')}, k entries for each of the token ids"
        )
    if ids.dtype not in (torch.int32, torch.int64) or not logps.is_floating_point():
        raise ValueError(
            f"teacher_topk_ids must be int32 or int64 and teacher_topk_logps floating-point, got {ids.dtype} and "
            f"{logps.dtype}"
        )
    for name, x in (("teacher_topk_ids", ids), ("teacher_topk_logps", logps)):
        if x.device != batch.index.device:
            raise ValueError(f"{name} is on {x.device} but the token ids are on {batch.index.device}; move it there")


def _refuse(ids: Tensor, outside: Tensor, twice: Tensor, too_much: Tensor, vocab_size: int) -> None:
    if bool(outside.any()):
        raise ValueError(
            f"teacher_topk_ids must lie in [0, {vocab_size}), or be -1 for no entry; got {int(ids[outside][0])}"
        )
    if bool(twice.any()):
        row = int(twice.nonzero()[0, 0])
        raise ValueError(f"teacher_topk_ids of row {row} hold an id twice: {ids[row].tolist()}")
    if bool(too_much.any()):
        row = int(too_much.nonzero()[0, 0])
        raise ValueError(
            f"teacher_topk_logps of row {row} are no log-probabilities: their exponentials add up to more than 1; take "
            "log_softmax over the whole vocabulary before topk"
        )
