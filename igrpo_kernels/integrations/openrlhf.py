"""OpenRLHF: `PolicyLoss` and `log_probs_from_logits` with the signatures and return values of OpenRLHF 0.11.2.

Releases 0.11.0 and 0.11.1 have other names for the sampler's correction.

from igrpo_kernels.integrations.openrlhf import PolicyLoss, log_probs_from_logits
"""

import torch
from torch import Tensor

from igrpo_kernels import GRPOLossConfig, SamplingMask, selective_log_softmax
from igrpo_kernels.integrations.per_token import LOG_RATIO_LIMIT, clipped, masked_mean, per_token_policy_loss

__all__ = ["PolicyLoss", "log_probs_from_logits"]

_SMALLEST = 1e-6  # probabilities stay so far from 0 and 1


def log_probs_from_logits(
    logits: Tensor,  # (..., V)
    labels: Tensor,  # (...)
    temperature: float = 1.0,
    *,
    sampling_mask: SamplingMask | None = None,  # one set per label
) -> Tensor:
    """log softmax(logits / temperature) at `labels` (...), fp32; unlike OpenRLHF's, `logits` keep their values.

    `sampling_mask`, which OpenRLHF's does not take: what a sampler with top_p or top_k kept; see `grpo_loss`.
    """
    return selective_log_softmax(logits, labels, temperature=temperature, sampling_mask=sampling_mask)


class PolicyLoss(torch.nn.Module):
    """Clipped PPO or GSPO loss on log-probabilities. Arguments and defaults are OpenRLHF's.

    What differs: what stands under the mask, NaN included, changes nothing; a batch that is masked whole gives 0.
    Equations: row "grpo" of the table in docs/algorithm.md.

    Args:
        clip_eps_low, clip_eps_high: the ratio is clipped to [1 - clip_eps_low, 1 + clip_eps_high].
        dual_clip: bound c > 1 of -A·ratio by -A·c where A < 0; None = none.
        token_level_loss: mean over tokens; else over sequences of each one's mean, as always with gspo.
        policy_loss_type: "ppo", or "gspo": one ratio per sequence.
        is_correction_level: weigh with exp(old - rollout) per "token", judge it per "seq", or "off".
        is_correction_mode: what lies outside is dropped ("mask") or, per token, clamped ("clip").
        is_correction_gating: what is judged: the "ratio", or how far "binary_kl" or "tv" say that the sampled token's
            probability is from the sampler's; per sequence the ratio's geometric mean, the others' mean.
        is_correction_threshold: the interval (low, high); of the two distances low must be 0.

    Raises:
        ValueError: an unknown name, "clip" with "seq" or with a distance, and what `GRPOLossConfig` refuses.
    """

    def __init__(
        self,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        token_level_loss: bool = True,
        policy_loss_type: str = "ppo",
        is_correction_level: str = "off",
        is_correction_mode: str = "mask",
        is_correction_gating: str = "ratio",
        is_correction_threshold: tuple[float, float] = (0.5, 5.0),
    ):
        super().__init__()
        if policy_loss_type not in ("ppo", "gspo"):
            raise ValueError(f"policy_loss_type={policy_loss_type!r} is unknown; choose 'ppo' or 'gspo'")
        if is_correction_level not in ("off", "token", "seq") or is_correction_mode not in ("mask", "clip"):
            raise ValueError("is_correction_level must be off, token or seq, and is_correction_mode mask or clip")
        if is_correction_gating not in ("ratio", "binary_kl", "tv"):
            raise ValueError(f"is_correction_gating={is_correction_gating!r} is unknown; take ratio, binary_kl or tv")
        ratio = is_correction_gating == "ratio"
        if is_correction_mode == "clip" and (is_correction_level == "seq" or not ratio):
            raise ValueError(
                "is_correction_mode=clip requires is_correction_level=token and is_correction_gating=ratio"
            )
        if not ratio and is_correction_level != "off" and is_correction_threshold[0] > 0:
            raise ValueError(
                f"is_correction_gating={is_correction_gating!r} has an upper bound only; write "
                f"is_correction_threshold=(0, {is_correction_threshold[1]})"
            )
        self.config = GRPOLossConfig(
            epsilon=clip_eps_low, epsilon_high=clip_eps_high, dual_clip=dual_clip,
            importance_sampling_level="sequence" if policy_loss_type == "gspo" else "token",
        )  # fmt: skip
        self.gspo = policy_loss_type == "gspo"
        self.token_level_loss = token_level_loss and not self.gspo
        self.is_correction_level, self.is_correction_mode = is_correction_level, is_correction_mode
        self.is_correction_gating, self.is_correction_threshold = is_correction_gating, is_correction_threshold

    def forward(
        self,
        log_probs: Tensor,  # (B, T)
        old_log_probs: Tensor,  # (B, T)
        advantages: Tensor,  # (B, T)
        action_mask: Tensor | None = None,  # (B, T)
        rollout_log_probs: Tensor | None = None,  # (B, T)
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Loss (), share of clipped tokens (), -mean log-ratio (), and with a correction: mean log-ratio of sampler to
        trainer (), share of filtered units ()."""
        mask = torch.ones_like(log_probs) if action_mask is None else action_mask
        corrects = self.is_correction_level != "off"
        behaviour = rollout_log_probs if self.gspo and corrects else old_log_probs
        limit = torch.inf if self.gspo else LOG_RATIO_LIMIT
        loss, weight, _ = per_token_policy_loss(
            log_probs, behaviour, advantages, mask, self.config, log_ratio_limit=limit
        )
        vllm_kl, filtered_share = None, None
        if corrects and not self.gspo:
            coefficient, filtered = self._correction(old_log_probs, rollout_log_probs, mask)
            loss = loss * coefficient
            share = filtered.to(loss.dtype)
            filtered_share = share.mean() if self.is_correction_level == "seq" else masked_mean(share, mask)
            vllm_kl = masked_mean(rollout_log_probs - old_log_probs, mask)
        loss = self._aggregate(loss, mask, dp_size, batch_num_tokens, global_batch_size)
        clip_ratio = masked_mean(clipped(weight, advantages, self.config).to(loss.dtype), mask)
        return loss, clip_ratio, masked_mean(old_log_probs - log_probs, mask), vllm_kl, filtered_share

    def _correction(self, old: Tensor, rollout: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Factor of each token's loss (B, T), and which tokens (B, T) or sequences (B, 1) lie outside the band."""
        low, high = self.is_correction_threshold
        old, rollout = (torch.where(mask != 0, x.detach(), 0.0) for x in (old, rollout))
        statistic = old - rollout
        ratio = statistic.exp()
        if self.is_correction_gating != "ratio":
            p, q = (x.exp().clamp(_SMALLEST, 1 - _SMALLEST) for x in (rollout, old))
            statistic = (p - q).abs()
            if self.is_correction_gating == "binary_kl":
                statistic = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        if self.is_correction_level == "seq":
            statistic = torch.where(mask != 0, statistic, 0.0).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)
        if self.is_correction_gating == "ratio":
            statistic = statistic.exp()
        outside = ~((statistic >= low) & (statistic <= high))  # NaN, of no tokens, is not inside
        if self.is_correction_mode == "clip":
            return statistic.clamp(low, high), outside
        return torch.where(outside, 0.0, ratio), outside

    def _aggregate(
        self, loss: Tensor, mask: Tensor, dp_size: int, tokens: float | None, sequences: float | None
    ) -> Tensor:
        """Mean over tokens, or over sequences of each one's mean, of the whole batch where its totals are given."""
        if self.token_level_loss:
            return loss.sum() / mask.sum().clamp(min=1) if tokens is None else loss.sum() / tokens * dp_size
        lengths = mask.sum(-1)
        per_sequence = loss.sum(-1) / lengths.clamp(min=1)
        return per_sequence.sum() / ((lengths > 0).sum().clamp(min=1) if sequences is None else sequences / dp_size)
