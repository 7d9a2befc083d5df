"""`SamplingMask`: what a sampler with top_k, top_p or min_p left to choose from, token by token.

A sampler that truncates draws from softmax over a set K of tokens and reports log-probabilities of that distribution.
The policy that is trained is then the same one, so everything is over K:

    l = z_y - logsumexp_{v in K} z_v,     H = -sum_{v in K} p_v·log p_v,     dloss/dz_v = 0 outside of K

Over the whole vocabulary every token's log-ratio of policy and sampler would carry log(mass of K), and a product of
those over a sequence is 0 after some hundred tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from igrpo_kernels.batch import values_may_be_read

_INTEGERS = (torch.int32, torch.int64)


class SamplingMask:
    """One set of token ids per token, packed: row i's are ``ids[offsets[i]:offsets[i + 1]]``.

    Rows are in the order of ``completion_ids.reshape(-1)``, masked ones included, whose sets are not read and may be
    empty. Within a row ids are sorted and unique, whatever order they came in. Immutable.

    Args:
        ids: (nnz,) int32 or int64.
        offsets: (n+1,) int32 or int64, rising from 0 to nnz, on the same device. (Looking costs a sync there; `to`
            looks at nothing.)

    Raises:
        ValueError: shapes, dtypes, devices, offsets that fall, a negative id.

    Example: ``SamplingMask.from_sequences([o.sampling_mask.token_ids for o in request_output.outputs])`` of vLLM.
    """

    __slots__ = ("ids", "largest", "offsets")

    ids: Tensor
    """(nnz,) int64, rising within each row."""
    offsets: Tensor
    """(n+1,) int64."""
    largest: int
    """Of all ids; -1 where there is none."""

    def __init__(self, ids: Tensor, offsets: Tensor):
        if ids.dim() != 1 or offsets.dim() != 1 or offsets.numel() == 0 or {ids.dtype, offsets.dtype} - {*_INTEGERS}:
            raise ValueError(
                "a SamplingMask takes ids (nnz,) and offsets (n+1,), int32 or int64; got "
                f"{tuple(ids.shape)} of {ids.dtype} and {tuple(offsets.shape)} of {offsets.dtype}"
            )
        if ids.device != offsets.device:
            raise ValueError(f"ids of a SamplingMask are on {ids.device}, its offsets on {offsets.device}")
        ids, offsets = ids.to(torch.int64), offsets.to(torch.int64)
        counts = offsets.diff()
        if int(offsets[0]) != 0 or int(offsets[-1]) != ids.numel() or bool((counts < 0).any()):
            raise ValueError(
                f"offsets of a SamplingMask must rise from 0 to the number of its ids, {ids.numel()}; they go from "
                f"{int(offsets[0])} to {int(offsets[-1])}"
            )
        low, high = (int(x) for x in ids.aminmax()) if ids.numel() else (0, -1)
        if low < 0:
            raise ValueError(f"a SamplingMask holds token ids, and {low} is none")
        rows = torch.arange(counts.numel(), device=ids.device).repeat_interleave(counts)
        keys = (rows * (high + 1) + ids).unique()
        if keys.numel() < ids.numel():
            counts = torch.bincount(keys // (high + 1), minlength=counts.numel())
            offsets = torch.cat([offsets[:1], counts.cumsum(0)])
        self._set(keys % (high + 1) if high >= 0 else ids, offsets, high)

    def _set(self, ids: Tensor, offsets: Tensor, largest: int) -> SamplingMask:
        for name, value in (("ids", ids), ("offsets", offsets), ("largest", largest)):
            object.__setattr__(self, name, value)
        return self

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a SamplingMask is immutable; make a new one instead of setting {name}")

    def __len__(self) -> int:
        """n, its rows."""
        return self.offsets.numel() - 1

    def __repr__(self) -> str:
        return f"SamplingMask({len(self)} rows, {self.ids.numel()} ids, on {self.ids.device})"

    def __reduce__(self) -> tuple:
        return SamplingMask, (self.ids, self.offsets)

    @classmethod
    def from_lists(cls, rows: Sequence[Sequence[int]], device: torch.device | str | None = None) -> SamplingMask:
        """Of one list of ids per token."""
        counts = torch.tensor([0, *map(len, rows)], dtype=torch.int64)
        ids = torch.tensor(list(chain.from_iterable(rows)), dtype=torch.int64)
        return cls(ids, counts.cumsum(0)).to(device)

    @classmethod
    def from_sequences(
        cls,
        sequences: Sequence[Sequence[Sequence[int]]],  # [S][tokens][ids]
        length: int | None = None,
        device: torch.device | str | None = None,
    ) -> SamplingMask:
        """Of one list per token of each sequence, as vLLM's ``sampling_mask.token_ids`` are.

        Args:
            length: T of a padded (B, T) batch: shorter sequences get empty sets behind. None = packed.
        """
        if length is not None and any(len(sequence) > length for sequence in sequences):
            raise ValueError(f"a sequence of {max(map(len, sequences))} sets does not fit into length={length}")
        padded = ([*s, *[()] * (0 if length is None else length - len(s))] for s in sequences)
        return cls.from_lists(list(chain.from_iterable(padded)), device)

    @classmethod
    def from_top_k(cls, ids: Tensor) -> SamplingMask:
        """Of the K ids that each token had to choose from.

        Args:
            ids: (..., K), as ``logits.topk(k).indices``; -1 stands for none.
        """
        kept = ids.reshape(-1, ids.shape[-1]) >= 0
        offsets = torch.cat([kept.new_zeros(1, dtype=torch.int64), kept.sum(-1).cumsum(0)])
        return cls(ids.reshape(kept.shape)[kept], offsets)

    @classmethod
    def from_scores(cls, scores: Tensor) -> SamplingMask:
        """Of logits after truncation, (..., V): all that is above -inf was kept."""
        kept = scores.reshape(-1, scores.shape[-1]) > -torch.inf
        offsets = torch.cat([kept.new_zeros(1, dtype=torch.int64), kept.sum(-1).cumsum(0)])
        return cls(kept.nonzero()[:, 1], offsets)

    @classmethod
    def cat(cls, masks: Sequence[SamplingMask]) -> SamplingMask:
        """The rows of several, one behind the other."""
        ends = torch.tensor([0, *(m.ids.numel() for m in masks)]).cumsum(0).tolist()
        offsets = [m.offsets[1:] + end for m, end in zip(masks, ends, strict=False)]
        ids = torch.cat([m.ids for m in masks])
        return object.__new__(cls)._set(ids, torch.cat([masks[0].offsets[:1], *offsets]), max(m.largest for m in masks))

    def to(self, device: torch.device | str | None) -> SamplingMask:
        """The same on another device."""
        if device is None or torch.device(device) == self.ids.device:
            return self
        return object.__new__(SamplingMask)._set(self.ids.to(device), self.offsets.to(device), self.largest)

    def entries(self, rows: Tensor, wanted: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Ids of some rows, those with wanted (m,) False left out.

        Args:
            rows: (m,) int64 row numbers.

        Returns:
            Which of the m rows an id belongs to, its place in `ids`, and how many each row has (m,). On a GPU this is
            a sync.
        """
        first = self.offsets[rows]
        counts = self.offsets[rows + 1] - first
        counts = counts if wanted is None else torch.where(wanted, counts, 0)
        at = torch.arange(len(rows), device=rows.device).repeat_interleave(counts)
        entry = torch.arange(len(at), device=rows.device) + (first - counts.cumsum(0) + counts)[at]
        return at, entry, counts

    def select(self, rows: Tensor) -> SamplingMask:
        """Some rows, by their numbers (m,), in that order."""
        _, entry, counts = self.entries(rows)
        offsets = torch.cat([self.offsets[:1], counts.cumsum(0)])
        return object.__new__(SamplingMask)._set(self.ids[entry], offsets, self.largest)

    @property
    def counts(self) -> Tensor:
        """(n,) int64: sizes of the sets."""
        return self.offsets.diff()

    def rows(self) -> Tensor:
        """(nnz,) int64: the row of each id."""
        n = torch.arange(len(self), device=self.ids.device)
        return n.repeat_interleave(self.counts, output_size=self.ids.numel())  # no sync

    def table(self, vocab_size: int) -> Tensor:
        """(n, V) bool: what was kept."""
        kept = torch.zeros(len(self), vocab_size, dtype=torch.bool, device=self.ids.device)
        kept[self.rows(), self.ids] = True
        return kept

    def places(self, index: Tensor) -> Tensor:
        """(n,) int64: where in `ids` each row's token of index (n,) is, -1 where it was not kept."""
        base = self.largest + 1
        row = torch.arange(len(self), device=index.device)
        inside = (index >= 0) & (index < base)
        if self.ids.numel() == 0:
            return torch.full_like(index, -1)
        keys, wanted = self.rows() * base + self.ids, row * base + torch.where(inside, index, 0)
        found = torch.searchsorted(keys, wanted).clamp(max=keys.numel() - 1)
        return torch.where(inside & (keys[found] == wanted), found, -1)


class KeptSets(NamedTuple):
    """A mask that has been checked against the tokens of a call."""

    mask: SamplingMask
    places: Tensor
    """(n,) of `SamplingMask.places`."""
    index: Tensor
    """(n,) token ids."""

    @classmethod
    def of(
        cls,
        mask: SamplingMask | None,
        index: Tensor,  # (n,)
        row_mask: Tensor | None,  # (n,) bool
        vocab_size: int,
        shape: Sequence[int],  # of the caller's token ids
    ) -> KeptSets | None:
        """
        Raises:
            ValueError: the mask is for other rows, another device or another vocabulary; on the CPU, an unmasked token
                that is not in its own set (elsewhere its log-probability and gradient are NaN).
            NotImplementedError: inside torch.compile.
        """
        if mask is None:
            return None
        if torch.compiler.is_compiling():
            raise NotImplementedError("sampling_mask does not work inside torch.compile; call the loss outside of it")
        if not isinstance(mask, SamplingMask):
            raise ValueError(f"sampling_mask must be a SamplingMask, got {type(mask).__name__}")
        if len(mask) != index.numel():
            raise ValueError(
                f"sampling_mask has {len(mask)} rows and the token ids have shape {tuple(shape)}: it must have one set "
                f"for each of the {index.numel()}, masked ones included"
            )
        if mask.ids.device != index.device:
            raise ValueError(f"sampling_mask is on {mask.ids.device} but the token ids are on {index.device}")
        if mask.largest >= vocab_size:
            raise ValueError(f"sampling_mask holds the token id {mask.largest}, outside of [0, {vocab_size})")
        places = mask.places(index)
        if values_may_be_read(places):
            _check_own_sets(mask, index, places < 0 if row_mask is None else (places < 0) & row_mask, shape)
        return cls(mask, places, index)


def _check_own_sets(mask: SamplingMask, index: Tensor, lacking: Tensor, shape: Sequence[int]) -> None:
    if not bool(lacking.any()):
        return
    row = int(lacking.nonzero()[0])
    place = row if len(shape) == 1 else tuple(int(i) for i in torch.unravel_index(torch.tensor(row), tuple(shape)))
    size = int(mask.counts[row])
    raise ValueError(
        f"sampling_mask does not hold the token {int(index[row])} at position {place}: its set "
        f"{f'has {size} others' if size else 'is empty'}. What was sampled was kept, so these are other tokens' sets; "
        "where nothing was sampled, set completion_mask to 0"
    )
