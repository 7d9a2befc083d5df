"""Attention over packed sequences that share prompts, through transformers' attention interface.

The tokens of a micro-batch stand in one row, in runs. A run reads itself causally and, if it has a parent run, all of
the parent:

    run      tokens                  reads
    0        prompt                  itself
    1, 2, …  completions of run 0    run 0, then itself
    k        another prompt          itself

No run sees another one's completion, so with positions that go on from the prompt every sequence is computed as if it
stood alone, and gradients through the shared prompt add up. Three kernels compute it: per-run SDPA (anywhere),
flex_attention with a block mask (CUDA), and flash-attn's variable-length kernel (CUDA, when asked for).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from igrpo.learner.copies import sent
from igrpo_kernels.model_logits import text_config

KERNELS = {"sdpa": "igrpo_per_run", "flex_attention": "igrpo_block_mask", "flash_attention_2": "igrpo_varlen"}
"""Kernel -> its name in transformers' registry, where a name with "flash" in it would ask for a kernel from the hub."""

BLOCK = 128
"""Tokens of a block of flex_attention's mask."""


@dataclass(frozen=True)
class Layout:
    """The runs of a micro-batch, in token order."""

    lengths: tuple[int, ...]
    parents: tuple[int | None, ...]
    """Index of the run that each run goes on from."""
    _cache: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def starts(self) -> list[int]:
        return [0, *accumulate(self.lengths)][:-1]

    @property
    def key_lengths(self) -> list[int]:
        """Keys that each run reads."""
        pairs = zip(self.lengths, self.parents, strict=True)
        return [n if parent is None else self.lengths[parent] + n for n, parent in pairs]

    def positions(self) -> torch.Tensor:
        """(L,) int64: a run without a parent starts at 0, any other where its parent ends."""
        firsts = [0 if parent is None else self.lengths[parent] for parent in self.parents]
        spans = [torch.arange(a, a + n) for a, n in zip(firsts, self.lengths, strict=True)]
        return torch.cat(spans)

    def ragged(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Cumulative lengths of the runs' queries (R+1,) and keys (R+1,), int32, and (sum of ``key_lengths``,) the
        token of each key that the runs read, run after run."""

        def build() -> tuple[torch.Tensor, ...]:
            spans = []
            for start, length, parent in zip(self.starts, self.lengths, self.parents, strict=True):
                if parent is not None:
                    spans.append(torch.arange(self.starts[parent], self.starts[parent] + self.lengths[parent]))
                spans.append(torch.arange(start, start + length))
            lengths = {"queries": self.lengths, "keys": self.key_lengths}
            ends = {name: torch.tensor([0, *accumulate(n)], dtype=torch.int32) for name, n in lengths.items()}
            return tuple(sent(ends | {"index": torch.cat(spans)}, device).values())

        return self._once(("ragged", device), build)

    def block_mask(self, device: torch.device, window: int | None) -> Any:
        """flex_attention's mask: same sequence, not later, and less than ``window`` positions back.

        Which blocks are read at all follows from the runs: create_block_mask would look at every pair of tokens, 20 GiB
        for 85,000 of them.
        """

        def build() -> Any:
            from torch.nn.attention.flex_attention import BlockMask

            runs = torch.repeat_interleave(torch.tensor(self.lengths))  # (L,) run of each token
            roots = torch.tensor([i if p is None else p for i, p in enumerate(self.parents)])[runs]
            (some, read), (whole, wholly) = (_listed(x) for x in self._blocks(window))
            parts = {"runs": runs, "roots": roots, "positions": self.positions()}
            there = sent(parts | {"some": some, "read": read, "whole": whole, "wholly": wholly}, device)
            runs, roots, positions = (there[name] for name in parts)

            def allowed(batch: Any, head: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
                same = (runs[q] == runs[k]) | (roots[q] == runs[k])
                near = True if window is None else positions[q] - positions[k] < window
                return same & (q >= k) & near

            blocks = (there[name] for name in ("some", "read", "whole", "wholly"))
            total = sum(self.lengths)
            return BlockMask.from_kv_blocks(*blocks, BLOCK_SIZE=BLOCK, mask_mod=allowed, seq_lengths=(total, total))

        return self._once(("mask", device, window), build)

    def _blocks(self, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(L/128, L/128) bool, on the CPU: pairs of blocks of which some tokens, and all tokens, may be read."""
        count = -(-sum(self.lengths) // BLOCK)
        some = torch.zeros(count, count, dtype=torch.bool)
        pairs = torch.zeros(count, count, dtype=torch.int64)  # of tokens that surely may be read
        spans = [self._span(run, start) for run, start in enumerate(self.starts)]
        for run, parent in enumerate(self.parents):
            queries, first_query, last_query = spans[run]
            for read in (run,) if parent is None else (parent, run):
                keys, first_key, last_key = spans[read]
                near = torch.ones(len(first_query), len(first_key), dtype=torch.bool)
                surely = (last_query - first_query + 1)[:, None] * (last_key - first_key + 1)
                if read == run:
                    near, surely = near.tril(), surely.tril(-1)
                if window is not None:
                    near &= first_query[:, None] - last_key < window
                    surely *= last_query[:, None] - first_key < window
                some[queries, keys] |= near
                pairs[queries, keys] += surely
        whole = pairs == BLOCK**2
        return some & ~whole, whole

    def _span(self, run: int, start: int) -> tuple[slice, torch.Tensor, torch.Tensor]:
        """The blocks in which a run stands, and its first and last position in each."""
        parent = self.parents[run]
        end = start + self.lengths[run]
        blocks = slice(start // BLOCK, -(-end // BLOCK))
        edges = (BLOCK * torch.arange(blocks.start, blocks.stop + 1)).clamp(start, end)
        edges += (0 if parent is None else self.lengths[parent]) - start
        return blocks, edges[:-1], edges[1:] - 1

    def _once(self, key: Any, build: Callable[[], Any]) -> Any:
        """Every layer of the model asks for the same tensors."""
        if key not in self._cache:
            self._cache[key] = build()
        return self._cache[key]


def _listed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As flex_attention reads a mask, int32: per row how many blocks are set, and the columns with those in front."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[None, None], order.int()[None, None]


def packed_kernel(asked: str, device: torch.device) -> str:
    """The kernel for a model loaded with attention ``asked``."""
    if device.type != "cuda" or asked == "eager":
        return "sdpa"
    return "flash_attention_2" if asked.startswith("flash_attention") else "flex_attention"


def use_packed_attention(model: Any, kernel: str, tried: bool = False) -> None:
    """Makes ``model`` call the kernel, see ``register_kernel``."""
    register_kernel(kernel, tried)
    model.set_attn_implementation(KERNELS[kernel])


def register_kernel(kernel: str, tried: bool = False) -> None:
    """Tells transformers of it; ``tried``: each call runs backward as well, and passes no gradient on."""
    AttentionInterface.register(KERNELS[kernel], partial(_tried if tried else packed_attention, kernel=kernel))


def why_not_packable(model: Any) -> str | None:
    """What keeps a model from reading packed sequences, in words; None if nothing does."""
    config = text_config(model.config)
    if not getattr(model, "_supports_attention_backend", False):
        return "its attention cannot be replaced"
    if getattr(model, "_is_stateful", False):
        return "its layers carry a state from token to token"
    others = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if others:
        return f"it has layers of type {', '.join(sorted(others))}"
    if any(name.endswith(".sinks") for name, _ in model.named_parameters()):
        return "its attention has sinks"
    return None


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # (B, heads, L, d)
    key: torch.Tensor,  # (B, kv heads, L, d)
    value: torch.Tensor,  # (B, kv heads, L, d)
    attention_mask: torch.Tensor | None,
    *,
    kernel: str,
    packed_layout: Layout | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """(B, L, heads, d). Without a layout every row is one sequence; padding on its right changes nothing."""
    if torch.is_autocast_enabled(query.device.type):  # the rotation leaves queries and keys in float32
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    options = {
        "scale": query.shape[-1] ** -0.5 if scaling is None else scaling,
        "dropout": dropout if module.training else 0.0,
        "softcap": softcap,
        "window": sliding_window,
    }
    if packed_layout is None or kernel == "sdpa" or (kernel == "flex_attention" and options["dropout"]):
        # flex_attention has no dropout
        out = _per_run(query, key, value, packed_layout, options)
    elif kernel == "flex_attention":
        mask = packed_layout.block_mask(query.device, sliding_window)
        out, _ = ALL_ATTENTION_FUNCTIONS["flex_attention"](
            module, query, key, value, mask, scaling=options["scale"], softcap=softcap
        )
        return out, None
    else:
        return _variable_length(query, key, value, packed_layout, options), None
    return out.transpose(1, 2).contiguous(), None


def _tried(module: torch.nn.Module, *tensors: torch.Tensor | None, **options: Any) -> tuple[torch.Tensor, None]:
    """``packed_attention`` of ``query, key, value, attention_mask``, after whose forward pass the kernel's own backward
    pass is run: one that fails inside a model's would leave hooks of sharded weights half done."""
    inputs = [x.detach().requires_grad_() for x in tensors[:3] if x is not None]
    with torch.enable_grad():
        out, _ = packed_attention(module, *inputs, *tensors[3:], **options)
        torch.autograd.grad(out, inputs, torch.ones_like(out))
    return out.detach(), None


def _per_run(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout | None, options: dict[str, Any]
) -> torch.Tensor:
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    if layout is None:
        return _attend(query, key, value, **options)
    # split's backward is one concatenation; slices would each make a zero gradient of the whole row.
    queries, keys, values = (x.split(layout.lengths, dim=2) for x in (query, key, value))
    outs = []
    for i, parent in enumerate(layout.parents):
        k, v = keys[i], values[i]
        if parent is not None:
            k, v = torch.cat([keys[parent], k], dim=2), torch.cat([values[parent], v], dim=2)
        outs.append(_attend(queries[i], k, v, **options))
    return torch.cat(outs, dim=2)


def _attend(
    query: torch.Tensor,  # (B, heads, q, d)
    key: torch.Tensor,  # (B, heads, k, d): the last q keys are the queries' own
    value: torch.Tensor,
    *,
    scale: float,
    dropout: float,
    softcap: float | None,
    window: int | None,
) -> torch.Tensor:
    q, k = query.shape[2], key.shape[2]
    if softcap is None and q == k and (window is None or window >= k):
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True, scale=scale)
    back = torch.arange(k - q, k, device=query.device)[:, None] - torch.arange(k, device=query.device)  # (q, k)
    allowed = back >= 0 if window is None else (back >= 0) & (back < window)
    if softcap is None:
        return F.scaled_dot_product_attention(query, key, value, allowed, dropout_p=dropout, scale=scale)
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * scale / softcap)
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1, dtype=torch.float32).to(query.dtype)
    return F.dropout(weights, dropout) @ value


def _variable_length(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, options: dict[str, Any]
) -> torch.Tensor:
    """flash-attn aligns its causal mask with the last key, which is what a run that reads its parent first needs."""
    from flash_attn import flash_attn_varlen_func

    cu_q, cu_k, index = layout.ragged(query.device)
    window = (-1, -1) if options["window"] is None else (options["window"] - 1, 0)
    out = flash_attn_varlen_func(
        query[0].transpose(0, 1),  # (L, heads, d)
        key[0].transpose(0, 1)[index],
        value[0].transpose(0, 1)[index],
        cu_q,
        cu_k,
        max(layout.lengths),
        max(layout.key_lengths),
        dropout_p=options["dropout"],
        softmax_scale=options["scale"],
        causal=True,
        window_size=window,
        softcap=options["softcap"] or 0.0,
    )
    return out[None]
