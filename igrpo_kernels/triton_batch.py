"""`TokenBatch.build` in one launch: masked rows neutral, all in the compute dtype, each sequence's tokens counted."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from igrpo_kernels.triton_launch import on_device
from igrpo_kernels.triton_sequences import sequence_bounds

_INPUTS = ("ids", "mask", "advantages", "loss_weights", "nll_weights", "old", "ref", "sampling")
_STRIDES = [*(f"{name}_{step}" for name in _INPUTS for step in ("batch", "token")), "prompt_lengths_step"]
_POINTERS = [f"{name}_ptr" for name in (*_INPUTS, "prompt_lengths", "cu_seqlens")]
_POINTERS += [f"{name}_out" for name in (*_INPUTS, "seq_id", "sequence_advantages", "lengths")]
_POINTERS += ["prompt_lengths_out", "cu_seqlens_out"]
_BLOCK = 256


@triton.jit
def rows_of(ptr, b, token, row, stride_batch, stride_token, keep, PADDED: tl.constexpr):
    """Values of one sequence's rows of a (B, T), (n,) or (S,) tensor with any strides; 0 where they are not kept."""
    offset = b * stride_batch + (token if PADDED else row) * stride_token
    return tl.load(ptr + offset, mask=keep, other=0)


@triton.jit
def put_rows(out, ptr, stride_batch, stride_token, b, token, row, here, active, PADDED: tl.constexpr):
    """What was given of some rows, in the dtype of `out`; nothing where nothing was given."""
    if ptr is not None:
        x = rows_of(ptr, b, token, row, stride_batch, stride_token, active, PADDED)
        tl.store(out + row, x.to(out.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["n", "tokens", *_STRIDES], do_not_specialize_on_alignment=_POINTERS)
def batch_kernel(
    # data: (B, T) or (n,) each, advantages and weights also (S,), prompt_lengths (S,); None = not given
    ids_ptr, mask_ptr, advantages_ptr, loss_weights_ptr, nll_weights_ptr, old_ptr, ref_ptr, sampling_ptr,
    prompt_lengths_ptr, cu_seqlens_ptr,
    # written: (n,) each, the last four (S,), (S,), (S,) and (S+1,)
    ids_out, mask_out, advantages_out, loss_weights_out, nll_weights_out, old_out, ref_out, sampling_out, seq_id_out,
    sequence_advantages_out, lengths_out, prompt_lengths_out, cu_seqlens_out,
    # strides
    n: tl.int64, tokens: tl.int64,
    ids_batch: tl.int64, ids_token: tl.int64, mask_batch: tl.int64, mask_token: tl.int64,
    advantages_batch: tl.int64, advantages_token: tl.int64, loss_weights_batch: tl.int64,
    loss_weights_token: tl.int64, nll_weights_batch: tl.int64, nll_weights_token: tl.int64,
    old_batch: tl.int64, old_token: tl.int64,
    ref_batch: tl.int64, ref_token: tl.int64, sampling_batch: tl.int64, sampling_token: tl.int64,
    prompt_lengths_step: tl.int64,
    # constants
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per sequence; the first and the last one also take rows that are in none."""
    DTYPE: tl.constexpr = lengths_out.dtype.element_ty
    PADDED: tl.constexpr = cu_seqlens_ptr is None
    b, S = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    begin, end = sequence_bounds(cu_seqlens_ptr, b, S, tokens, n)
    inside_from, inside_to = begin, end
    if not PADDED:
        inside_from, inside_to = tl.load(cu_seqlens_ptr).to(tl.int64), tl.load(cu_seqlens_ptr + S).to(tl.int64)
        tl.store(cu_seqlens_out + b, tl.load(cu_seqlens_ptr + b).to(tl.int64))
        tl.store(cu_seqlens_out + S, inside_to, mask=b == S - 1)
    if sequence_advantages_out is not None:
        tl.store(sequence_advantages_out + b, tl.load(advantages_ptr + b * advantages_batch).to(DTYPE))
    if prompt_lengths_ptr is not None:
        tl.store(prompt_lengths_out + b, tl.load(prompt_lengths_ptr + b * prompt_lengths_step).to(DTYPE))
    length = tl.zeros((BLOCK,), tl.int32)
    for start in range(begin, end, BLOCK):
        row = start + tl.arange(0, BLOCK)
        token, here = row - begin, row < end
        active = here & (row >= inside_from) & (row < inside_to)
        if mask_ptr is not None:
            active = active & (rows_of(mask_ptr, b, token, row, mask_batch, mask_token, active, PADDED) != 0)
        length += active.to(tl.int32)
        tl.store(mask_out + row, active.to(tl.uint8), mask=here)
        tl.store(seq_id_out + row, tl.zeros_like(row) + b, mask=here)
        put_rows(ids_out, ids_ptr, ids_batch, ids_token, b, token, row, here, active, PADDED)
        put_rows(advantages_out, advantages_ptr, advantages_batch, advantages_token,
                 b, token, row, here, active, PADDED)  # fmt: skip
        put_rows(loss_weights_out, loss_weights_ptr, loss_weights_batch, loss_weights_token,
                 b, token, row, here, active, PADDED)  # fmt: skip
        put_rows(nll_weights_out, nll_weights_ptr, nll_weights_batch, nll_weights_token,
                 b, token, row, here, active, PADDED)  # fmt: skip
        put_rows(old_out, old_ptr, old_batch, old_token, b, token, row, here, active, PADDED)
        put_rows(ref_out, ref_ptr, ref_batch, ref_token, b, token, row, here, active, PADDED)
        put_rows(sampling_out, sampling_ptr, sampling_batch, sampling_token, b, token, row, here, active, PADDED)
    tl.store(lengths_out + b, tl.sum(length, axis=0).to(DTYPE))


def token_tables(
    completion_ids: Tensor,  # (B, T) or (n,)
    completion_mask: Tensor | None,  # the shape of completion_ids
    advantages: Tensor,  # (S,) or the shape of completion_ids, as the next two
    loss_weights: Tensor | None,
    nll_weights: Tensor | None,
    old: Tensor | None,  # the shape of completion_ids, as the next two
    ref: Tensor | None,
    sampling: Tensor | None,
    prompt_lengths: Tensor | None,  # (S,)
    cu_seqlens: Tensor | None,  # (S+1,)
    *,
    per_sequence: list[bool],  # the advantages, loss_weights and nll_weights
    num_sequences: int,
    dtype: torch.dtype,
) -> dict[str, Tensor | None]:
    """The tensors of a `TokenBatch` by name; n and S are at least 1."""
    n, device = completion_ids.numel(), completion_ids.device
    inputs = (completion_ids, completion_mask, advantages, loss_weights, nll_weights, old, ref, sampling)
    inputs = [x.view(torch.uint8) if x is not None and x.dtype == torch.bool else x for x in inputs]
    repeated = (False, False, *per_sequence, False, False, False)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()

    def made(size: int, kind: torch.dtype, wanted: bool = True) -> Tensor | None:
        return torch.empty(size, dtype=kind, device=device) if wanted else None

    out = {
        "index": made(n, torch.int64),
        "mask": made(n, torch.bool),
        "advantages": made(n, dtype),
        "loss_weights": made(n, dtype, loss_weights is not None),
        "nll_weights": made(n, dtype, nll_weights is not None),
        "old_per_token_logps": made(n, dtype, old is not None),
        "ref_per_token_logps": made(n, dtype, ref is not None),
        "sampling_per_token_logps": made(n, dtype, sampling is not None),
        "seq_id": made(n, torch.int64),
        "sequence_advantages": made(num_sequences, dtype, per_sequence[0]),
        "lengths": made(num_sequences, dtype),
        "prompt_lengths": made(num_sequences, dtype, prompt_lengths is not None),
        "cu_seqlens": made(num_sequences + 1, torch.int64, cu_seqlens is not None),
    }
    strides = [_steps(x, of_sequences) for x, of_sequences in zip(inputs, repeated, strict=True)]
    with on_device(completion_ids):
        batch_kernel[(num_sequences,)](
            *inputs,
            prompt_lengths,
            cu_seqlens,
            *(out | {"mask": out["mask"].view(torch.uint8)}).values(),
            n,
            n // num_sequences,
            *(step for pair in strides for step in pair),
            0 if prompt_lengths is None else prompt_lengths.stride(0),
            BLOCK=_BLOCK,
            enable_fp_fusion=True,
        )
    return out


def _steps(x: Tensor | None, of_sequences: bool) -> tuple[int, int]:
    """From one sequence to the next, and from one row to the next."""
    if x is None:
        return 0, 0
    if of_sequences:
        return x.stride(0), 0
    return x.stride(0) if x.dim() == 2 else 0, x.stride(-1)
