"""Liger's two GRPO losses by name, signature, default and return value, computed by this package.

    from igrpo_kernels.integrations.liger import LigerFusedLinearGRPOLoss, triton_grpo_loss

Nothing of Liger is needed. Every default is Liger's, the surprising ones included: temperature 0.9, beta 0.04 and
eps_high 0.4 in `triton_grpo_loss`; LUSPO scaled by length and averaged over all B·T positions, which the fused class
does without a mask; with `num_items_in_batch=None`, the denominator of dapo, cispo and vespo is averaged over the
processes of torch.distributed by an all-reduce inside the loss (pass the number to avoid it). What differs:

* tensors need not be contiguous, T may exceed 65,535, a new T compiles nothing;
* where `vllm_is_ratio` is given per token, padding counts nothing in VESPO's sequence weight;
* `compiled` and `chunk_size` are accepted and have no effect;
* LUSPO from 16-bit hidden states keeps fp32 logits, where Liger rounds them: nearer to fp64 by an order of magnitude;
* `inplace=True` lets the gradient take the memory of `logits` already in the forward pass, where Liger waits for
  backward: whoever reads the logits after the loss passes `inplace=False`.
"""

import warnings

import torch
from torch import Tensor

from igrpo_kernels import GRPOLossConfig, grpo_loss, linear_grpo_loss, linear_selective_log_softmax
from igrpo_kernels.batch import TokenBatch
from igrpo_kernels.logprobs import selective_log_softmax
from igrpo_kernels.losses import CISPO, CLIPPED, LOSSES, NUM_ITEMS, SEQUENCE_SUM, TermInputs
from igrpo_kernels.objective import importance_weight, per_token_kl

__all__ = ["LigerFusedLinearGRPOLoss", "triton_grpo_loss"]


def triton_grpo_loss(
    logits: Tensor,  # (B, T+1, V)
    old_logp: Tensor | None,  # (B, T)
    ref_logp: Tensor | None,  # (B, T)
    completion_ids: Tensor,  # (B, T)
    advantages: Tensor,  # (B,)
    completion_mask: Tensor | None = None,  # (B, T)
    temperature: float = 0.9,
    beta: float = 0.04,
    eps_low: float = 0.2,
    eps_high: float = 0.4,
    inplace: bool = True,
    loss_type: str = "dapo",
    max_completion_length: int | None = None,
    importance_sampling_level: str = "token",
    reduce: bool = False,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    vllm_is_ratio: Tensor | None = None,  # (B, T), (B, 1) or (B,)
    delta: float | None = None,
    use_bias_correction_kl: bool = False,
    num_items_in_batch: Tensor | float | None = None,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
) -> tuple:
    """GRPO loss from logits, row t predicting completion_ids[:, t]; the last row of `logits` is not used.

    Equations: the loss type's row of the table in docs/algorithm.md, `importance_weight`, `per_token_kl` and
    `reduce_loss` in `igrpo_kernels/objective.py`.

    Args: as in Liger. Any float dtype of logits; fp32 log-probabilities in nats; a mask of 0 and 1.
        old_logp: None = those of `logits`, so that every ratio is 1.
        ref_logp: needed where beta is not 0.
        eps_low, eps_high: the ratio is clipped to [1 - eps_low, 1 + eps_high]; cispo: to at most eps_high.
        inplace: the gradient may take the memory of `logits`.
        max_completion_length: tokens, the divisor of dr_grpo; None = T.
        reduce: return the batch's loss instead of the tokens'.
        vllm_is_ratio: multiplies each token's policy term; vespo folds it into its sequence weight.
        delta: upper bound of the unclipped ratio; None = none.
        use_bias_correction_kl: multiply the KL by the importance ratio.
        num_items_in_batch: tokens of the optimiser step over all processes, the divisor of dapo, cispo and vespo.

    Returns:
        reduce=False: per-token loss (B, T), differentiable; per-token KL (B, T) or None; clipped (B, T), 0 or 1; all
        fp32 and 0 on masked tokens. reduce=True: the loss (), and [mean KL, clip ratio], without the first if beta=0.

    Raises:
        ValueError: what `GRPOLossConfig` refuses, and the sequence level with cispo, sapo and vespo, as in Liger.
    """
    if max_completion_length is None:
        max_completion_length = completion_ids.shape[1]
    config = _config(
        loss_type, importance_sampling_level, epsilon=eps_low, epsilon_high=eps_high, delta=delta, beta=beta,
        use_bias_correction_kl=use_bias_correction_kl, temperature=temperature,
        max_completion_length=max_completion_length, sapo_temperature_pos=sapo_temperature_pos,
        sapo_temperature_neg=sapo_temperature_neg, vespo_k_pos=vespo_k_pos, vespo_lambda_pos=vespo_lambda_pos,
        vespo_k_neg=vespo_k_neg, vespo_lambda_neg=vespo_lambda_neg,
    )  # fmt: skip
    mask = torch.ones_like(completion_ids) if completion_mask is None else completion_mask
    batch = _batch(completion_ids, mask, advantages, old_logp, ref_logp)
    ratio = _ratio(vllm_is_ratio, mask, loss_type)
    if reduce and ratio is None and loss_type != "luspo":  # one pass over the logits
        out = grpo_loss(
            logits[:, :-1], completion_ids, advantages, completion_mask=mask, old_per_token_logps=old_logp,
            ref_per_token_logps=ref_logp, num_items_in_batch=_denominator(mask, num_items_in_batch, loss_type),
            config=config, inplace=inplace,
        )  # fmt: skip
        with torch.no_grad():
            _, kl, clipped = _per_token(out.per_token_logps, batch, batch, config, None)
        return out.loss, _metrics(kl, clipped, mask)
    ids = torch.where(mask != 0, completion_ids, 0)
    logps = selective_log_softmax(logits[:, :-1], ids, temperature=temperature)
    loss, kl, clipped = _per_token(logps, batch, batch, config, ratio)
    if not reduce:
        return loss * mask, None if kl is None else kl * mask, clipped * mask
    return _reduce(loss * mask, mask, batch, config, num_items_in_batch), _metrics(kl, clipped, mask)


class LigerFusedLinearGRPOLoss(torch.nn.Module):
    """GRPO loss from hidden states and the lm_head, logits never whole. Arguments and defaults are Liger's.

    Equations and arguments: `triton_grpo_loss`, with epsilon_low and epsilon_high for eps_low and eps_high. Hidden
    states and weight of any float dtype; gradients have their input's.
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ):
        super().__init__()
        self.beta, self.compiled, self.use_ref_model, self.chunk_size = beta, compiled, use_ref_model, chunk_size
        self.loss_type, self.importance_sampling_level = loss_type, importance_sampling_level
        self.settings = {
            "epsilon": epsilon_low, "epsilon_high": epsilon_high, "max_completion_length": max_completion_length,
            "sapo_temperature_pos": sapo_temperature_pos, "sapo_temperature_neg": sapo_temperature_neg,
            "temperature": temperature, "delta": delta, "use_bias_correction_kl": use_bias_correction_kl,
            "vespo_k_pos": vespo_k_pos, "vespo_lambda_pos": vespo_lambda_pos,
            "vespo_k_neg": vespo_k_neg, "vespo_lambda_neg": vespo_lambda_neg,
        }  # fmt: skip

    def forward(
        self,
        _input: Tensor,  # (B, T, H)
        lin_weight: Tensor,  # (V, H)
        selected_token_ids: Tensor,  # (B, T)
        attention_mask: Tensor,  # (B, T)
        advantages: Tensor,  # (B,)
        bias: Tensor | None = None,  # (V,)
        ref_per_token_logps: Tensor | None = None,  # (B, T)
        old_per_token_logps: Tensor | None = None,  # (B, T)
        ref_input: Tensor | None = None,  # (B, T, H)
        ref_weight: Tensor | None = None,  # (V, H)
        ref_bias: Tensor | None = None,  # (V,)
        vllm_is_ratio: Tensor | None = None,  # (B, T), (B, 1) or (B,)
        num_items_in_batch: Tensor | float | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss () and (mean KL in nats, clip ratio), without the first if beta=0.

        The reference is `ref_per_token_logps`, or computed from `ref_input`, `ref_weight` and `ref_bias`.

        Raises:
            ValueError: `use_ref_model` without either of them, dr_grpo without `max_completion_length`, a
            `vllm_is_ratio` of another shape, and what `triton_grpo_loss` refuses.
        """
        head = {"lm_head_bias": bias}
        mask, ids = attention_mask, selected_token_ids
        ref = self._reference(ids, mask, ref_per_token_logps, ref_input, ref_weight, ref_bias)
        # Without a reference Liger takes the policy itself: KL 0 with gradient 0.
        config = self._config(0.0 if ref is None else self.beta)
        batch = _batch(ids, mask, advantages, old_per_token_logps, ref)
        ratio = _ratio(vllm_is_ratio, mask, self.loss_type)
        if ratio is None and self.loss_type != "luspo":
            out = linear_grpo_loss(
                _input, lin_weight, ids, advantages, **head, completion_mask=mask,
                old_per_token_logps=old_per_token_logps, ref_per_token_logps=ref, config=config,
                num_items_in_batch=_denominator(mask, num_items_in_batch, self.loss_type),
            )  # fmt: skip
            with torch.no_grad():
                _, kl, clipped = _per_token(out.per_token_logps, batch, batch, config, None)
            return out.loss, self._metrics(kl, clipped, mask)
        unmasked = self.loss_type == "luspo"
        logps = linear_selective_log_softmax(
            _input, lin_weight, ids, **head, temperature=config.temperature, row_mask=None if unmasked else mask,
            fp32_logits=self._exact_logits,
        )  # fmt: skip
        everywhere = _batch(ids, torch.ones_like(ids), advantages, old_per_token_logps, ref) if unmasked else batch
        loss, kl, clipped = _per_token(logps, everywhere, batch, config, ratio)
        loss = loss if unmasked else loss * mask
        return _reduce(loss, mask, batch, config, num_items_in_batch), self._metrics(kl, clipped, mask)

    def _config(self, beta: float) -> GRPOLossConfig:
        if self.loss_type == "dr_grpo" and self.settings["max_completion_length"] is None:
            raise ValueError("max_completion_length must be provided for loss_type 'dr_grpo'")
        return _config(self.loss_type, self.importance_sampling_level, beta=beta, **self.settings)

    def _reference(self, ids, mask, logps, hidden, weight, bias) -> Tensor | None:
        if not self.use_ref_model:
            return None
        if logps is None and hidden is None:
            raise ValueError("If use_ref_model is True, ref_per_token_logps or ref_input must be provided")
        if logps is not None:
            if hidden is not None:
                warnings.warn(
                    "Both ref_per_token_logps and ref_input are provided. Using ref_per_token_logps.", stacklevel=3
                )
            return logps
        with torch.no_grad():
            return linear_selective_log_softmax(
                hidden, weight, ids, lm_head_bias=bias, temperature=self.settings["temperature"],
                row_mask=None if self.loss_type == "luspo" else mask, fp32_logits=self._exact_logits,
            )  # fmt: skip

    @property
    def _exact_logits(self) -> bool:
        """LUSPO multiplies what rounding loses by the length: neither model's logits are rounded to 16 bits there."""
        return self.loss_type == "luspo"

    def _metrics(self, kl: Tensor | None, clipped: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        kl = torch.zeros_like(clipped) if kl is None and self.beta != 0.0 else kl
        return tuple(_metrics(kl, clipped, mask))


def _config(loss_type: str, level: str, *, max_completion_length: int | None, **settings) -> GRPOLossConfig:
    if level == "sequence" and loss_type in ("cispo", "sapo", "vespo"):
        raise ValueError(
            f"Sequence-level importance sampling is not supported for loss_type='{loss_type}'. Use "
            "importance_sampling_level='token' instead."
        )
    return GRPOLossConfig(
        loss_type=loss_type,
        importance_sampling_level=level,
        max_completion_length=max_completion_length if loss_type == "dr_grpo" else None,
        **settings,
    )


def _batch(ids: Tensor, mask: Tensor, advantages: Tensor, old: Tensor | None, ref: Tensor | None) -> TokenBatch:
    return TokenBatch.build(
        ids, advantages.float(), dtype=torch.float32, completion_mask=mask,
        old_per_token_logps=None if old is None else old.float(),
        ref_per_token_logps=None if ref is None else ref.float(),
    )  # fmt: skip


def _ratio(ratio: Tensor | None, mask: Tensor, loss_type: str) -> Tensor | None:
    """(B, T). VESPO multiplies a sequence's ratios, so there one per sequence stands on its first token alone."""
    if ratio is None:
        return None
    b, t = mask.shape
    if tuple(ratio.shape) not in ((b,), (b, 1), (b, t)):
        raise ValueError(f"vllm_is_ratio has shape {tuple(ratio.shape)}; it must be ({b},), ({b}, 1) or ({b}, {t})")
    ratio = ratio[:, None] if ratio.dim() == 1 else ratio
    if loss_type == "vespo" and ratio.shape[1] == 1:
        first = (mask != 0) & (mask.cumsum(1) == 1)
        return torch.where(first, ratio, 1.0)
    return ratio.expand(mask.shape)


def _per_token(
    logps: Tensor,  # (B, T)
    batch: TokenBatch,
    lengths: TokenBatch,  # the same with the true mask, over which a sequence's ratio is a mean
    config: GRPOLossConfig,
    ratio: Tensor | None,  # (B, T)
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Loss, KL or None, and clipped (0 or 1) per token, each (B, T); clipping is measured before the delta clamp."""
    logps = batch.masked(logps.reshape(-1))
    old = logps.detach() if batch.old_per_token_logps is None else batch.old_per_token_logps
    weight = importance_weight(logps - old, lengths, config)
    term = config.loss.term
    sampler = ratio.reshape(-1) if ratio is not None and term.takes_sampler else None
    loss = term.function(TermInputs(logps, old, logps - old, weight, batch.advantages, sampler, batch), config)
    if ratio is not None and not term.takes_sampler:
        loss = loss * ratio.reshape(-1)
    kl = None
    if config.beta != 0.0:
        kl = per_token_kl(logps, batch.ref_per_token_logps, weight, config)
        loss, kl = loss + config.beta * kl, kl.detach().view(batch.shape)
    above = (weight > config.clip_high) & (batch.advantages > 0)
    if term is CLIPPED:
        clipped = above | ((weight < config.clip_low) & (batch.advantages < 0))
    else:
        clipped = above & (term is CISPO)
    return loss.view(batch.shape), kl, clipped.float().view(batch.shape)


def _reduce(
    loss: Tensor, mask: Tensor, batch: TokenBatch, config: GRPOLossConfig, num_items: Tensor | float | None
) -> Tensor:
    """(B, T) -> (), as Liger reduces."""
    mask = mask.float()
    if config.loss.reduction is SEQUENCE_SUM:
        return (loss * mask.sum(-1, keepdim=True)).mean()
    weights = config.loss.reduction.weights(batch, config, _denominator(mask, num_items, config.loss_type))
    return (loss.sum(-1) * weights).sum()


def _denominator(mask: Tensor, num_items: Tensor | float | None, loss_type: str) -> Tensor | None:
    """Of losses that divide by num_items: this process's share of the step's tokens, at least 1."""
    if LOSSES[loss_type].reduction is not NUM_ITEMS:
        return None
    world = 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        world = torch.distributed.get_world_size()
    if num_items is None:
        total = mask.sum().float()
        if world > 1:
            torch.distributed.all_reduce(total)
    else:
        total = torch.as_tensor(num_items, dtype=torch.float32, device=mask.device)
    return (total / world).clamp(min=1.0)


def _metrics(kl: Tensor | None, clipped: Tensor, mask: Tensor) -> list[Tensor]:
    count = mask.sum().clamp(min=1.0)
    return [(x * mask).sum() / count for x in (kl, clipped) if x is not None]
