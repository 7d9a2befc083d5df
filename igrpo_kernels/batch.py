"""`TokenBatch`: padded (B, T) or packed (n,) + cu_seqlens input as one flat table of token rows.

Everything after this file works on rows, so no equation knows how the batch was laid out. Sums over a sequence are
deterministic (a row sum when padded, a segmented reduction without atomics when packed) and run in fp64: rounded once,
they depend neither on the layout nor on the other sequences, and a sequence of 100,000 tokens loses nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype the mathematics runs in: fp64 for fp64 input, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class TokenBatch:
    """One row per token, in the order of `completion_ids`; n = B·T padded, or the packed length.

    Masked rows hold neutral values (index 0, advantage 0, log-probabilities 0) whatever the caller left there.
    """

    index: Tensor
    """(n,) int64: token ids."""

    mask: Tensor
    """(n,) bool: rows that count."""

    seq_id: Tensor
    """(n,) int64 in [0, S): which sequence a row belongs to."""

    num_sequences: int
    """S (= B when padded), empty and fully masked sequences included."""

    advantages: Tensor
    """(n,) compute dtype."""

    sequence_advantages: Tensor | None
    """(S,) compute dtype, of empty sequences, too; None where the caller gave one advantage per token."""

    lengths: Tensor
    """(S,) compute dtype: unmasked rows per sequence."""

    cu_seqlens: Tensor | None
    """(S+1,) int64 row offsets when packed, None when padded."""

    shape: tuple[int, ...]
    """Shape of the caller's completion_ids; outputs are returned in it."""

    lengths_on_host: tuple[int, ...] | None = None
    """(S,) rows per sequence as the caller knows them: then no row is masked, and all are computed."""

    whole: bool = False
    """No completion_mask was given: every row counts."""

    old_per_token_logps: Tensor | None = None
    """(n,) compute dtype: log-probs under the policy that started this update; None = the current policy."""

    ref_per_token_logps: Tensor | None = None
    """(n,) compute dtype: log-probs under the reference model."""

    sampling_per_token_logps: Tensor | None = None
    """(n,) compute dtype: log-probs the sampler reported; NaN where it reported none."""

    loss_weights: Tensor | None = None
    """(n,) compute dtype: factor of each token's loss."""

    nll_weights: Tensor | None = None
    """(n,) compute dtype: weight of each token's -log-prob, on top of the loss."""

    prompt_lengths: Tensor | None = None
    """(S,) compute dtype: tokens of all completions of the sequence's prompt."""

    temperatures: Tensor | None = None
    """(n,) compute dtype: what each row's logits are divided by; None = `config.temperature` (`temperatures.py`)."""

    @classmethod
    def build(
        cls,
        completion_ids: Tensor,  # (B, T) or (n,)
        advantages: Tensor,  # (S,) or the shape of completion_ids
        *,
        dtype: torch.dtype,  # compute dtype of the rows
        completion_mask: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        sampling_per_token_logps: Tensor | None = None,
        loss_weights: Tensor | None = None,
        nll_weights: Tensor | None = None,
        prompt_lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        lengths: Sequence[int] | None = None,
        tables: Callable[..., dict[str, Tensor | None]] | None = None,
    ) -> "TokenBatch":
        """Validate and flatten. Shapes as in `grpo_loss`; raises ValueError naming the offending shapes.

        `tables` makes the same tensors in one launch (`triton_batch.token_tables`); None = what is written here.
        """
        _check_layout(completion_ids, cu_seqlens)
        per_token = {
            "completion_mask": completion_mask,
            "old_per_token_logps": old_per_token_logps,
            "ref_per_token_logps": ref_per_token_logps,
            "sampling_per_token_logps": sampling_per_token_logps,
        }
        for name, x in per_token.items():
            _check_per_token(name, x, completion_ids)
        if lengths is not None:
            _check_lengths(lengths, completion_ids.numel(), cu_seqlens, completion_mask)
        either = {"advantages": advantages, "loss_weights": loss_weights, "nll_weights": nll_weights}
        if tables is not None and completion_ids.numel() > 0 and kernels_run():
            rows = (*per_token.values(), cu_seqlens)
            return cls(**_launched(tables, completion_ids, either, prompt_lengths, *rows, lengths=lengths, dtype=dtype))
        cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(torch.int64)
        num_sequences, seq_id, in_sequence = _sequences(completion_ids, cu_seqlens)
        mask = in_sequence if completion_mask is None else in_sequence & (completion_mask.reshape(-1) != 0)

        def neutral(x: Tensor | None) -> Tensor | None:
            return None if x is None else torch.where(mask, x.detach().reshape(-1).to(dtype), 0.0)

        def on_rows(name: str, x: Tensor | None) -> Tensor | None:
            if x is None or not _is_per_sequence(name, x, completion_ids, num_sequences):
                return neutral(x)
            return neutral(x.detach()[seq_id])

        per_sequence = _is_per_sequence("advantages", advantages, completion_ids, num_sequences)
        _check_prompt_lengths(prompt_lengths, completion_ids, num_sequences)
        return cls(
            index=torch.where(mask, completion_ids.reshape(-1).to(torch.int64), 0),
            mask=mask,
            seq_id=seq_id,
            num_sequences=num_sequences,
            sequence_advantages=advantages.detach().to(dtype) if per_sequence else None,
            lengths=_segment_sum(mask.to(dtype), cu_seqlens, seq_id, num_sequences),
            cu_seqlens=cu_seqlens,
            **_known(completion_ids, completion_mask, lengths),
            **{name: neutral(x) for name, x in per_token.items() if name != "completion_mask"},
            **{name: on_rows(name, x) for name, x in either.items()},
            prompt_lengths=None if prompt_lengths is None else prompt_lengths.detach().to(dtype),
        )

    def segment_sum(self, x: Tensor) -> Tensor:
        """(n,) rows -> (S,) sums over each sequence's unmasked rows; differentiable, blind to NaN in masked rows."""
        return _segment_sum(self.masked(x), self.cu_seqlens, self.seq_id, self.num_sequences)

    def expand(self, x: Tensor) -> Tensor:
        """(S,) values -> (n,) rows; differentiable, and its gradient is a sum over each sequence's rows."""
        if self.cu_seqlens is None:
            return x[:, None].expand(self.shape).reshape(-1)
        return _ExpandSegments.apply(x, self.cu_seqlens, self.seq_id)

    def masked(self, x: Tensor) -> Tensor:
        """(n,) rows with masked rows set to 0, in value and in gradient, even if they hold NaN."""
        return torch.where(self.mask, x, 0.0)


def _sequences(completion_ids: Tensor, cu_seqlens: Tensor | None) -> tuple[int, Tensor, Tensor]:
    """S, and of each row the number of its sequence (n,) and whether it is in one (n,) bool."""
    n, device = completion_ids.numel(), completion_ids.device
    if cu_seqlens is None:
        count = completion_ids.shape[0]
        seq_id = torch.arange(count, device=device)[:, None].expand(completion_ids.shape).reshape(n)
        return count, seq_id, torch.ones(n, dtype=torch.bool, device=device)
    row, count = torch.arange(n, device=device), cu_seqlens.numel() - 1
    seq_id = torch.bucketize(row, cu_seqlens[1:], right=True).clamp(max=max(count - 1, 0))
    return count, seq_id, (row >= cu_seqlens[0]) & (row < cu_seqlens[-1])


def values_may_be_read(x: Tensor) -> bool:
    """Whether a check may look at a tensor's values: on the CPU it costs no sync, and in a graph there are none yet."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def check_logits_shape(name: str, logits: Tensor, index: Tensor) -> None:
    """ValueError unless logits is (*index.shape, V) in a float dtype, with a hint for the usual off-by-one."""
    if not logits.is_floating_point():
        raise ValueError(f"{name} must be a floating-point tensor, got {logits.dtype}")
    if logits.dim() != index.dim() + 1 or logits.shape[:-1] != index.shape or logits.shape[-1] == 0:
        hint = ""
        if logits.dim() == 3 and index.dim() == 2 and logits.shape[1] == index.shape[1] + 1:
            hint = f"; row t must predict token t, so write {name}[:, :-1]"
        raise ValueError(
            f"{name} has shape {tuple(logits.shape)} but the token ids have shape {tuple(index.shape)}: {name} must "
            f"be {(*index.shape, 'V')}{hint}"
        )


def check_linear_shapes(hidden: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor) -> None:
    """ValueError unless hidden (*index.shape, H), weight (V, H) and bias (V,) fit together on one device."""
    check_logits_shape("hidden_states", hidden, index)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        raise ValueError(
            f"lm_head_weight has shape {tuple(weight.shape)} but hidden_states has shape {tuple(hidden.shape)}: "
            f"the weight must be (V, {hidden.shape[-1]}), as nn.Linear stores it"
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"lm_head_bias has shape {tuple(bias.shape)}, it must be ({weight.shape[0]},)")
    for name, x in (("lm_head_weight", weight), ("lm_head_bias", bias)):
        if x is not None and x.device != hidden.device:
            raise ValueError(f"{name} is on {x.device} but hidden_states is on {hidden.device}; move it there")


def check_index_dtype(index: Tensor) -> None:
    if index.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"token ids must be int32 or int64, got {index.dtype}")


def check_index(index: Tensor, device: torch.device, vocab_size: int) -> None:
    """ValueError for a wrong dtype or device, and on the CPU for a value outside [0, vocab_size); elsewhere the row
    becomes NaN.
    """
    check_index_dtype(index)
    if index.device != device:
        raise ValueError(f"token ids are on {index.device} but the model output is on {device}; move them there")
    if not values_may_be_read(index) or index.numel() == 0:
        return
    low, high = (int(x) for x in index.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"token ids must lie in [0, {vocab_size}) on unmasked positions, got values from {low} to {high}; "
            "set completion_mask to 0 where the ids are padding such as -100"
        )


def kernels_run() -> bool:
    """Whether a launch is one: no graph is traced, and this is no rehearsal on fake tensors."""
    fake = torch._C._TorchDispatchModeKey.FAKE
    return not torch.compiler.is_compiling() and torch._C._get_dispatch_mode(fake) is None


def _launched(
    tables: Callable[..., dict[str, Tensor | None]],
    completion_ids: Tensor,
    either: dict[str, Tensor | None],  # advantages, loss_weights and nll_weights: one per sequence or per token
    prompt_lengths: Tensor | None,
    completion_mask: Tensor | None,
    *rest: Tensor | None,  # old, ref and sampling log-probs, cu_seqlens
    lengths: Sequence[int] | None,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """The fields of a `TokenBatch` from one launch."""
    cu_seqlens = rest[-1]
    S = completion_ids.shape[0] if cu_seqlens is None else max(cu_seqlens.numel() - 1, 1)
    per_sequence = [x is not None and _is_per_sequence(name, x, completion_ids, S) for name, x in either.items()]
    _check_prompt_lengths(prompt_lengths, completion_ids, S)
    options = {"per_sequence": per_sequence, "num_sequences": S, "dtype": dtype}
    made = tables(completion_ids, completion_mask, *either.values(), *rest[:-1], prompt_lengths, cu_seqlens, **options)
    return {**made, "num_sequences": S, **_known(completion_ids, completion_mask, lengths)}


def _known(ids: Tensor, mask: Tensor | None, lengths: Sequence[int] | None) -> dict[str, Any]:
    """What the host knows of a batch."""
    on_host = None if lengths is None else tuple(lengths)
    return {"shape": tuple(ids.shape), "lengths_on_host": on_host, "whole": mask is None}


def _segment_sum(x: Tensor, cu_seqlens: Tensor | None, seq_id: Tensor, num_sequences: int) -> Tensor:
    if cu_seqlens is None:
        return _row_sums(x, num_sequences)
    return _SumSegments.apply(x, cu_seqlens, seq_id)


def _row_sums(x: Tensor, num_sequences: int) -> Tensor:
    """Sums (S,) of S equally long stretches of x (n,)."""
    return x.reshape(num_sequences, x.numel() // max(num_sequences, 1)).sum(-1, dtype=torch.float64).to(x.dtype)


def _packed_sums(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sums (S,) of packed stretches of x (n,). `segment_reduce` adds one by one on the CPU, hence fp64."""
    # unsafe=True: `build` checked the offsets where that is free; checking again would sync the device.
    return torch.segment_reduce(x.double().contiguous(), "sum", offsets=cu_seqlens, initial=0, unsafe=True).to(x.dtype)


class _SumSegments(torch.autograd.Function):
    """Sums of packed segments. PyTorch's index_add would use float atomics on CUDA."""

    @staticmethod
    def forward(ctx, x: Tensor, cu_seqlens: Tensor, seq_id: Tensor) -> Tensor:  # (n,), (S+1,), (n,) -> (S,)
        ctx.save_for_backward(seq_id)
        return _packed_sums(x, cu_seqlens)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (seq_id,) = ctx.saved_tensors
        return grad[seq_id], None, None


class _ExpandSegments(torch.autograd.Function):
    """Each packed row reads its segment's value. The gradient of plain indexing would be a scatter-add."""

    @staticmethod
    def forward(ctx, x: Tensor, cu_seqlens: Tensor, seq_id: Tensor) -> Tensor:  # (S,), (S+1,), (n,) -> (n,)
        ctx.save_for_backward(cu_seqlens)
        return x[seq_id]

    @staticmethod
    def backward(ctx, grad: Tensor):
        (cu_seqlens,) = ctx.saved_tensors
        return _packed_sums(grad, cu_seqlens), None, None


def _check_layout(completion_ids: Tensor, cu_seqlens: Tensor | None) -> None:
    shape = tuple(completion_ids.shape)
    if completion_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"completion_ids must be int32 or int64, got {completion_ids.dtype}")
    if cu_seqlens is None:
        if completion_ids.dim() != 2:
            raise ValueError(
                f"completion_ids has shape {shape}: without cu_seqlens it must be (B, T); pass cu_seqlens (S+1,) "
                "for packed tokens of shape (n,)"
            )
        return
    if completion_ids.dim() != 1:
        raise ValueError(
            f"completion_ids has shape {shape}: with cu_seqlens it must be (n,); write completion_ids.reshape(-1)"
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens must be (S+1,) int32 or int64 row offsets starting at 0, got shape "
            f"{tuple(cu_seqlens.shape)} of {cu_seqlens.dtype}"
        )
    _check_device("cu_seqlens", cu_seqlens, completion_ids)
    if values_may_be_read(cu_seqlens):
        first, last, n = int(cu_seqlens[0]), int(cu_seqlens[-1]), completion_ids.numel()
        if first != 0 or last != n or bool((cu_seqlens.diff() < 0).any()):
            raise ValueError(
                f"cu_seqlens must rise from 0 to n={n}, the length of completion_ids; it goes from {first} to {last}"
            )


def _check_lengths(lengths: Sequence[int], n: int, cu_seqlens: Tensor | None, mask: Tensor | None) -> None:
    if cu_seqlens is None or mask is not None:
        raise ValueError("lengths go with cu_seqlens, and without a completion_mask: every token counts")
    if len(lengths) != cu_seqlens.numel() - 1 or sum(lengths) != n:
        raise ValueError(
            f"lengths has {len(lengths)} entries that add up to {sum(lengths)}; cu_seqlens has "
            f"{cu_seqlens.numel() - 1} sequences of {n} tokens together"
        )
    if values_may_be_read(cu_seqlens) and cu_seqlens.diff().tolist() != list(lengths):
        raise ValueError(f"lengths {list(lengths)} are not those of cu_seqlens, {cu_seqlens.diff().tolist()}")


def _check_per_token(name: str, x: Tensor | None, completion_ids: Tensor) -> None:
    if x is None:
        return
    if x.shape != completion_ids.shape:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)} but completion_ids has shape {tuple(completion_ids.shape)}; "
            "they must be equal"
        )
    _check_device(name, x, completion_ids)
    if name != "completion_mask":
        if not x.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor, got {x.dtype}")
    elif x.is_floating_point() and values_may_be_read(x) and not bool(((x == 0) | (x == 1)).all()):
        raise ValueError("completion_mask must hold only 0 and 1: it selects tokens, it does not weight them")


def _check_device(name: str, x: Tensor, completion_ids: Tensor) -> None:
    if x.device != completion_ids.device:
        raise ValueError(f"{name} is on {x.device} but completion_ids is on {completion_ids.device}; move it there")


def _check_prompt_lengths(x: Tensor | None, completion_ids: Tensor, num_sequences: int) -> None:
    if x is None:
        return
    _check_device("prompt_lengths", x, completion_ids)
    if tuple(x.shape) != (num_sequences,) or x.dtype == torch.bool or x.is_complex():
        raise ValueError(
            f"prompt_lengths must be one number per sequence ({num_sequences},), got {tuple(x.shape)} of {x.dtype}: "
            "the tokens of all completions of the sequence's prompt"
        )


def _is_per_sequence(name: str, x: Tensor, completion_ids: Tensor, num_sequences: int) -> bool:
    """Whether x is (S,), and not one value per token."""
    _check_device(name, x, completion_ids)
    if not x.is_floating_point():
        raise ValueError(f"{name} must be a floating-point tensor, got {x.dtype}")
    if tuple(x.shape) == (num_sequences,):
        return True
    if x.shape == completion_ids.shape:
        return False
    raise ValueError(
        f"{name} has shape {tuple(x.shape)}; with completion_ids {tuple(completion_ids.shape)} it must be one per "
        f"sequence ({num_sequences},) or one per token {tuple(completion_ids.shape)}"
    )
