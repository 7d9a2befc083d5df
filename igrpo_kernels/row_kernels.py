"""What the fused losses ask of an implementation's row kernels. `CompiledRows` and `TritonRows` provide it.

Logits come as (n, V) or (B, T, V) with adjacent columns. `out` is where dlogits go: None = a new tensor of logits'
dtype, `logits` itself = in place, or a tensor of any dtype. Masked rows are not read; their statistics and gradients
are 0. A transform's temperatures are of the same rows. An index outside the vocabulary makes its row NaN.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from igrpo_kernels.batch import TokenBatch
from igrpo_kernels.types import GRPOLossConfig, LogitTransform, RowStats


class RowKernels(Protocol):
    """Statistics of rows, gradients of rows, and for token-level losses both at once."""

    name: str
    """Its row in the table of `impls.py`: operators cannot take an object."""

    teaches: bool
    """Whether statistics hold a divergence to a teacher."""

    def statistics(
        self, logits: Tensor, index: Tensor, mask: Tensor | None, transform: LogitTransform, with_entropy: bool = True
    ) -> RowStats:
        """Of n rows; index and mask are (n,)."""

    def gradient(
        self,
        logits: Tensor,
        out: Tensor | None,
        index: Tensor,  # (n,), as the rest
        mask: Tensor | None,
        stats: RowStats,
        grad_logps: Tensor | None,
        grad_entropy: Tensor | None,
        transform: LogitTransform,
    ) -> Tensor:
        """dlogits."""

    def fits_one_pass(self, batch: TokenBatch, config: GRPOLossConfig) -> bool:
        """Whether `token_loss` can serve this loss."""

    def coefficient_inputs(
        self, batch: TokenBatch, config: GRPOLossConfig, num_items_in_batch: Tensor | float | None
    ) -> tuple[Tensor | None, ...]:
        """What a row's coefficient needs besides its logits, the index first, temperatures last; (n,), () or None."""

    def token_loss(
        self, logits: Tensor, out: Tensor | None, inputs: tuple[Tensor | None, ...], config: GRPOLossConfig
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """logps (n,), entropy (n,), dloss/dlogps (n,) or None, dlogits."""

    def tables(self, device: torch.device) -> Callable[..., dict[str, Tensor | None]] | None:
        """What makes a batch's tensors there in one launch, for `TokenBatch.build`; None = PyTorch does."""

    def objective(
        self,
        logps: Tensor,  # (n,)
        entropy: Tensor | None,  # (n,)
        batch: TokenBatch,
        config: GRPOLossConfig,
        num_items_in_batch: Tensor | float | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`objective.grpo_objective`: loss () and metrics, differentiable in logps and with a bonus in entropy."""

    def scale_(self, grad: Tensor, factor: Tensor) -> None:
        """grad *= factor () in place, free where factor is 1."""


@dataclass(frozen=True)
class AroundRows:
    """What `RowKernels` that work around an implementation's have in common."""

    kernels: RowKernels
    teaches = False

    def fits_one_pass(self, batch: TokenBatch, config: GRPOLossConfig) -> bool:
        """Never: the objective runs on rows."""
        return False

    def objective(
        self,
        logps: Tensor,
        entropy: Tensor | None,
        batch: TokenBatch,
        config: GRPOLossConfig,
        num_items_in_batch: Tensor | float | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Of rows it is the implementation's."""
        return self.kernels.objective(logps, entropy, batch, config, num_items_in_batch)

    def scale_(self, grad: Tensor, factor: Tensor) -> None:
        """grad *= factor ()."""
        self.kernels.scale_(grad, factor)
