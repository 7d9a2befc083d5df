"""The two public losses: from logits, or from hidden states and the lm_head so that logits never exist whole."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor
from torch.distributed import ProcessGroup

from igrpo_kernels import fused_linear_autograd, fused_loss, reference
from igrpo_kernels.batch import TokenBatch, check_linear_shapes, check_logits_shape, compute_dtype
from igrpo_kernels.distillation import Teacher
from igrpo_kernels.impls import resolve_impl
from igrpo_kernels.kept_rows import kernels_for
from igrpo_kernels.loss_metrics import kept_metrics
from igrpo_kernels.losses import PROMPT_MEAN
from igrpo_kernels.sampling_mask import KeptSets, SamplingMask
from igrpo_kernels.temperatures import with_temperatures
from igrpo_kernels.types import GRPOLossConfig, GRPOLossOutput
from igrpo_kernels.vocab_parallel import vocabulary

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
    loss_weights: Tensor | None = None,  # (B,) | (S,) | shape of completion_ids
    nll_weights: Tensor | None = None,  # (B,) | (S,) | shape of completion_ids
    prompt_lengths: Tensor | None = None,  # (B,) | (S,)
    sampling_mask: SamplingMask | None = None,  # one set per element of completion_ids
    teacher_topk_ids: Tensor | None = None,  # (*shape of completion_ids, k)
    teacher_topk_logps: Tensor | None = None,  # (*shape of completion_ids, k)
    temperatures: Tensor | None = None,  # shape of completion_ids
    cu_seqlens: Tensor | None = None,  # (S+1,)
    num_items_in_batch: Tensor | float | None = None,
    process_group: ProcessGroup | None = None,
    config: GRPOLossConfig = _DEFAULT_CONFIG,
    impl: str = "auto",
    inplace: bool = False,
) -> GRPOLossOutput:
    """GRPO-family loss and its gradient from logits. The equations are in `igrpo_kernels/objective.py`.

    Args:
        logits: (B, T, V), row t predicting completion_ids[:, t] (already shifted; any strides, so a view such as
            ``logits[:, -T-1:-1]`` is fine), or packed (n, V). fp64, fp32, bf16, or fp16, which takes two passes
            so that a loss scale acts before gradients are rounded.
        completion_ids: (B, T), or packed (n,) together with `cu_seqlens`. int32 or int64; masked values are ignored.
        advantages: one per sequence, (B,) or (S,), or one per token. Float. Packed, with as many sequences as tokens
            because some are empty, (S,) is meant.
        completion_mask: 0/1 (bool, int or float), None = all ones. A masked position changes nothing and gets gradient
            exactly 0, even if its logits, log-probs or ids are garbage or NaN.
        old_per_token_logps: log-probs of the policy that started the update; None = the current ones (ratio 1).
        ref_per_token_logps: log-probs of the reference model; required when config.beta != 0.
        sampling_per_token_logps: log-probs the sampler reported, NaN where unknown. Used by importance_sampling_mode,
            off_policy_mask_threshold, rollout_rs, kl_tau and the `sampling/...` metrics.
        loss_weights: factor of each token's loss, policy term, KL and all, but not of the entropy bonus; float, shaped
            as `advantages`. None = 1. The denominators do not change.
        nll_weights: adds sum of nll_weights · (-log-prob) to the loss, divided by nothing; float, shaped as
            `advantages`. NLL on good answers with weight mu: mu / (their tokens in the step), 0 elsewhere.
        prompt_lengths: with prompt_mean: tokens of all completions of the sequence's prompt in the optimiser step.
        sampling_mask: what the sampler's top_k, top_p or min_p left of the vocabulary, token by token. Log-probs,
            ratio, KL, entropy and gradient are then over those sets, the gradient elsewhere is exactly 0. The other
            log-probs must be over the same sets: vLLM's processed ones are, and `selective_log_softmax` takes the
            mask, too. Two passes for any loss, and not inside torch.compile (docs/kernels.md).
        teacher_topk_ids, teacher_topk_logps: with config.distillation_weight a teacher's k largest log-probs per token,
            over the whole vocabulary and at the same temperature, and their ids (`linear_topk_log_softmax` makes them);
            constants. An id of -1 or a log-prob of -inf is no entry, and a token without entries has no teacher.
            Equation and rest bucket: `igrpo_kernels/distillation.py`. Two passes for any loss, not with sampling_mask
            and not inside torch.compile.
        temperatures: what each token's logits are divided by, in place of `config.temperature`, which must then be 1:
            the temperature it was sampled with. Float, > 0. It has no gradient; log-probs, ratio, KL, entropy and the
            gradient of the logits are those of logits / temperatures[..., None].
        cu_seqlens: (S+1,) int offsets 0..n of the packed sequences; empty sequences are allowed.
        num_items_in_batch: denominator of dapo and its like (see below); None = this call's unmasked tokens. With
            prompt_mean: the step's prompts; None = those that this call holds, a part of a prompt for that part.
        process_group: `logits` hold this rank's contiguous columns of a vocabulary spread over the group in rank order,
            everything else is the same on every rank, ids included, which stay global. Every rank gets the loss,
            metrics, log-probs and entropies of the whole rows, to the last bit the same, and its own columns'
            gradient. Cut padding columns off with a view. None = nothing is communicated; otherwise two gathers:
            the shards' sizes (a host sync), and four numbers per row; with a teacher two sums more, of about k numbers
            per row. The torch implementation gathers the logits.
        config: the loss; none of its values triggers a recompilation.
        impl: "auto" or a name from `available_impls()`; the environment variable IGRPO_KERNELS_IMPL replaces "auto".
        inplace: allow the gradient to overwrite the storage of `logits`. The torch implementation ignores it.

    Cost, apart from impl="torch": memory traffic per bf16 logit of an unmasked row at most 6 B, 4 B where the row stays
    on chip (cuda; cpu: in cache), 2 B without gradient; masked rows are only written. Kept until backward: the gradient
    (none with inplace) for losses whose coefficients are known row by row, else the logits and 16 B per token (32 in
    fp64). `igrpo_kernels/fused_loss.py` says which losses are which.

    torch.compile takes a call as part of its graph, without a break and without a recompilation for a new length. There
    a bad id poisons its row instead of raising, `inplace` is not used, and process_group does not work.

    Returns:
        GRPOLossOutput with loss (), per_token_logps and entropy in the shape of completion_ids, and metrics.

    Denominators. No collective is ever issued and no accumulation factor is applied. What each loss_type divides by,
    and what makes the sum over the micro-batches of all ranks exactly the loss of the whole step, is a column each of
    the table in docs/algorithm.md: scale a loss that divides by its own sequences or tokens with its share of the
    step's; for the others pass num_items_in_batch = the step's tokens (or prompts), and add.

    Where gradients are averaged over W ranks (DDP, FSDP), multiply by W (or pass n_total / W). The entropy bonus is a
    mean over this call's n tokens whatever the loss type; to make it exact as well, scale entropy_coef by
    (n / n_total) divided by the factor applied to the loss. The factor multiplies the NLL as well: divide nll_weights
    by it. top_entropy_quantile, clip_cov and kl_cov rank the tokens of a call. A sequence must not be split over calls:
    sequence ratios, n_b, OPSM and rejection need all its tokens.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit (with the shapes), ids outside the vocabulary (on the CPU;
            NaN rows elsewhere), missing ref_per_token_logps, unknown `impl`; a token outside its own set of
            sampling_mask, a teacher's id twice in a row or its log-probs adding up to more than 1, a temperature that
            is not above 0 and finite (on the CPU; NaN rows elsewhere).
        RuntimeError: `impl` names an implementation this installation cannot run.

    Example:
        >>> out = grpo_loss(model(ids).logits[:, -T - 1 : -1], completion_ids, advantages, completion_mask=mask)
        >>> out.loss.backward()
    """
    check_logits_shape("logits", logits, completion_ids)
    columns = logits.shape[-1]
    kernels = resolve_impl(impl, logits.device.type, logits.dtype, columns)
    batch = TokenBatch.build(
        completion_ids,
        advantages,
        dtype=compute_dtype(logits.dtype),
        completion_mask=completion_mask,
        old_per_token_logps=old_per_token_logps,
        ref_per_token_logps=ref_per_token_logps,
        sampling_per_token_logps=sampling_per_token_logps,
        loss_weights=loss_weights,
        nll_weights=nll_weights,
        prompt_lengths=prompt_lengths,
        cu_seqlens=cu_seqlens,
        tables=None if kernels is None else kernels.tables(logits.device),
    )
    batch = with_temperatures(batch, temperatures, config, completion_ids)
    shard, vocab_size = vocabulary(process_group, columns, logits.device, batch.index)
    _check_config_inputs(config, batch, num_items_in_batch)
    kept = KeptSets.of(sampling_mask, batch.index, batch.mask, vocab_size, batch.shape)
    teacher = Teacher.of(teacher_topk_ids, teacher_topk_logps, batch, config, vocab_size, kept)
    if kernels is None:
        options = {"shard": shard, "kept": kept, "teacher": teacher}
        rows = reference.grpo_loss(logits, batch, config, num_items_in_batch, **options)
    else:
        kernels, index = kernels_for(kernels, batch.index, shard, kept, teacher)
        served = batch if index is batch.index else replace(batch, index=index)
        rows = fused_loss.grpo_loss(kernels, logits, served, config, num_items_in_batch, inplace=inplace)
    return _output(rows, batch, kept)


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
    loss_weights: Tensor | None = None,  # (B,) | (S,) | shape of completion_ids
    nll_weights: Tensor | None = None,  # (B,) | (S,) | shape of completion_ids
    prompt_lengths: Tensor | None = None,  # (B,) | (S,)
    sampling_mask: SamplingMask | None = None,  # one set per element of completion_ids
    teacher_topk_ids: Tensor | None = None,  # (*shape of completion_ids, k)
    teacher_topk_logps: Tensor | None = None,  # (*shape of completion_ids, k)
    temperatures: Tensor | None = None,  # shape of completion_ids
    cu_seqlens: Tensor | None = None,  # (S+1,)
    lengths: Sequence[int] | None = None,  # (S,)
    num_items_in_batch: Tensor | float | None = None,
    fp32_logits: bool = False,
    compute_metrics: bool = True,
    process_group: ProcessGroup | None = None,
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
        fp32_logits: see `linear_selective_log_softmax`.
        compute_metrics: False = `metrics` is empty, and tokens that cannot contribute (A = 0 without KL and entropy
            bonus; of a whole sequence where the loss couples its tokens) never meet a matmul: their log-probs and
            entropies are 0. The loss and its gradient do not change.
        process_group: lm_head_weight and lm_head_bias hold this rank's rows; see `grpo_loss`. The gradient of
            hidden_states is summed over the group (in fp32), the others are local. Two gathers plus one per chunk;
            with a teacher two sums per chunk more.
        lengths: of the sequences of cu_seqlens, where the host knows them. Every token then gets its full work
            (completion_mask must be None), whether it contributes or not, and the host never waits for the device. On
            CUDA that is so without them, too, unless completion_mask or compute_metrics=False asks for rows to be
            dropped (one wait), or several chunks of coupled sequences need their borders (one more).
        inplace: has no effect here: the chunk buffers are this function's own.
        Everything else: see `grpo_loss`, including the denominators.

    FLOPs for n contributing tokens, forward and backward together, all in forward: 6·n·H·V (4 if lm_head_weight is
    frozen; 8 where sequences longer than a chunk are coupled, or top_entropy_quantile < 1 meets several chunks; 2 for
    tokens that only report metrics). impl="torch": 8. Kept until backward: dX, and dW: in the weight's dtype where the
    rows fit one chunk, else in fp32. At the peak one chunk of logits more (`lm_head.CHUNK_BYTES`: 2.5 GiB on CUDA, and
    what a bf16 dW saves if all rows then fit; 128 MiB on the CPU). Dtypes: `linear_selective_log_softmax`.

    Returns, Raises: see `grpo_loss`.

    Example:
        >>> hidden = model.model(input_ids).last_hidden_state[0]          # (n, H), packed
        >>> out = linear_grpo_loss(hidden[:-1], model.lm_head.weight, input_ids[0, 1:], advantages, cu_seqlens=cu)
        >>> out.loss.backward()
    """
    check_linear_shapes(hidden_states, lm_head_weight, lm_head_bias, completion_ids)
    columns, device = lm_head_weight.shape[0], hidden_states.device
    kernels = resolve_impl(impl, device.type, hidden_states.dtype, columns)
    batch = TokenBatch.build(
        completion_ids,
        advantages,
        dtype=compute_dtype(hidden_states.dtype),
        completion_mask=completion_mask,
        old_per_token_logps=old_per_token_logps,
        ref_per_token_logps=ref_per_token_logps,
        sampling_per_token_logps=sampling_per_token_logps,
        loss_weights=loss_weights,
        nll_weights=nll_weights,
        prompt_lengths=prompt_lengths,
        cu_seqlens=cu_seqlens,
        lengths=lengths,
        tables=None if kernels is None else kernels.tables(device),
    )
    batch = with_temperatures(batch, temperatures, config, completion_ids)
    shard, vocab_size = vocabulary(process_group, columns, device, batch.index)
    _check_config_inputs(config, batch, num_items_in_batch)
    kept = KeptSets.of(sampling_mask, batch.index, batch.mask, vocab_size, batch.shape)
    teacher = Teacher.of(teacher_topk_ids, teacher_topk_logps, batch, config, vocab_size, kept)
    head = (hidden_states.reshape(-1, hidden_states.shape[-1]), lm_head_weight, lm_head_bias)
    options = {"fp32_logits": fp32_logits, "compute_metrics": compute_metrics, "shard": shard}
    if kernels is None:
        rows = reference.linear_grpo_loss(*head, batch, config, num_items_in_batch, kept, teacher, **options)
    else:
        kernels, index = kernels_for(kernels, batch.index, shard, kept, teacher)
        served = batch if index is batch.index else replace(batch, index=index)
        rows = fused_linear_autograd.linear_grpo_loss(kernels, *head, served, config, num_items_in_batch, **options)
    return _output(rows, batch, kept if compute_metrics else None)


def _output(
    rows: tuple[Tensor, Tensor, Tensor, dict[str, Tensor]], batch: TokenBatch, kept: KeptSets | None
) -> GRPOLossOutput:
    loss, logps, entropy, metrics = rows
    if kept is not None:
        metrics = metrics | kept_metrics(kept.mask.counts, batch)
    return GRPOLossOutput(loss, logps.detach().view(batch.shape), entropy.detach().view(batch.shape), metrics)


def _check_config_inputs(config: GRPOLossConfig, batch: TokenBatch, num_items_in_batch: Tensor | float | None) -> None:
    if config.beta != 0.0 and batch.ref_per_token_logps is None:
        raise ValueError(f"beta={config.beta} needs ref_per_token_logps, got None; pass them or set beta=0.0")
    for name in ("importance_sampling_mode", "rollout_rs"):
        if getattr(config, name) is not None and batch.sampling_per_token_logps is None:
            raise ValueError(
                f"{name}={getattr(config, name)!r} needs sampling_per_token_logps, got None; pass them or set "
                f"{name}=None"
            )
    if config.kl_tau and batch.sampling_per_token_logps is None and batch.old_per_token_logps is None:
        raise ValueError(
            f"kl_tau={config.kl_tau} needs sampling_per_token_logps or old_per_token_logps, got neither; pass them or "
            "set kl_tau=0.0"
        )
    if config.loss.reduction is PROMPT_MEAN and batch.prompt_lengths is None:
        raise ValueError(
            f"loss_type={config.loss_type!r} needs prompt_lengths (S,), the tokens of all completions of each "
            "sequence's prompt, got None"
        )
    if isinstance(num_items_in_batch, Tensor) and num_items_in_batch.numel() != 1:
        raise ValueError(f"num_items_in_batch must be one number, got shape {tuple(num_items_in_batch.shape)}")
    if isinstance(num_items_in_batch, int | float) and not num_items_in_batch >= 0:
        raise ValueError(f"num_items_in_batch={num_items_in_batch} must be a number of tokens, 0 or more")
