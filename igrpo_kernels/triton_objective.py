"""The (n,)- and (S,)-sized work of a loss call in small launches: what `objective.py` and `loss_metrics.py` say.

    row_weights_kernel   what the one-pass kernel multiplies a token's slope with
    objective_kernel     per sequence: its share of loss and metrics, and for losses in two passes dloss/dlogp
    finish_kernel        loss and metrics from those shares
    triton_selection.py  before these two, which rows the top-entropy quantile keeps, clip_cov and kl_cov draw

`covers` says for which losses: all that there are. What comes later, a setting or a tensor of the batch that this file
does not name, is computed by `objective.py`, which stays the definition and which the tests compare these kernels with.
"""

from dataclasses import fields

import torch
from torch import Tensor

from igrpo_kernels.batch import TokenBatch, kernels_run
from igrpo_kernels.first_order import first_order_only
from igrpo_kernels.losses import (
    CISPO,
    CLIP_COV,
    CLIPPED,
    CONSTANT_LENGTH,
    DPPO_KL,
    DPPO_TV,
    DRO,
    GMPO,
    KL_COV,
    NUM_ITEMS,
    PROMPT_MEAN,
    SAPO,
    SEQUENCE_MEAN,
    SEQUENCE_SUM,
    TOKEN_MEAN,
    TOPR,
    VESPO,
    VESPO_LAMBDA_MIN,
)
from igrpo_kernels.triton_grpo_loss import MASK, NO_SAMPLER, TRUNCATE, LossKind, LossScalars
from igrpo_kernels.triton_launch import on_device
from igrpo_kernels.triton_objective_kernels import COLUMNS, finish_kernel, objective_kernel
from igrpo_kernels.triton_objective_terms import SCALARS
from igrpo_kernels.triton_row_weights import row_weights_kernel
from igrpo_kernels.triton_sampler import SEQ_MASK, rejection_bounds
from igrpo_kernels.triton_selection import drawn_rows, high_entropy_rows
from igrpo_kernels.types import GRPOLossConfig

_TERMS = (CLIPPED, CISPO, SAPO, DPPO_TV, DPPO_KL, VESPO, GMPO, TOPR, DRO, CLIP_COV, KL_COV)
_CORRECTIONS = {"": NO_SAMPLER, "truncate": TRUNCATE, "mask": MASK, "seq-mask-tis": SEQ_MASK}  # by a mode's end
_REDUCTIONS = {
    "sequence_mean": SEQUENCE_MEAN,
    "sequence_sum": SEQUENCE_SUM,
    "constant_length": CONSTANT_LENGTH,
    "token_mean": TOKEN_MEAN,
    "num_items": NUM_ITEMS,
    "prompt_mean": PROMPT_MEAN,
}
_MODES = (None, "token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "seq-mask-tis")
_SETTINGS = {  # every value of which the kernels know; any other key keeps its default
    "loss_type", "importance_sampling_level", "epsilon", "epsilon_high", "delta", "dual_clip", "beta", "kl_estimator",
    "use_bias_correction_kl", "temperature", "entropy_coef", "importance_sampling_mode", "importance_sampling_clip_min",
    "importance_sampling_clip_max", "max_completion_length", "sapo_temperature_neg", "sapo_temperature_pos",
    "logit_scale", "final_logit_softcapping", "off_policy_mask_threshold", "vespo_k_pos", "vespo_k_neg",
    "vespo_lambda_pos", "vespo_lambda_neg", "kl_tau", "dro_beta", "rollout_rs", "rollout_rs_threshold",
    "top_entropy_quantile", "clip_cov_ratio", "clip_cov_lb", "clip_cov_ub", "kl_cov_ratio", "ppo_kl_coef",
    "distillation_weight", "distillation_alpha",  # distilled_rows.py adds it
}  # fmt: skip
_TENSORS = {
    "index", "mask", "seq_id", "num_sequences", "advantages", "sequence_advantages", "lengths", "cu_seqlens", "shape",
    "lengths_on_host", "whole", "old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps",
    "loss_weights", "nll_weights", "prompt_lengths", "temperatures",  # the logits' kernels have divided by them
}  # fmt: skip

RESULTS = (
    "policy_loss",
    "entropy",
    "kl",
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "clip_ratio/region_mean",
    "clip_ratio/dual_mean",
    "clip_ratio/low_min",
    "clip_ratio/high_max",
    "sampling/sampling_logp_difference/mean",
    "sampling/sampling_logp_difference/max",
    "sampling/importance_sampling_ratio/min",
    "sampling/importance_sampling_ratio/mean",
    "sampling/importance_sampling_ratio/max",
    "sampling/rollout_rs_masked_fraction",
)
_BLOCK = 256
# No loss takes 96 registers, but without a bound of ours ptxas spills to fit one block more.
_OPTIONS = {"BLOCK": _BLOCK, "num_warps": 8, "maxnreg": 96, "enable_fp_fusion": True}


def covers(batch: TokenBatch, config: GRPOLossConfig) -> bool:
    """Whether the kernels compute this loss."""
    known = all(f.name in _SETTINGS or getattr(config, f.name) == f.default for f in fields(config))
    known = known and all(f.name in _TENSORS or getattr(batch, f.name) is None for f in fields(batch))
    return (
        known
        and kernels_run()
        and any(config.loss.term is term for term in _TERMS)
        and any(config.loss.reduction is reduction for reduction in _REDUCTIONS.values())
        and config.importance_sampling_level in ("token", "sequence", "sequence_token")
        and config.importance_sampling_mode in _MODES
        and batch.mask.numel() > 0
    )


def row_weights(
    batch: TokenBatch,
    config: GRPOLossConfig,
    num_items_in_batch: Tensor | float | None,
    *,
    of_tokens: bool,  # the sampler's ratio of token_* modes is wanted, too, and dloss/dentropy of each row
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dloss/d(token loss) (n,); the policy term's factor (n,) or None: the sampler's ratio, 0 where a row is rejected;
    dloss/dentropy () or (n,), or None.
    """
    like, mode = batch.lengths, config.importance_sampling_mode or ""
    weights = torch.empty(batch.mask.shape, dtype=like.dtype, device=like.device)
    sampled = batch.old_per_token_logps is not None and batch.sampling_per_token_logps is not None
    corrects, rejects = sampled and mode.startswith(("seq", "token" if of_tokens else "seq")), _rejects(batch, config)
    policy_weights = torch.empty_like(weights) if corrects or (sampled and rejects) else None
    entropy_slope = None
    if config.needs_entropy_gradient:
        entropy_slope = weights.new_empty(weights.shape if of_tokens else ())
    scalars, (reduction, items, number) = LossScalars.of(config), _denominator(config, num_items_in_batch, like)
    with on_device(like):
        row_weights_kernel[(batch.num_sequences,)](
            batch.mask.view(torch.uint8),
            like,
            _of_prompts(batch, config),
            _contiguous(batch.loss_weights),
            _contiguous(batch.cu_seqlens),
            items,
            batch.old_per_token_logps if sampled else None,
            batch.sampling_per_token_logps if sampled else None,
            weights,
            policy_weights,
            entropy_slope,
            batch.mask.numel(),
            batch.mask.numel() // batch.num_sequences,
            batch.num_sequences,
            number,
            float(config.max_completion_length or 0),
            float(config.entropy_coef),
            scalars.sampler_low,
            scalars.sampler_high,
            *rejection_bounds(config).values(),
            REDUCTION=reduction,
            SAMPLER=_CORRECTIONS[mode.split("_")[-1] if corrects else ""].value,
            SAMPLER_OF_SEQUENCE=corrects and mode.startswith("sequence"),
            REJECTS=sampled and rejects,
            SLOPE_OF_ROWS=of_tokens,
            BLOCK=_BLOCK,
            enable_fp_fusion=True,
        )
    return weights, policy_weights, entropy_slope


def _rejects(batch: TokenBatch, config: GRPOLossConfig) -> bool:
    return config.rollout_rs is not None and batch.sampling_per_token_logps is not None


def grpo_objective(
    per_token_logps: Tensor,  # (n,)
    entropy: Tensor | None,  # (n,)
    batch: TokenBatch,
    config: GRPOLossConfig,
    num_items_in_batch: Tensor | float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`objective.grpo_objective` of a loss that `covers` names, in two to four launches; differentiable once."""
    leaves = (per_token_logps, entropy if config.needs_entropy_gradient else None)
    differentiable = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in leaves)
    loss, results = _Objective.apply(per_token_logps, entropy, batch, config, num_items_in_batch, differentiable)
    named = dict(zip(RESULTS, results.unbind(), strict=True))
    return loss, {name: named[source] for name, source in _metric_names(batch, config, entropy is not None)}


class _Objective(torch.autograd.Function):
    """The kernels write dloss/dlogps with the loss; backward multiplies it with the upstream gradient."""

    @staticmethod
    def forward(ctx, logps, entropy, batch, config, num_items_in_batch, differentiable):
        slopes, grads = None, [None, None]
        if differentiable:
            slopes = batch.lengths.new_empty((2 if config.needs_entropy_gradient else 1, batch.mask.numel()))
            grads = [*slopes, None][:2]
        loss, results = _launch(logps, entropy, grads, batch, config, num_items_in_batch)
        ctx.save_for_backward(slopes)
        ctx.mark_non_differentiable(results)
        ctx.set_materialize_grads(False)
        return loss, results

    @staticmethod
    @first_order_only
    def backward(ctx, upstream: Tensor | None, _):
        if upstream is None:
            return None, None, None, None, None, None
        slopes = ctx.saved_tensors[0] * upstream
        return *[*slopes, None][:2], None, None, None, None


def _launch(
    logps: Tensor,  # (n,)
    entropy: Tensor | None,  # (n,)
    grads: list[Tensor | None],  # (n,) each: dloss/dlogps and dloss/dentropy, written
    batch: TokenBatch,
    config: GRPOLossConfig,
    num_items_in_batch: Tensor | float | None,
) -> tuple[Tensor, Tensor]:
    """Loss () and RESULTS."""
    n, S, like = batch.mask.numel(), batch.num_sequences, batch.lengths
    shares = torch.empty((COLUMNS, S), dtype=torch.float64, device=like.device)
    loss = torch.empty((), dtype=like.dtype, device=like.device)
    results = torch.empty(len(RESULTS), dtype=like.dtype, device=like.device)
    of_sequences = config.importance_sampling_level == "sequence" or config.loss.term is VESPO
    reduction, items, number = _denominator(config, num_items_in_batch, like)
    logps, entropy = logps.detach(), None if entropy is None else entropy.detach()
    chosen = high_entropy_rows(entropy, batch, config) if config.top_entropy_quantile < 1.0 else (None, None)
    with on_device(like):
        objective_kernel[(S,)](
            logps,
            entropy,
            batch.mask.view(torch.uint8),
            batch.advantages.contiguous(),
            _contiguous(batch.sequence_advantages),
            batch.old_per_token_logps,
            batch.ref_per_token_logps if config.beta != 0.0 else None,
            batch.sampling_per_token_logps,
            _contiguous(batch.loss_weights),
            _contiguous(batch.nll_weights),
            like,
            _of_prompts(batch, config),
            _contiguous(batch.cu_seqlens),
            items,
            *chosen,
            drawn_rows(logps, batch, config) if config.loss.term.couples == "batch" else None,
            shares,
            *grads,
            n,
            n // S,
            S,
            number,
            float(config.max_completion_length or 0),
            float(config.entropy_coef),
            *_scalars(config),
            **_equations(batch, config),
            REDUCTION=reduction,
            **_OPTIONS,
        )
        finish_kernel[(1,)](
            shares,
            chosen[1],
            loss,
            results,
            S,
            float(config.entropy_coef),
            OF_SEQUENCES=of_sequences and batch.sequence_advantages is not None,
            BLOCK=_BLOCK,
            enable_fp_fusion=True,
        )
    return loss, results


def _scalars(config: GRPOLossConfig) -> list[float]:
    """SCALARS and BOUNDS, absent ones as numbers that do nothing."""
    numbers = LossScalars.of(config)._asdict() | {
        "off_policy_threshold": float(config.off_policy_mask_threshold or 0.0),
        "vespo_k_pos": float(config.vespo_k_pos),
        "vespo_k_neg": float(config.vespo_k_neg),
        "vespo_lambda_pos": max(float(config.vespo_lambda_pos), VESPO_LAMBDA_MIN),
        "vespo_lambda_neg": max(float(config.vespo_lambda_neg), VESPO_LAMBDA_MIN),
        "ppo_kl_coef": float(config.ppo_kl_coef),
    }
    return [*(numbers[name] for name in SCALARS), *rejection_bounds(config).values()]


def _equations(batch: TokenBatch, config: GRPOLossConfig) -> dict[str, str | int | bool]:
    """The choices that the objective's kernel is compiled for."""
    kind, mode = LossKind.of(config), config.importance_sampling_mode or ""
    sampled = batch.sampling_per_token_logps is not None and mode != ""
    return {
        "TERM": kind.term,
        "SAMPLER": _CORRECTIONS[mode.split("_")[-1] if sampled else ""].value,
        "SAMPLER_OF_SEQUENCE": sampled and mode.startswith("sequence"),
        "KL": kind.kl,
        "BIAS_CORRECTED": bool(kind.kl and kind.bias_corrected_kl),
        "LEVEL": config.importance_sampling_level,
        "PULLS": (2 if batch.sampling_per_token_logps is None else 1) if kind.pulls else 0,
        "OPSM": config.off_policy_mask_threshold is not None,
        "REJECTS": _rejects(batch, config),
    }


def _denominator(
    config: GRPOLossConfig, num_items_in_batch: Tensor | float | None, like: Tensor
) -> tuple[str, Tensor | None, float]:
    """The kernels' name of the reduction, and num_items_in_batch as a tensor or a number."""
    reduction = next(name for name, row in _REDUCTIONS.items() if config.loss.reduction is row)
    if reduction not in ("num_items", "prompt_mean"):
        return reduction, None, 0.0
    if num_items_in_batch is None:
        return "token_mean" if reduction == "num_items" else "prompts", None, 0.0
    if isinstance(num_items_in_batch, Tensor):
        return reduction, num_items_in_batch.detach().to(like.device), 0.0
    return reduction, None, float(num_items_in_batch)


def _of_prompts(batch: TokenBatch, config: GRPOLossConfig) -> Tensor | None:
    return _contiguous(batch.prompt_lengths) if config.loss.reduction is PROMPT_MEAN else None


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _metric_names(batch: TokenBatch, config: GRPOLossConfig, with_entropy: bool) -> list[tuple[str, str]]:
    """Which metrics `loss_metrics.py` reports, and which of RESULTS each is."""
    term, names = config.loss.term, []
    names += ["entropy"] if with_entropy else []
    names += ["kl"] if config.beta != 0.0 else []
    names += ["policy_loss"] if config.entropy_coef != 0.0 else []
    if term is CLIPPED:
        names += [f"clip_ratio/{name}" for name in ("low_mean", "low_min", "high_mean", "high_max", "region_mean")]
        names += ["clip_ratio/dual_mean"] if config.dual_clip is not None else []
    elif term.leaves is not None:
        names += [f"clip_ratio/{name}" for name in ("low_mean", "high_mean", "region_mean")]
    pairs = [(name, name) for name in names]
    if term is CLIP_COV:  # its drawn tokens, those of advantage 0 included, are counted where dual-clip's are
        pairs[-1] = (pairs[-1][0], "clip_ratio/dual_mean")
    if term is CISPO:
        pairs.append(("cispo_clip_ratio", "clip_ratio/high_mean"))
    elif term is VESPO:
        pairs.append(("vespo/phi_seq_mean", "clip_ratio/low_mean"))
    if batch.sampling_per_token_logps is not None:
        wanted = "sampling/" if config.importance_sampling_mode is not None else "sampling/sampling_logp"
        pairs += [(name, name) for name in RESULTS[:-1] if name.startswith(wanted)]
        pairs += [(RESULTS[-1], RESULTS[-1])] if config.rollout_rs is not None else []
    return pairs
