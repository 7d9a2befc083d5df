"""verl: a policy loss for `register_policy_loss`, and the log-probability and entropy function of its fused kernels.

    register_policy_loss("igrpo_cispo")(policy_loss(GRPOLossConfig(loss_type="cispo", epsilon_high=5.0)))
    # actor_rollout_ref.actor.policy_loss.loss_mode=igrpo_cispo

    linear_cross_entropy   takes the place of verl.utils.kernel.linear_cross_entropy.linear_cross_entropy

Signatures are those of verl 0.9.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from igrpo_kernels import GRPOLossConfig, SamplingMask, linear_selective_log_softmax
from igrpo_kernels.batch import TokenBatch
from igrpo_kernels.integrations.per_token import (
    LOG_RATIO_LIMIT,
    clipped,
    masked_mean,
    per_token_policy_loss,
    policy_settings,
)
from igrpo_kernels.losses import CISPO, CLIPPED, DPPO_KL, DPPO_TV, GMPO, KL_COV, SAPO

__all__ = ["linear_cross_entropy", "policy_loss"]

_HELD = (CLIPPED, CISPO, SAPO, DPPO_TV, DPPO_KL)  # the losses of which verl holds a token's log-ratio inside ±20
_LOG_SEQUENCE_RATIO_LIMIT = 10.0


def policy_loss(
    config: GRPOLossConfig, aggregate: Callable[..., Tensor] | None = None
) -> Callable[..., tuple[Tensor, dict[str, Any]]]:
    """A function for `verl.trainer.ppo.core_algos.register_policy_loss`.

    `config` decides the policy term; how tokens are added up stays with verl (`loss_agg_mode`), and so do its clip
    keys' places: `clip_ratio_low`, `clip_ratio_high` and `clip_ratio_c` of the actor have no effect on this loss.
    `aggregate` replaces verl's `agg_loss`. Equations: the loss type's row of the table in docs/algorithm.md;
    log-probabilities in nats. As in verl, a token's log-ratio is held inside ±20 where it is there, and
    importance_sampling_level="sequence" is GSPO-token: w = sg(s)·exp(l - sg(l)) with the sequence's ratio s. verl's
    default loss is GRPOLossConfig(dual_clip=3.0) under token-mean; gmpo wants seq-mean-token-mean; `dro_beta`,
    `clip_cov_*`, `kl_cov_ratio` and `ppo_kl_coef` are verl's names.

    Returns:
        f(old_log_prob (B, T), log_prob (B, T), advantages (B, T), response_mask (B, T), loss_agg_mode, config,
        rollout_is_weights (B, T) | None) -> loss (), metrics, as verl calls it.

    Raises:
        ValueError: a key of `config` that shapes something else than the policy term, `beta` for example.
    """

    def compute_policy_loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        agg_loss = aggregate
        if agg_loss is None:
            from verl.trainer.ppo.core_algos import agg_loss
        terms = per_token_policy_loss(
            log_prob, old_log_prob, advantages, response_mask, settings, log_ratio_limit=limit,
            sequence_weight=_gspo_token_weight,
        )  # fmt: skip
        loss = terms.loss
        if rollout_is_weights is not None:
            loss = loss * _rollout_factor(torch.where(response_mask != 0, rollout_is_weights, 1.0), response_mask)
        batch_info = {} if config is None else config.global_batch_info
        total = agg_loss(loss_mat=loss, loss_mask=response_mask, loss_agg_mode=loss_agg_mode, **batch_info)
        return total, _metrics(terms.weight, terms.leaves, log_prob, old_log_prob, advantages, response_mask)

    def _rollout_factor(weights: Tensor, mask: Tensor) -> Tensor:
        """Of a geometric mean the weights' own geometric mean (B, 1), else they themselves (B, T)."""
        if settings.loss.term is not GMPO:
            return weights
        return ((weights + 1e-10).log().sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)).exp()

    def _metrics(weight, leaves, log_prob, old_log_prob, advantages, mask) -> dict[str, Any]:
        dual = (weight > (settings.dual_clip or torch.inf)) & (advantages < 0)
        if settings.loss.term is CLIPPED:
            clip = clipped(weight, advantages, settings)
        elif settings.loss.term is GMPO:  # on either side, as verl's
            moved = log_prob - old_log_prob
            beyond = (moved > settings.clip_high) | (moved < settings.clip_low)
            clip, dual = beyond & (advantages > 0), beyond & (advantages < 0)
        elif leaves is not None:
            clip, dual = leaves, ~leaves & (weight > (settings.delta or torch.inf))
        else:  # whatever the advantage, as verl's
            outside = (weight > settings.clip_high) | (weight < settings.clip_low)
            clip = outside & (settings.loss.term is CISPO)
        log_ratio = (old_log_prob - log_prob).clamp(-limit, limit)
        shares = {
            "actor/pg_clipfrac": clip.to(log_prob.dtype),
            "actor/ppo_kl": log_ratio.abs() if settings.loss.term is KL_COV else log_ratio,
            "actor/pg_clipfrac_lower": dual.to(log_prob.dtype),
        }
        values = torch.stack([masked_mean(x, mask) for x in shares.values()])
        return dict(zip(shares, values.tolist(), strict=True))

    settings = policy_settings(config)
    held = settings.importance_sampling_level == "token" and settings.loss.term in _HELD
    limit = LOG_RATIO_LIMIT if held else torch.inf
    return compute_policy_loss


def _gspo_token_weight(log_ratio: Tensor, batch: TokenBatch) -> Tensor:
    """verl's sequence ratio on rows (n,): sg(s)·exp(l - sg(l)), log s = mean of d over the sequence, at most 10.

    Its value is GSPO's on every token, and each token's gradient carries that token's own advantage and weight.
    """
    mean = batch.segment_sum(log_ratio.detach()) / batch.lengths.clamp(min=1.0)
    return (batch.expand(mean) + log_ratio - log_ratio.detach()).clamp(max=_LOG_SEQUENCE_RATIO_LIMIT).exp()


def linear_cross_entropy(
    hidden: Tensor,  # (n, H) or (B, T, H)
    weight: Tensor,  # (V, H), or this rank's rows of it
    labels: Tensor,  # (n,) or (B, T)
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: ProcessGroup | None = None,
    *,
    sampling_mask: SamplingMask | None = None,  # one set per label
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies (nats), each (n,) fp32 and differentiable; logits never whole.

    With `dist_process_group`, Megatron's tensor-parallel group, `weight` holds this rank's contiguous tokens, in rank
    order, of any number; `hidden` and `labels` (int64 ids of the whole vocabulary) are the same on every rank. As with
    verl's kernel, the gradients of `hidden` add up to the true one over the ranks: the caller's
    `gather_from_sequence_parallel_region` scatters their sum. One gather of 16 bytes per token forward, one sum of
    (n, H) backward. `sampling_mask`, which verl's does not take: what a sampler with top_p or top_k kept; `grpo_loss`.

    Raises:
        ValueError: a reduction other than "none", and what `linear_selective_log_softmax` refuses.
    """
    if reduction != "none":
        raise ValueError(f"reduction={reduction!r} is not covered: pass 'none' and reduce what is returned")
    if dist_process_group is not None:
        hidden = _OneShare.apply(hidden, torch.distributed.get_world_size(dist_process_group))
    return linear_selective_log_softmax(
        hidden.reshape(-1, hidden.shape[-1]), weight, labels.reshape(-1), temperature=temperature, return_entropy=True,
        process_group=dist_process_group, sampling_mask=sampling_mask,
    )  # fmt: skip


class _OneShare(torch.autograd.Function):
    """The identity; backward, of a gradient that is whole on every rank, the part that the caller's sum wants."""

    @staticmethod
    def forward(ctx, x: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad / ctx.ranks, None
