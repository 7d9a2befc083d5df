"""Temperature per token: the rows' own divisors of their logits, checked once and given to every implementation."""

from dataclasses import replace

import torch
from torch import Tensor

from igrpo_kernels.batch import TokenBatch, values_may_be_read
from igrpo_kernels.types import GRPOLossConfig


def temperature_rows(
    temperatures: Tensor | None,
    temperature: float,
    index: Tensor,  # the caller's token ids
    mask: Tensor | None,  # (n,) bool
    dtype: torch.dtype,
) -> Tensor | None:
    """(n,) in the compute dtype, 1 where masked.

    Raises:
        ValueError: a shape, dtype or device that does not fit; a `temperature` other than 1 beside it; on the CPU an
            unmasked value that is not finite and above 0 (elsewhere its row becomes NaN).
    """
    if temperatures is None:
        return None
    if temperature != 1.0:
        raise ValueError(
            f"temperatures, one per token, take the place of temperature={temperature}; leave that at 1.0, or write "
            "one of the two"
        )
    if not isinstance(temperatures, Tensor) or not temperatures.is_floating_point():
        given = temperatures.dtype if isinstance(temperatures, Tensor) else type(temperatures).__name__
        raise ValueError(
            f"temperatures must be a floating-point tensor, got {given}; one number for all tokens is `temperature`"
        )
    if temperatures.shape != index.shape:
        raise ValueError(
            f"temperatures has shape {tuple(temperatures.shape)} but the token ids have shape {tuple(index.shape)}: it "
            "must be one per token, such as per_sequence[:, None].expand(B, T)"
        )
    if temperatures.device != index.device:
        raise ValueError(
            f"temperatures is on {temperatures.device} but the token ids are on {index.device}; move it there"
        )
    rows = temperatures.detach().reshape(-1).to(dtype)
    rows = rows.contiguous() if mask is None else torch.where(mask, rows, 1.0)
    usable = (rows > 0) & (rows < torch.inf)
    if not values_may_be_read(rows):
        return torch.where(usable, rows, torch.nan)
    if not bool(usable.all()):
        raise ValueError(
            f"temperatures must be finite and > 0 on unmasked positions, got {rows[~usable][0].item()}; a greedy token "
            "has no temperature: mask it out, or give it the one of the others"
        )
    return rows


def with_temperatures(
    batch: TokenBatch,
    temperatures: Tensor | None,
    config: GRPOLossConfig,
    index: Tensor,  # the caller's token ids
) -> TokenBatch:
    """The batch with them, as they are if there are none."""
    rows = temperature_rows(temperatures, config.temperature, index, batch.mask, batch.advantages.dtype)
    return batch if rows is None else replace(batch, temperatures=rows)
