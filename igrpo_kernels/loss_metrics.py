"""What a loss call reports beside the loss, measured as TRL measures it, without a host sync.

Each value covers this call's tokens only. Means over several micro-batches or ranks are the caller's to weight.
"""

from collections.abc import Callable

from torch import Tensor, float64, inf, where

from igrpo_kernels.batch import TokenBatch
from igrpo_kernels.losses import CISPO, CLIPPED, VESPO, TermInputs, vespo_phi
from igrpo_kernels.rejection import accepts
from igrpo_kernels.types import GRPOLossConfig


def objective_metrics(
    rows: TermInputs,  # the importance weight before the delta clamp, the sampler ratio after truncation or masking
    entropy: Tensor | None,  # (n,)
    kl: Tensor | None,  # (n,) bias-corrected if configured
    policy_loss: Tensor,  # () loss without the entropy bonus
    config: GRPOLossConfig,
) -> dict[str, Tensor]:
    """TRL's metric names -> detached 0-d tensors. Call under `no_grad`."""
    metrics: dict[str, Tensor] = {}
    batch, weight = rows.batch, rows.weight
    if entropy is not None:
        metrics["entropy"] = _token_mean(entropy, batch)
    if kl is not None:
        metrics["kl"] = _token_mean(kl, batch)
    if config.entropy_coef != 0.0:
        metrics["policy_loss"] = policy_loss.detach().clone()
    if config.loss.term is CLIPPED:
        metrics |= _clip_metrics(weight, batch, config)
    elif config.loss.term is CISPO:
        clipped, per_sequence = _decisions(weight, batch, config, lambda w, a: (w > config.clip_high) & (a > 0))
        metrics["cispo_clip_ratio"] = _decision_mean(clipped, per_sequence, batch)
    elif config.loss.term.leaves is not None:
        leaves = config.loss.term.leaves(rows, config).to(batch.lengths.dtype)
        metrics["clip_ratio/low_mean"] = _token_mean(leaves * (batch.advantages < 0), batch)
        metrics["clip_ratio/high_mean"] = _token_mean(leaves * (batch.advantages > 0), batch)
        metrics["clip_ratio/region_mean"] = _token_mean(leaves, batch)
    elif config.loss.term is VESPO:
        metrics["vespo/phi_seq_mean"] = _phi_mean(vespo_phi(rows, config), batch)
    if batch.sampling_per_token_logps is not None:
        metrics |= _sampling_metrics(rows.old, rows.sampler, batch, config)
    if (accepted := accepts(rows.old, batch, config)) is not None:
        metrics["sampling/rollout_rs_masked_fraction"] = _token_mean((~accepted).to(batch.lengths.dtype), batch)
    return metrics


def kept_metrics(sizes: Tensor, batch: TokenBatch) -> dict[str, Tensor]:
    """From the size of each token's kept set (n,)."""
    return {"sampling/kept_tokens/mean": _token_mean(sizes.to(batch.lengths.dtype), batch)}


def teacher_metrics(divergence: Tensor, taught: Tensor) -> dict[str, Tensor]:
    """From D (n,) and whether a token has a teacher (n,)."""
    total = divergence.detach().sum(dtype=float64) / taught.sum().clamp(min=1)
    return {"self_distillation/distillation_loss": total.to(divergence.dtype)}


def _clip_metrics(weight: Tensor, batch: TokenBatch, config: GRPOLossConfig) -> dict[str, Tensor]:
    """Shares of clipped decisions: strict inequalities, by the sign of A, after the delta clamp; A = 0 never clips."""

    def bounded(w: Tensor) -> Tensor:
        return w if config.delta is None else w.clamp(max=config.delta)

    low, low_share = _decisions(weight, batch, config, lambda w, a: (bounded(w) < config.clip_low) & (a < 0))
    high, high_share = _decisions(weight, batch, config, lambda w, a: (bounded(w) > config.clip_high) & (a > 0))
    # TRL leaves empty sequences out on the token level only.
    counted = batch.lengths > 0 if low_share is None else batch.lengths >= 0
    metrics = {
        "clip_ratio/low_mean": _decision_mean(low, low_share, batch),
        "clip_ratio/low_min": _extreme(_share(low, low_share, batch), counted, largest=False),
        "clip_ratio/high_mean": _decision_mean(high, high_share, batch),
        "clip_ratio/high_max": _extreme(_share(high, high_share, batch), counted, largest=True),
        "clip_ratio/region_mean": _decision_mean(
            low | high, None if low_share is None else low_share + high_share, batch
        ),
    }
    if config.dual_clip is not None:
        dual, share = _decisions(weight, batch, config, lambda w, a: (bounded(w) > config.dual_clip) & (a < 0))
        metrics["clip_ratio/dual_mean"] = _decision_mean(dual, share, batch)
    return metrics


def _decisions(
    weight: Tensor, batch: TokenBatch, config: GRPOLossConfig, clips: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor | None]:
    """Bool (n,), and where neither the ratio nor the advantage varies inside a sequence, 0 or 1 per sequence (S,).

    TRL then counts sequences, empty ones with the weight 1 of no tokens.
    """
    rows = clips(weight, batch.advantages)
    if config.importance_sampling_level != "sequence" or batch.sequence_advantages is None:
        return rows, None
    of_none = clips(batch.lengths.new_ones(()), batch.sequence_advantages).to(batch.lengths.dtype)
    return rows, where(batch.lengths > 0, _sequence_mean(rows, batch), of_none)


def _phi_mean(phi: Tensor, batch: TokenBatch) -> Tensor:
    if batch.sequence_advantages is None:
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


def _decision_mean(rows: Tensor, per_sequence: Tensor | None, batch: TokenBatch) -> Tensor:
    if per_sequence is not None:
        return per_sequence.sum() / max(batch.num_sequences, 1)
    return _token_mean(rows.to(batch.lengths.dtype), batch)


def _share(rows: Tensor, per_sequence: Tensor | None, batch: TokenBatch) -> Tensor:
    return _sequence_mean(rows, batch) if per_sequence is None else per_sequence


def _extreme(x: Tensor, keep: Tensor, *, largest: bool) -> Tensor:
    """Largest or smallest kept value, 0 when nothing is kept."""
    if x.numel() == 0:
        return x.new_zeros(())
    value = where(keep, x, -inf).amax() if largest else where(keep, x, inf).amin()
    return where(keep.any(), value, 0.0)
