"""What a loss call reports beside the loss, measured as TRL measures it, without a host sync.

Each value covers this call's tokens only. Means over several micro-batches or ranks are the caller's to weight.
"""

from torch import Tensor, inf, where

from igrpo_kernels.batch import TokenBatch
from igrpo_kernels.types import CLIPPED_LOSS_TYPES, GRPOLossConfig


def objective_metrics(
    weight: Tensor,  # (n,) importance weight, before the delta clamp
    old: Tensor,  # (n,)
    entropy: Tensor | None,  # (n,)
    kl: Tensor | None,  # (n,) bias-corrected if configured
    sampler: Tensor | None,  # (n,) or (S,) sampler ratio after truncation or masking
    phi: Tensor | None,  # (n,) VESPO weight
    policy_loss: Tensor,  # () loss without the entropy bonus
    batch: TokenBatch,
    config: GRPOLossConfig,
) -> dict[str, Tensor]:
    """TRL's metric names -> detached 0-d tensors. Call under `no_grad`."""
    metrics: dict[str, Tensor] = {}
    if entropy is not None:
        metrics["entropy"] = _token_mean(entropy, batch)
    if kl is not None:
        metrics["kl"] = _token_mean(kl, batch)
    if config.entropy_coef != 0.0:
        metrics["policy_loss"] = policy_loss.detach().clone()
    # One decision per sequence when neither the ratio nor the advantage varies inside it, else one per token.
    per_sequence = config.importance_sampling_level == "sequence" and batch.advantages_per_sequence
    if config.loss_type in CLIPPED_LOSS_TYPES:
        metrics |= _clip_metrics(weight, per_sequence, batch, config)
    elif config.loss_type == "cispo":
        clipped = (weight > config.clip_high) & (batch.advantages > 0)
        metrics["cispo_clip_ratio"] = _decision_mean(clipped, per_sequence, batch)
    elif config.loss_type == "vespo":
        metrics["vespo/phi_seq_mean"] = _phi_mean(phi, batch)
    if batch.sampling_per_token_logps is not None:
        metrics |= _sampling_metrics(old, sampler, batch, config)
    return metrics


def _clip_metrics(weight: Tensor, per_sequence: bool, batch: TokenBatch, config: GRPOLossConfig) -> dict[str, Tensor]:
    """Shares of clipped decisions: strict inequalities, by the sign of A, after the delta clamp; A = 0 never clips."""
    if config.delta is not None:
        weight = weight.clamp(max=config.delta)
    low = (weight < config.clip_low) & (batch.advantages < 0)
    high = (weight > config.clip_high) & (batch.advantages > 0)
    low_share, high_share = _sequence_mean(low, batch), _sequence_mean(high, batch)
    # TRL counts empty sequences as unclipped on the sequence level and leaves them out on the token level.
    counted = batch.lengths >= 0 if per_sequence else batch.lengths > 0
    metrics = {
        "clip_ratio/low_mean": _decision_mean(low, per_sequence, batch),
        "clip_ratio/low_min": _extreme(low_share, counted, largest=False),
        "clip_ratio/high_mean": _decision_mean(high, per_sequence, batch),
        "clip_ratio/high_max": _extreme(high_share, counted, largest=True),
        "clip_ratio/region_mean": _decision_mean(low | high, per_sequence, batch),
    }
    if config.dual_clip is not None:
        dual = (weight > config.dual_clip) & (batch.advantages < 0)
        metrics["clip_ratio/dual_mean"] = _decision_mean(dual, per_sequence, batch)
    return metrics


def _phi_mean(phi: Tensor, batch: TokenBatch) -> Tensor:
    if not batch.advantages_per_sequence:
        return _token_mean(phi, batch)
    per_sequence = where(batch.lengths > 0, _sequence_mean(phi, batch), 1.0)  # an empty sequence has phi(W=1) = 1
    return per_sequence.sum() / max(batch.num_sequences, 1)


def _sampling_metrics(
    old: Tensor, sampler: Tensor | None, batch: TokenBatch, config: GRPOLossConfig
) -> dict[str, Tensor]:
    """|log pi_old - log pi_sampler| over scored tokens, and the corrected ratio over tokens or sequences."""
    difference = (old - batch.sampling_per_token_logps).abs()
    scored = batch.mask & ~difference.isnan()
    metrics = {
        "sampling/sampling_logp_difference/mean": where(scored, difference, 0.0).sum() / scored.sum().clamp(min=1),
        "sampling/sampling_logp_difference/max": _extreme(difference, scored, largest=True),
    }
    if sampler is not None:
        per_sequence = config.importance_sampling_mode.startswith("sequence")
        counted = batch.lengths >= 0 if per_sequence else batch.mask
        mean = where(counted, sampler, 0.0).sum() / counted.sum().clamp(min=1)
        metrics["sampling/importance_sampling_ratio/min"] = _extreme(sampler, counted, largest=False)
        metrics["sampling/importance_sampling_ratio/mean"] = mean
        metrics["sampling/importance_sampling_ratio/max"] = _extreme(sampler, counted, largest=True)
    return metrics


def _token_mean(x: Tensor, batch: TokenBatch) -> Tensor:
    return batch.masked(x).sum() / batch.lengths.sum().clamp(min=1.0)


def _sequence_mean(x: Tensor, batch: TokenBatch) -> Tensor:
    """(S,) mean over each sequence's unmasked rows, 0 for an empty one."""
    return batch.segment_sum(x.to(batch.lengths.dtype)) / batch.lengths.clamp(min=1.0)


def _decision_mean(clipped: Tensor, per_sequence: bool, batch: TokenBatch) -> Tensor:
    if per_sequence:
        return _sequence_mean(clipped, batch).sum() / max(batch.num_sequences, 1)
    return _token_mean(clipped.to(batch.lengths.dtype), batch)


def _extreme(x: Tensor, keep: Tensor, *, largest: bool) -> Tensor:
    """Largest or smallest kept value, 0 when nothing is kept."""
    if x.numel() == 0:
        return x.new_zeros(())
    value = where(keep, x, -inf).amax() if largest else where(keep, x, inf).amin()
    return where(keep.any(), value, 0.0)
