"""Per-token log-probabilities and entropies, from logits or straight from hidden states."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from igrpo_kernels import fused_linear_autograd, fused_loss, reference
from igrpo_kernels.batch import check_index_dtype, check_linear_shapes, check_logits_shape, compute_dtype
from igrpo_kernels.impls import resolve_impl
from igrpo_kernels.kept_rows import kernels_for
from igrpo_kernels.sampling_mask import KeptSets, SamplingMask
from igrpo_kernels.temperatures import temperature_rows
from igrpo_kernels.types import LogitTransform
from igrpo_kernels.vocab_parallel import vocabulary


def selective_log_softmax(
    logits: Tensor,  # (..., V)
    index: Tensor,  # (...)
    *,
    temperature: float = 1.0,
    temperatures: Tensor | None = None,  # (...)
    return_entropy: bool = False,
    sampling_mask: SamplingMask | None = None,  # one set per element of index
    process_group: ProcessGroup | None = None,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(logits / temperature) at `index`, and optionally the entropy of that softmax.

        logp = z[index] - logsumexp(z),   H = -sum_v p_v·log p_v,   z = logits / temperature

    Args:
        logits: (..., V), fp64, fp32, bf16 or fp16, any strides. Columns of -inf have probability 0.
        index: (...) int32 or int64, the token whose log-probability is wanted.
        temperature: > 0.
        temperatures: one per token, in place of it; see `grpo_loss`.
        return_entropy: also return H, in nats.
        sampling_mask: the tokens that a sampler's top_k, top_p or min_p kept: the softmax is over each row's own set,
            and the gradient elsewhere exactly 0. See `grpo_loss`.
        process_group: logits hold this rank's contiguous columns of a vocabulary spread over the group in rank order
            (`index` stays global); see `grpo_loss`.
        impl: "auto", or a name from `available_impls()`.

    Cost per bf16 logit: forward 2 B read; backward 2 B read and 2 B written, one buffer. State: the logits and 16 B per
    row. (impl="torch" makes several fp32 copies.) Differentiable once. torch.compile: as for `grpo_loss`.

    Returns:
        logps (...), or (logps, entropy): fp32 (fp64 for fp64 logits), both differentiable; the gradient of logits has
        their dtype. The mathematics runs in fp32 (fp64) whatever the logits' dtype.

    Raises:
        ValueError: shapes that do not match; on the CPU, an index outside [0, V). On other devices looking would cost
        a sync, so such a row's log-probability and gradient are NaN instead. The same for an index outside its set.
    """
    check_logits_shape("logits", logits, index)
    columns = logits.shape[-1]
    shard, vocab_size = vocabulary(process_group, columns, logits.device, index)
    kernels = resolve_impl(impl, logits.device.type, logits.dtype, columns)
    divisors = temperature_rows(temperatures, temperature, index, None, compute_dtype(logits.dtype))
    rows, transform = index.reshape(-1).long(), checked_transform(temperature)._replace(temperatures=divisors)
    kept = KeptSets.of(sampling_mask, rows, None, vocab_size, index.shape)
    if kernels is None:
        logps, entropy = reference.selective_log_softmax(
            logits, rows.view(index.shape), transform, return_entropy=return_entropy, shard=shard, kept=kept
        )
    else:
        kernels, rows = kernels_for(kernels, rows, shard, kept)
        logps, entropy = fused_loss.selective_log_softmax(
            kernels, logits, rows.view(index.shape), transform, return_entropy=return_entropy
        )
    return (logps, entropy) if return_entropy else logps


def linear_selective_log_softmax(
    hidden_states: Tensor,  # (..., H)
    lm_head_weight: Tensor,  # (V, H)
    index: Tensor,  # (...)
    *,
    lm_head_bias: Tensor | None = None,  # (V,)
    temperature: float = 1.0,
    temperatures: Tensor | None = None,  # (...)
    logit_scale: float = 1.0,
    final_logit_softcapping: float | None = None,
    row_mask: Tensor | None = None,  # (...)
    return_entropy: bool = False,
    sampling_mask: SamplingMask | None = None,  # one set per element of index
    fp32_logits: bool = False,
    process_group: ProcessGroup | None = None,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`selective_log_softmax` of `hidden_states @ lm_head_weight.T + lm_head_bias` without storing those logits.

    Tokens are walked in chunks: one chunk's logits exist at a time and backward computes them again. For n unmasked
    tokens that is 2·n·H·V FLOP forward and 6·n·H·V backward (4 if lm_head_weight is frozen). Kept between forward and
    backward: references to the inputs plus 16 B per token (doubled for fp64); on the CPU (impl="cpu") also the logits
    where no row is masked and they take 32 MiB at most, which saves 2·n·H·V. At the peak: one chunk of logits
    (`lm_head.CHUNK_BYTES`: 2.5 GiB on CUDA, and what a bf16 dW saves if all rows then fit; 128 MiB on the CPU), and in
    backward dW, fp32 if there are several chunks.

    Args:
        hidden_states: (..., H), fp64, fp32, bf16 or fp16.
        lm_head_weight: (V, H), any float dtype; frozen (requires_grad=False) means its gradient is never computed.
        index: (...) int32 or int64.
        lm_head_bias: (V,).
        temperature, logit_scale, final_logit_softcapping: z = softcap·tanh(logit_scale·logits/softcap) / temperature.
        temperatures: one per token, in place of temperature; see `grpo_loss`.
        row_mask: (...) bool, int or float; rows of 0 are dropped before the matmul, output 0 and gradient exactly 0.
        return_entropy: also return the entropy, in nats.
        sampling_mask: see `selective_log_softmax`.
        fp32_logits: keep 16-bit matmuls' logits in fp32 instead of rounding them to 16 bits: at |logit| ~ 16 that
            rounding alone moves probability ratios by several percent. The chunk's buffer doubles, or triples on CUDA,
            where the operands stay 16-bit; elsewhere they are widened (one temporary copy of the weight).
        process_group: lm_head_weight and lm_head_bias hold this rank's rows of a vocabulary spread over the group in
            rank order; see `grpo_loss`. The gradient of hidden_states is summed over the group.
        impl: "auto", or a name from `available_impls()`.

    Returns:
        logps (...), or (logps, entropy): fp32 (fp64 for fp64 hidden states), both differentiable once. The matmuls run
        in the autocast dtype when autocast is on, else in hidden_states' dtype (a weight of another dtype is cast, one
        temporary copy). dW and db are accumulated in fp32 and returned in their parameter's dtype.

    Raises:
        ValueError: shapes that do not match; on the CPU, an index outside [0, V) on an unmasked row (NaN elsewhere).
    """
    check_linear_shapes(hidden_states, lm_head_weight, lm_head_bias, index)
    transform = checked_transform(temperature, logit_scale, final_logit_softcapping)
    check_index_dtype(index)
    rows, mask = index.reshape(-1).long(), None
    if row_mask is not None:
        if row_mask.shape != index.shape:
            raise ValueError(f"row_mask has shape {tuple(row_mask.shape)} but index has shape {tuple(index.shape)}")
        mask = row_mask.reshape(-1) != 0
        rows = torch.where(mask, rows, 0)
    divisors = temperature_rows(temperatures, temperature, index, mask, compute_dtype(hidden_states.dtype))
    transform = transform._replace(temperatures=divisors)
    columns, device = lm_head_weight.shape[0], hidden_states.device
    shard, vocab_size = vocabulary(process_group, columns, device, rows)
    kernels = resolve_impl(impl, device.type, hidden_states.dtype, columns)
    kept = KeptSets.of(sampling_mask, rows, mask, vocab_size, index.shape)
    head = (hidden_states.reshape(-1, hidden_states.shape[-1]), lm_head_weight, lm_head_bias)
    options = {"return_entropy": return_entropy, "row_mask": mask, "fp32_logits": fp32_logits, "shard": shard}
    if kernels is None:
        logps, entropy = reference.linear_selective_log_softmax(*head, rows, transform, **options, kept=kept)
    else:
        kernels, rows = kernels_for(kernels, rows, shard, kept)
        logps, entropy = fused_linear_autograd.linear_selective_log_softmax(kernels, *head, rows, transform, **options)
    logps = logps.view(index.shape)
    return (logps, entropy.view(index.shape)) if return_entropy else logps


@torch.no_grad()
def linear_topk_log_softmax(
    hidden_states: Tensor,  # (..., H)
    lm_head_weight: Tensor,  # (V, H)
    k: int,
    *,
    lm_head_bias: Tensor | None = None,  # (V,)
    temperature: float = 1.0,
    temperatures: Tensor | None = None,  # (...)
    logit_scale: float = 1.0,
    final_logit_softcapping: float | None = None,
) -> tuple[Tensor, Tensor]:
    """A teacher's `teacher_topk_ids` and `teacher_topk_logps`: the k largest of `log_softmax` of its logits.

    In PyTorch on any device, chunk by chunk: 128 MiB of fp32 logits exist at a time. 2·n·H·V FLOP for n tokens.

    Args:
        hidden_states: (..., H), fp64, fp32, bf16 or fp16.
        lm_head_weight, lm_head_bias: (V, H) and (V,).
        k: entries per token, 1 to V.
        temperature, temperatures, logit_scale, final_logit_softcapping: as in `linear_selective_log_softmax`.

    Returns:
        ids (..., k) int64 and log-probabilities (..., k), fp32 (fp64 for fp64 hidden states), largest first. Without a
        gradient.

    Raises:
        ValueError: shapes that do not match, or k that V does not have.
    """
    check_linear_shapes(hidden_states, lm_head_weight, lm_head_bias, hidden_states[..., 0])
    columns = lm_head_weight.shape[0]
    if not 1 <= k <= columns:
        raise ValueError(f"k={k} must lie between 1 and the size of the vocabulary, {columns}")
    dtype = compute_dtype(hidden_states.dtype)
    divisors = temperature_rows(temperatures, temperature, hidden_states[..., 0], None, dtype)
    transform = checked_transform(temperature, logit_scale, final_logit_softcapping)._replace(temperatures=divisors)
    hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
    ids, logps = reference.linear_topk_log_softmax(hidden, lm_head_weight, lm_head_bias, k, transform)
    shape = (*hidden_states.shape[:-1], k)
    return ids.view(shape), logps.view(shape)


def checked_transform(
    temperature: float, logit_scale: float = 1.0, final_logit_softcapping: float | None = None
) -> LogitTransform:
    """A `LogitTransform`, or ValueError for a value that cannot be one."""
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be > 0")
    if not 0 < abs(logit_scale) < torch.inf:  # no math.isfinite, which torch.compile cannot trace
        raise ValueError(f"logit_scale={logit_scale} must be finite, and different from 0: 0 makes every logit equal")
    if final_logit_softcapping is not None and not final_logit_softcapping > 0:
        raise ValueError(f"final_logit_softcapping={final_logit_softcapping} must be > 0, or None for no cap")
    return LogitTransform(logit_scale, final_logit_softcapping, temperature)
