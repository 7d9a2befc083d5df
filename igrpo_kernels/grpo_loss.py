"""The two public losses: from logits, or from hidden states and the lm_head so that logits never exist whole."""

from torch import Tensor

from igrpo_kernels.batch import TokenBatch, compute_dtype
from igrpo_kernels.impls import resolve_impl
from igrpo_kernels.logprobs import check_index, check_linear_shapes, check_logits_shape
from igrpo_kernels.types import GRPOLossConfig, GRPOLossOutput

_DEFAULT_CONFIG = GRPOLossConfig()


def grpo_loss(
    logits: Tensor,  # (B, T, V) or (n, V)
    completion_ids: Tensor,  # (B, T) or (n,)
    advantages: Tensor,  # (B,) | (S,) | shape of completion_ids
    *,
    completion_mask: Tensor | None = None,  # shape of completion_ids
    old_per_token_logps: Tensor | None = None,  # shape of completion_ids
    ref_per_token_logps: Tensor | None = None,  # shape of completion_ids
    sampling_per_token_logps: Tensor | None = None,  # shape of completion_ids
    cu_seqlens: Tensor | None = None,  # (S+1,)
    num_items_in_batch: Tensor | float | None = None,
    config: GRPOLossConfig = _DEFAULT_CONFIG,
    impl: str = "auto",
    inplace: bool = False,
) -> GRPOLossOutput:
    """GRPO-family loss and its gradient from logits. The equations are in `igrpo_kernels/objective.py`.

    Args:
        logits: (B, T, V), row t predicting completion_ids[:, t] (already shifted; any strides, so a view such as
            ``logits[:, -T-1:-1]`` is fine), or packed (n, V). fp64, fp32, bf16 or fp16.
        completion_ids: (B, T), or packed (n,) together with `cu_seqlens`. int32 or int64; masked values are ignored.
        advantages: one per sequence, (B,) or (S,), or one per token. Float.
        completion_mask: 0/1 (bool, int or float), None = all ones. A masked position changes nothing and gets gradient
            exactly 0, even if its logits, log-probs or ids are garbage or NaN.
        old_per_token_logps: log-probs of the policy that started the update; None = the current ones (ratio 1).
        ref_per_token_logps: log-probs of the reference model; required when config.beta != 0.
        sampling_per_token_logps: log-probs the sampler reported, NaN where unknown. Used by importance_sampling_mode,
            off_policy_mask_threshold and the `sampling/...` metrics.
        cu_seqlens: (S+1,) int offsets 0..n of the packed sequences; empty sequences are allowed.
        num_items_in_batch: denominator of dapo, cispo and vespo (see below); None = this call's unmasked tokens.
        config: the loss; None of its values triggers a recompilation.
        impl: "auto" or a name from `available_impls()`; the environment variable IGRPO_KERNELS_IMPL replaces "auto".
        inplace: allow the gradient to overwrite the storage of `logits`. The torch implementation ignores it.

    Returns:
        GRPOLossOutput with loss (), per_token_logps and entropy in the shape of completion_ids, and metrics.

    Denominators. No collective is ever issued and no accumulation factor is applied. With S sequences (B if padded)
    and n unmasked tokens in this call, and S_total and n_total in the whole optimiser step over all micro-batches and
    ranks, the sum over micro-batches of the scaled losses is exactly the loss of the whole step:

        loss_type              divides by                        to accumulate exactly
        grpo, sapo, luspo      S (num_items has no effect)       loss · S / S_total
        dr_grpo                S · max_completion_length         loss · S / S_total
        bnpo                   n                                 loss · n / n_total
        dapo, cispo, vespo     num_items_in_batch                pass num_items_in_batch = n_total, then add

    Where gradients are averaged over W ranks (DDP, FSDP), multiply by W (or pass n_total / W). The entropy bonus is a
    mean over this call's n tokens whatever the loss type; to make it exact as well, scale entropy_coef by
    (n / n_total) divided by the factor applied to the loss. top_entropy_quantile is taken per call. A sequence must
    not be split over calls: sequence ratios, n_b and OPSM need all its tokens.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit (with the shapes), ids outside the vocabulary (on the CPU;
            NaN rows elsewhere), missing ref_per_token_logps, unknown `impl`.
        RuntimeError: `impl` names an implementation this installation cannot run.

    Example:
        >>> out = grpo_loss(model(ids).logits[:, -T - 1 : -1], completion_ids, advantages, completion_mask=mask)
        >>> out.loss.backward()
    """
    check_logits_shape("logits", logits, completion_ids)
    batch = TokenBatch.build(
        completion_ids,
        advantages,
        dtype=compute_dtype(logits.dtype),
        completion_mask=completion_mask,
        old_per_token_logps=old_per_token_logps,
        ref_per_token_logps=ref_per_token_logps,
        sampling_per_token_logps=sampling_per_token_logps,
        cu_seqlens=cu_seqlens,
    )
    check_index(batch.index, logits.device, logits.shape[-1])
    _check_config_inputs(config, batch, num_items_in_batch)
    module = resolve_impl(impl, logits.device.type)
    return _output(module.grpo_loss(logits, batch, config, num_items_in_batch, inplace=inplace), batch)


def linear_grpo_loss(
    hidden_states: Tensor,  # (B, T, H) or (n, H)
    lm_head_weight: Tensor,  # (V, H)
    completion_ids: Tensor,  # (B, T) or (n,)
    advantages: Tensor,  # (B,) | (S,) | shape of completion_ids
    *,
    lm_head_bias: Tensor | None = None,  # (V,)
    completion_mask: Tensor | None = None,  # shape of completion_ids
    old_per_token_logps: Tensor | None = None,  # shape of completion_ids
    ref_per_token_logps: Tensor | None = None,  # shape of completion_ids
    sampling_per_token_logps: Tensor | None = None,  # shape of completion_ids
    cu_seqlens: Tensor | None = None,  # (S+1,)
    num_items_in_batch: Tensor | float | None = None,
    config: GRPOLossConfig = _DEFAULT_CONFIG,
    impl: str = "auto",
    inplace: bool = False,
) -> GRPOLossOutput:
    """`grpo_loss` of the logits `hidden_states @ lm_head_weight.T + lm_head_bias`, which never exist whole.

    Args:
        hidden_states: (B, T, H), row t predicting completion_ids[:, t], or packed (n, H). Rows masked out are dropped
            before the matmul, so prompt tokens may stay in a packed batch under a mask of 0.
        lm_head_weight: (V, H), as nn.Linear stores it. Frozen (requires_grad=False) means no dW work at all.
        lm_head_bias: (V,).
        inplace: has no effect here: the chunk buffers are this function's own.
        Everything else: see `grpo_loss`, including the denominators.

    Memory, dtypes and FLOPs: see `linear_selective_log_softmax`. Backward skips tokens whose gradient is exactly zero
    (clipped, A = 0 without KL and entropy bonus).

    Returns, Raises: see `grpo_loss`.

    Example:
        >>> hidden = model.model(input_ids).last_hidden_state[0]          # (n, H), packed
        >>> out = linear_grpo_loss(hidden[:-1], model.lm_head.weight, input_ids[0, 1:], advantages, cu_seqlens=cu)
        >>> out.loss.backward()
    """
    check_linear_shapes(hidden_states, lm_head_weight, lm_head_bias, completion_ids)
    batch = TokenBatch.build(
        completion_ids,
        advantages,
        dtype=compute_dtype(hidden_states.dtype),
        completion_mask=completion_mask,
        old_per_token_logps=old_per_token_logps,
        ref_per_token_logps=ref_per_token_logps,
        sampling_per_token_logps=sampling_per_token_logps,
        cu_seqlens=cu_seqlens,
    )
    check_index(batch.index, hidden_states.device, lm_head_weight.shape[0])
    _check_config_inputs(config, batch, num_items_in_batch)
    module = resolve_impl(impl, hidden_states.device.type)
    hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
    rows = module.linear_grpo_loss(hidden, lm_head_weight, lm_head_bias, batch, config, num_items_in_batch)
    return _output(rows, batch)


def _output(rows: tuple[Tensor, Tensor, Tensor, dict[str, Tensor]], batch: TokenBatch) -> GRPOLossOutput:
    loss, logps, entropy, metrics = rows
    return GRPOLossOutput(loss, logps.detach().view(batch.shape), entropy.detach().view(batch.shape), metrics)


def _check_config_inputs(config: GRPOLossConfig, batch: TokenBatch, num_items_in_batch: Tensor | float | None) -> None:
    if config.beta != 0.0 and batch.ref_per_token_logps is None:
        raise ValueError(f"beta={config.beta} needs ref_per_token_logps, got None; pass them or set beta=0.0")
    if config.importance_sampling_mode is not None and batch.sampling_per_token_logps is None:
        raise ValueError(
            f"importance_sampling_mode={config.importance_sampling_mode!r} needs sampling_per_token_logps, got None; "
            "pass them or set importance_sampling_mode=None"
        )
    if isinstance(num_items_in_batch, Tensor) and num_items_in_batch.numel() != 1:
        raise ValueError(f"num_items_in_batch must be one number, got shape {tuple(num_items_in_batch.shape)}")
