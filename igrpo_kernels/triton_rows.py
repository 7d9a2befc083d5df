"""The row kernels of `impl="triton"`: the operators of `triton_ops.py` as `RowKernels`."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from igrpo_kernels import triton_objective
from igrpo_kernels import triton_ops as ops
from igrpo_kernels.batch import TokenBatch, compute_dtype
from igrpo_kernels.objective import (
    coupling,
    entropy_slope,
    grpo_objective,
    policy_factor,
    pulled_to,
    reduction_weights,
)
from igrpo_kernels.triton_batch import token_tables
from igrpo_kernels.triton_grpo_loss import CoefficientInputs, LossKind, LossScalars
from igrpo_kernels.types import GRPOLossConfig, LogitTransform, RowStats


class TritonRows:
    """`RowKernels` on Triton."""

    name, teaches = "triton", False

    def statistics(
        self, logits: Tensor, index: Tensor, mask: Tensor | None, transform: LogitTransform, with_entropy: bool = True
    ) -> RowStats:
        """One read of the logits."""
        return RowStats(*ops.row_statistics(logits, index, mask, *transform, with_entropy))

    def gradient(
        self,
        logits: Tensor,
        out: Tensor | None,
        index: Tensor,
        mask: Tensor | None,
        stats: RowStats,
        grad_logps: Tensor | None,
        grad_entropy: Tensor | None,
        transform: LogitTransform,
    ) -> Tensor:
        """One read of the logits, one write of their gradient."""
        arguments = (index, mask, stats.row_max, stats.log_sum, stats.entropy, grad_logps, grad_entropy, *transform)
        if out is None:
            return ops.row_gradient(logits, *arguments)
        if out.data_ptr() == logits.data_ptr():
            ops.row_gradient_(logits, *arguments)
        else:
            ops.row_gradient_bwd(logits, out, *arguments[: -len(transform)], transform)
        return out

    def fits_one_pass(self, batch: TokenBatch, config: GRPOLossConfig) -> bool:
        """Whether dloss/dl of a row follows from that row's logits alone."""
        old = batch.old_per_token_logps
        rejects = config.rollout_rs is not None and batch.sampling_per_token_logps is not None
        one_pass = config.loss.term.one_pass and coupling(batch, config) == "token"
        return one_pass and not (rejects and old is None)

    def tables(self, device: torch.device) -> Callable[..., dict[str, Tensor | None]]:
        """One launch."""
        return token_tables

    def objective(
        self,
        logps: Tensor,
        entropy: Tensor | None,
        batch: TokenBatch,
        config: GRPOLossConfig,
        num_items_in_batch: Tensor | float | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Two to four launches for the losses that they know."""
        fused = triton_objective.covers(batch, config)
        function = triton_objective.grpo_objective if fused else grpo_objective
        return function(logps, entropy, batch, config, num_items_in_batch)

    def coefficient_inputs(
        self, batch: TokenBatch, config: GRPOLossConfig, num_items_in_batch: Tensor | float | None
    ) -> CoefficientInputs:
        """The kernel's per-row inputs: everything the coefficients need and the logits do not decide."""
        old, in_kernel = batch.old_per_token_logps, (config.importance_sampling_mode or "").startswith("token")
        if triton_objective.covers(batch, config):
            factors = triton_objective.row_weights(batch, config, num_items_in_batch, of_tokens=False)
        else:
            known = replace(config, importance_sampling_mode=None) if in_kernel else config
            weights = reduction_weights(batch, config, num_items_in_batch)
            factors = weights, None if old is None else policy_factor(old, batch, known), entropy_slope(batch, config)
        weights, policy_weight, slope = factors
        return CoefficientInputs(
            batch.index,
            batch.mask,
            batch.advantages,
            weights,
            old,
            batch.ref_per_token_logps if config.beta != 0.0 else None,
            batch.sampling_per_token_logps if in_kernel else pulled_to(batch, config),
            policy_weight,
            slope,
            batch.nll_weights,
            batch.temperatures,
        )

    def token_loss(
        self, logits: Tensor, out: Tensor | None, inputs: CoefficientInputs, config: GRPOLossConfig
    ) -> tuple[Tensor, Tensor, None, Tensor]:
        """One launch: two walks over each row, one write."""
        scalars, kind, transform = LossScalars.of(config), LossKind.of(config), config.logit_transform
        arguments = ([*inputs], *transform[:-1], [*scalars], kind.term, [*kind[1:]])
        if out is None:
            grad, logps, entropy = ops.token_loss(logits, *arguments)
        elif out.data_ptr() == logits.data_ptr():
            grad, (logps, entropy) = out, ops.token_loss_(logits, *arguments)
        else:
            inputs = CoefficientInputs(*inputs)
            grad, (logps, entropy) = out, ops.token_loss_fwd(logits, out, inputs, transform, scalars, kind)
        return logps, entropy, None, grad

    def scale_(self, grad: Tensor, factor: Tensor) -> None:
        """grad *= factor; the kernel looks at the factor, so that nothing waits for it."""
        matrix = grad if grad.dim() > 1 else grad[None]
        ops.scale_(matrix, factor.to(compute_dtype(grad.dtype)))


TRITON = TritonRows()
