"""The GRPO objective on per-token log-probabilities: the one definition every implementation shares.

Given log-probs l = log pi(token), old policy o, reference r, sampler s and advantages A, all (n,) rows:

    log-ratio          d = l - o                                    o = stop_gradient(l) when not given
    importance weight  w = exp(d)                  "token"
                       w = exp(mean of d over the sequence)         "sequence"
                           sg(w of "sequence")·exp(l - sg l)    "sequence_token"
    loss per token     L = c · (gates · sampler ratio · policy_term(w, A, l) + beta · KL(l, r, w) + kl_tau · (l - s)²)
    loss               reduction of L over tokens and sequences - entropy_coef · mean entropy - sum of nll_weights · l

with c the loss_weights, 1 when not given.

A kernel needs only the rows' gradients: dloss/dlogits = dloss/dl · dl/dlogits + dloss/dH · dH/dlogits, and
`objective_and_row_gradients` returns dloss/dl and dloss/dH from detached rows. Everything here is (n,)- or (S,)-sized
elementwise work and segment sums: no host sync, no data-dependent shape, no collective.

Extreme values follow IEEE arithmetic as in TRL (no clamp on the log-ratio), with one convention: 0 · inf = 0. A row
with A = 0, a dropped row, or a clipped row therefore contributes exactly 0 where TRL would compute 0 · exp(100) = NaN.
A sampled token whose own logit is -inf (probability 0) has l = -inf and a non-finite loss, as in TRL.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from igrpo_kernels.batch import TokenBatch
from igrpo_kernels.loss_metrics import objective_metrics
from igrpo_kernels.losses import TermInputs, times
from igrpo_kernels.rejection import accepts
from igrpo_kernels.silent_exp import silent_exp, silent_square
from igrpo_kernels.types import GRPOLossConfig


def grpo_objective(
    per_token_logps: Tensor,  # (n,) fp32 or fp64
    entropy: Tensor | None,  # (n,) same dtype, nats
    batch: TokenBatch,
    config: GRPOLossConfig,
    num_items_in_batch: Tensor | float | None = None,  # () or a number
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss () and metrics; the loss is differentiable in `per_token_logps` and, if entropy_coef != 0, in `entropy`.

    `entropy` may be None when neither entropy_coef nor top_entropy_quantile needs it; its metric is then absent.
    Masked rows may hold anything, NaN included: they change no value and get gradient exactly 0.
    """
    logps = batch.masked(per_token_logps)  # l
    entropy = None if entropy is None else batch.masked(entropy)  # H
    if entropy is None and (config.entropy_coef != 0.0 or config.top_entropy_quantile < 1.0):
        raise ValueError("entropy_coef and top_entropy_quantile need `entropy`, got None")
    if config.beta != 0.0 and batch.ref_per_token_logps is None:
        raise ValueError(f"beta={config.beta} needs ref_per_token_logps, got None; pass them or set beta=0.0")
    old = logps.detach() if batch.old_per_token_logps is None else batch.old_per_token_logps  # o

    term, own = config.loss.term, _of_weighted(logps, batch)
    log_ratio = (logps if "sequence" in (config.importance_sampling_level, term.couples) else own) - old  # d
    weight = _of_weighted(importance_weight(log_ratio, batch, config), batch)  # w
    sampler = sampler_ratio(old, batch, config)
    terms = TermInputs(own, old, log_ratio, weight, batch.advantages, sampler, batch)
    per_token_loss = term.function(terms, config)

    if config.off_policy_mask_threshold is not None:
        per_token_loss = torch.where(off_policy_keep(logps.detach(), old, batch, config), per_token_loss, 0.0)
    keep_entropy = None
    if config.top_entropy_quantile < 1.0:
        keep_entropy = top_entropy_keep(entropy.detach(), batch, config.top_entropy_quantile)
        per_token_loss = torch.where(keep_entropy, per_token_loss, 0.0)
    if (accepted := accepts(old, batch, config)) is not None:
        per_token_loss = torch.where(accepted, per_token_loss, 0.0)
    if sampler is not None and not term.takes_sampler:
        per_token_loss = times(rows(sampler, batch, config), per_token_loss)

    kl = None
    if config.beta != 0.0:  # added after the gates: the KL term is neither masked nor corrected for the sampler
        kl = per_token_kl(own, batch.ref_per_token_logps, weight, config)
        per_token_loss = per_token_loss + config.beta * kl
    if config.kl_tau != 0.0:
        per_token_loss = per_token_loss + config.kl_tau * silent_square(from_sampler(own, old, batch))
    if (weights := batch.loss_weights) is not None:  # a weight of 0 takes a row's loss out, NaN or not
        per_token_loss = torch.where(weights == 0, 0.0, times(weights, per_token_loss))

    policy_loss = reduce_loss(per_token_loss, batch, config, num_items_in_batch)
    loss = policy_loss
    if batch.nll_weights is not None:  # divided by nothing: the weights are the caller's
        loss = loss - times(batch.nll_weights, logps).sum(dtype=torch.float64).to(loss.dtype)
    if config.entropy_coef != 0.0:
        active = batch.mask if keep_entropy is None else batch.mask & keep_entropy
        # bonus = sum of H over active tokens / number of active tokens, whatever the loss type's own normaliser
        count = active.sum().clamp(min=1)
        loss = loss - config.entropy_coef * (torch.where(active, entropy, 0.0).sum() / count)
    with torch.no_grad():
        metrics = objective_metrics(terms, entropy, kl, policy_loss, config)
    return loss, metrics


def _of_weighted(x: Tensor, batch: TokenBatch) -> Tensor:
    """x (n,), a constant in rows of weight 0: a gradient of 0 times their infinities would be NaN."""
    return x if batch.loss_weights is None else x.where(batch.loss_weights != 0, x.detach())


def objective_and_row_gradients(
    per_token_logps: Tensor,  # (n,)
    entropy: Tensor | None,  # (n,)
    batch: TokenBatch,
    config: GRPOLossConfig,
    num_items_in_batch: Tensor | float | None = None,
    objective: Callable[..., tuple[Tensor, dict[str, Tensor]]] | None = None,  # an implementation's own; None: above
    *divergence: Tensor,  # (n,), where there is a teacher
) -> tuple[Tensor | dict[str, Tensor] | None, ...]:
    """Detached loss, metrics, dloss/dlogps (n,) and dloss/dentropy (n,) or None: all a gradient kernel needs; with a
    teacher also dloss/ddivergence (n,)."""
    logps, *divergence = (x.detach().requires_grad_() for x in (per_token_logps, *divergence))
    leaves = [logps, *divergence]
    if config.needs_entropy_gradient:
        entropy = entropy.detach().requires_grad_()
        leaves.append(entropy)
    with torch.enable_grad():
        loss, metrics = (objective or grpo_objective)(logps, entropy, batch, config, num_items_in_batch, *divergence)
    # With distillation_weight 1 the policy's own term is gone.
    slope, *others = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    of_entropy = others.pop() if config.needs_entropy_gradient else None
    return loss.detach(), metrics, slope, of_entropy, *others


def importance_weight(log_ratio: Tensor, batch: TokenBatch, config: GRPOLossConfig) -> Tensor:
    """w (n,): exp(d_t), or on the sequence level exp(sum_t d_t / n_tokens) on every row of the sequence; there
    "sequence_token" (GSPO-token) takes each token's gradient from its own log-probability alone.
    """
    if config.importance_sampling_level == "token":
        return silent_exp(log_ratio)
    mean_log_ratio = batch.segment_sum(log_ratio) / batch.lengths.clamp(min=1.0)
    if config.importance_sampling_level == "sequence":
        return batch.expand(silent_exp(mean_log_ratio))
    if config.importance_sampling_level == "sequence_token":
        own = torch.where(log_ratio.isinf(), 0.0, log_ratio - log_ratio.detach())  # 0, with the token's gradient
        return silent_exp(batch.expand(mean_log_ratio.detach()) + own)
    raise ValueError(f"importance_sampling_level={config.importance_sampling_level!r} has no equation here")


def sampler_ratio(old: Tensor, batch: TokenBatch, config: GRPOLossConfig) -> Tensor | None:
    """pi_old / pi_sampler as a constant: (S,) for sequence_* modes, (n,) for the others, None when off.

    token_*: exp(u_t), sequence_*: exp(sum_t u_t), truncated or zeroed outside [min, max]; seq-mask-tis: exp(u_t),
    zeroed where exp(mean of u over the sequence) is outside; u = o - s. No ratio is infinite: beyond it stands the
    dtype's largest number.
    """
    if config.importance_sampling_mode is None or batch.sampling_per_token_logps is None:
        return None
    low, high = config.importance_sampling_clip_min, config.importance_sampling_clip_max
    # A token the sampler reported NaN for gets ratio 1: no evidence, no correction.
    log_ratio = torch.nan_to_num(old - batch.sampling_per_token_logps, nan=0.0)
    if config.importance_sampling_mode == "seq-mask-tis":
        geometric = batch.expand((batch.segment_sum(log_ratio) / batch.lengths.clamp(min=1.0)).exp())
        return _finite_exp(log_ratio).masked_fill(_outside(geometric, low, high), 0.0)
    level, action = config.importance_sampling_mode.split("_")
    if level == "sequence":
        log_ratio = batch.segment_sum(log_ratio)  # a sum, not a mean: the ratio of whole-sequence probabilities
    ratio = _finite_exp(log_ratio)
    if action == "truncate":
        return ratio.clamp(min=low, max=high)
    if action != "mask":
        raise ValueError(f"importance_sampling_mode={config.importance_sampling_mode!r} has no equation here")
    return ratio.masked_fill(_outside(ratio, low, high), 0.0)


def _finite_exp(x: Tensor) -> Tensor:
    return x.exp().clamp(max=torch.finfo(x.dtype).max)  # 0 · it = 0 in every implementation's order of the products


def _outside(x: Tensor, low: float | None, high: float | None) -> Tensor:
    return (x < (-math.inf if low is None else low)) | (x > (math.inf if high is None else high))


def from_sampler(logps: Tensor, old: Tensor, batch: TokenBatch) -> Tensor:
    """l - s (n,), s = o without a sampler; 0 where the sampler reported NaN."""
    sampler = old if batch.sampling_per_token_logps is None else batch.sampling_per_token_logps
    unscored = (sampler != sampler) & (batch.sampling_per_token_logps is not None)
    return (logps - sampler).masked_fill(unscored, 0.0)


def pulled_to(batch: TokenBatch, config: GRPOLossConfig) -> Tensor | None:
    """What kl_tau draws l to (n,): s, or o without a sampler; None where it does not."""
    if config.kl_tau == 0.0:
        return None
    return batch.old_per_token_logps if batch.sampling_per_token_logps is None else batch.sampling_per_token_logps


def policy_factor(old: Tensor, batch: TokenBatch, config: GRPOLossConfig) -> Tensor | None:
    """What the policy term of a row is multiplied with (n,): the sampler's ratio, 0 where it is rejected."""
    sampler, accepted = sampler_ratio(old, batch, config), accepts(old, batch, config)
    if sampler is None:
        return None if accepted is None else accepted.to(old.dtype)
    sampler = rows(sampler, batch, config)
    return (sampler if accepted is None else sampler.masked_fill(~accepted, 0.0)).contiguous()


def rows(sampler: Tensor, batch: TokenBatch, config: GRPOLossConfig) -> Tensor:
    """A sampler ratio on rows (n,), from its own granularity."""
    return batch.expand(sampler) if config.importance_sampling_mode.startswith("sequence_") else sampler


def per_token_kl(logps: Tensor, ref: Tensor, weight: Tensor, config: GRPOLossConfig) -> Tensor:
    """KL(policy || reference) estimate per token (n,), x = r - l; times w (with its gradient) if bias-corrected.

    k1 = -x;  k2 = x²/2;  k3 = exp(x) - x - 1.
    """
    x = ref - logps
    if config.kl_estimator == "k1":
        kl = -x
    elif config.kl_estimator == "k2":
        kl = 0.5 * x * x
    elif config.kl_estimator == "k3":
        kl = silent_exp(x) - x - 1.0
    else:
        raise ValueError(f"kl_estimator={config.kl_estimator!r} has no equation here")
    return kl * weight if config.use_bias_correction_kl else kl


def off_policy_keep(logps: Tensor, old: Tensor, batch: TokenBatch, config: GRPOLossConfig) -> Tensor:
    """OPSM (DeepSeek-V3.2), bool (n,): keep where A >= 0 or mean_t(s - l) <= threshold; s = o without a sampler."""
    behaviour = old if batch.sampling_per_token_logps is None else batch.sampling_per_token_logps
    divergence = torch.nan_to_num(behaviour - logps, nan=0.0)  # unscored tokens are no evidence
    mean_divergence = batch.segment_sum(divergence) / batch.lengths.clamp(min=1.0)
    return (batch.advantages >= 0) | (batch.expand(mean_divergence) <= config.off_policy_mask_threshold)


def top_entropy_keep(entropy: Tensor, batch: TokenBatch, share: float) -> Tensor:
    """Bool (n,): unmasked rows whose entropy reaches the (1 - share) quantile of this batch's unmasked rows.

    The quantile interpolates linearly like `torch.quantile`, written with a sort because selecting the unmasked rows
    first would need a host sync. It sees this call's tokens only; TRL gathers them from all ranks first.
    """
    if entropy.numel() == 0:
        return batch.mask
    ordered = torch.where(batch.mask, entropy, torch.inf).sort().values  # masked rows sort behind all others
    rank = (1.0 - share) * (batch.lengths.sum() - 1.0).clamp(min=0.0)
    below = rank.floor()
    # gather, because indexing with a 0-d tensor reads it on the host
    low, high = ordered.gather(0, torch.stack([below, rank.ceil()]).long()).unbind()
    threshold = torch.where(below == rank, low, torch.lerp(low, high, rank - below))
    return batch.mask & (entropy >= threshold)


def sequence_weights(batch: TokenBatch, config: GRPOLossConfig, num_items_in_batch: Tensor | float | None) -> Tensor:
    """dloss / d(token loss) of each sequence's tokens (S,), empty ones included: the reductions of `losses.py`."""
    return config.loss.reduction.weights(batch, config, num_items_in_batch)


def reduction_weights(batch: TokenBatch, config: GRPOLossConfig, num_items_in_batch: Tensor | float | None) -> Tensor:
    """`sequence_weights` on rows (n,) times loss_weights, 0 on masked ones: what a kernel multiplies a slope with."""
    weights = batch.masked(batch.expand(sequence_weights(batch, config, num_items_in_batch)))
    return weights if batch.loss_weights is None else weights * batch.loss_weights


def reduce_loss(
    per_token_loss: Tensor,  # (n,)
    batch: TokenBatch,
    config: GRPOLossConfig,
    num_items_in_batch: Tensor | float | None,
) -> Tensor:
    """Token losses -> (): sum_b weight_b · (sum of L over the unmasked tokens of b)."""
    weights = sequence_weights(batch, config, num_items_in_batch)
    return (weights * batch.segment_sum(per_token_loss)).sum(dtype=torch.float64).to(weights.dtype)


def entropy_slope(batch: TokenBatch, config: GRPOLossConfig) -> Tensor | None:
    """dloss/dentropy (), the same for every unmasked row unless top_entropy_quantile selects; None without a bonus."""
    return -config.entropy_coef / batch.lengths.sum().clamp(min=1.0) if config.needs_entropy_gradient else None


def coupling(batch: TokenBatch, config: GRPOLossConfig) -> str:
    """Which rows must be measured before a row's gradient is known: its own ("token"), its "sequence", the "batch"."""
    if config.top_entropy_quantile < 1.0 or config.loss.term.couples == "batch":
        return "batch"
    ratio_follows_logps = batch.old_per_token_logps is None and batch.sampling_per_token_logps is not None
    if (
        config.importance_sampling_level != "token"
        or config.loss.term.couples == "sequence"
        or config.off_policy_mask_threshold is not None
        or (ratio_follows_logps and "seq" in f"{config.importance_sampling_mode} {config.rollout_rs}")
    ):
        return "sequence"
    return "token"


def may_contribute(batch: TokenBatch, config: GRPOLossConfig) -> Tensor:
    """Bool (n,): the rows that may have a gradient, judged without the logits.

    A policy term that is a multiple of the advantage has none in a row of advantage 0, without the terms around it.
    """
    if not config.needs_advantage:
        return batch.mask
    weighted = batch.masked(batch.advantages) != 0
    if batch.nll_weights is not None:
        weighted = weighted | (batch.nll_weights != 0)
    if coupling(batch, config) == "token":
        return weighted
    return batch.mask & (batch.expand(batch.segment_sum(weighted.to(batch.advantages.dtype))) > 0)


def shapes_the_loss(batch: TokenBatch, config: GRPOLossConfig) -> Tensor:
    """Bool (n,): the rows whose statistics the loss needs, including rows that have no gradient of their own."""
    return batch.mask if coupling(batch, config) == "batch" else may_contribute(batch, config)
