"""The row kernels of `impl="cpu"` and `impl="cuda"`: operators of csrc/, loaded, with fake kernels, and called.

One set of schemas, one implementation per device, and this one file for both. On the CPU rows are vectorised for
AVX-512, AVX2 or any processor and threaded; on CUDA sm_90 and later hold a row in a cluster's shared memory, sm_80 in
one block's shared memory and registers, and rows that cannot fit are read twice (docs/kernels.md; no GPU has run them).

Row arithmetic is fp32 whatever the logits' dtype, rounded once when the gradient is stored. A row's result depends on
that row alone: not on the batch, not on the number of threads.
"""

import functools
import importlib.metadata
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from igrpo_kernels.batch import TokenBatch
from igrpo_kernels.objective import coupling, entropy_slope, grpo_objective, policy_factor, pulled_to, reduction_weights
from igrpo_kernels.source_hash import source_hash
from igrpo_kernels.types import GRPOLossConfig, LogitTransform, RowStats


@dataclass(frozen=True)
class CompiledRows:
    """`RowKernels` on `torch.ops.igrpo`."""

    name: str
    teaches = False

    def statistics(
        self, logits: Tensor, index: Tensor, mask: Tensor | None, transform: LogitTransform, with_entropy: bool = True
    ) -> RowStats:
        """One read of the logits; the entropy costs nothing and is always there."""
        logps, entropy, norm = torch.ops.igrpo.row_stats(_outer(logits), index, mask, *_numbers(transform))
        return RowStats(logps, entropy, *norm.unbind())

    def gradient(
        self,
        logits: Tensor,
        out: Tensor | None,
        index: Tensor,
        mask: Tensor | None,
        stats: RowStats,
        grad_logps: Tensor | None,
        grad_entropy: Tensor | None,
        transform: LogitTransform,
    ) -> Tensor:
        """One read of the logits, one write of their gradient; a copy more if `out` has another dtype."""
        x, norm = _outer(logits), torch.stack([stats.row_max, stats.log_sum])
        grad_logps = torch.zeros_like(stats.logps) if grad_logps is None else grad_logps.contiguous()
        grad_entropy = None if grad_entropy is None else grad_entropy.contiguous()
        arguments = (x, index, mask, stats.logps, stats.entropy, norm, grad_logps, grad_entropy, *_numbers(transform))
        if out is None:
            return torch.ops.igrpo.row_grad(*arguments).view(logits.shape)
        torch.ops.igrpo.row_grad_(*arguments)
        return out if out is logits else out.copy_(logits)

    def fits_one_pass(self, batch: TokenBatch, config: GRPOLossConfig) -> bool:
        """Whether dloss/dl of a row follows from that row's logits and constants known beforehand."""
        corrects = config.importance_sampling_mode is not None or config.rollout_rs is not None
        sampled = corrects and batch.sampling_per_token_logps is not None
        factor_follows_logps = sampled and batch.old_per_token_logps is None
        return config.loss.term.one_pass and coupling(batch, config) == "token" and not factor_follows_logps

    def tables(self, device: torch.device) -> Callable[..., dict[str, Tensor | None]] | None:
        """On a GPU as Triton makes them: there launches cost more than their work."""
        if device.type != "cuda":
            return None
        from igrpo_kernels.triton_rows import TRITON

        return TRITON.tables(device)

    def objective(
        self,
        logps: Tensor,
        entropy: Tensor | None,
        batch: TokenBatch,
        config: GRPOLossConfig,
        num_items_in_batch: Tensor | float | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As `tables`."""
        if logps.is_cuda:
            from igrpo_kernels.triton_rows import TRITON

            return TRITON.objective(logps, entropy, batch, config, num_items_in_batch)
        return grpo_objective(logps, entropy, batch, config, num_items_in_batch)

    def coefficient_inputs(
        self, batch: TokenBatch, config: GRPOLossConfig, num_items_in_batch: Tensor | float | None
    ) -> tuple[Tensor | None, ...]:
        """index, mask, advantages, loss weights, old, ref, policy factor, dloss/dentropy, what kl_tau pulls to, NLL
        weights, temperatures; each (n,) or None.
        """
        weights, sampler, slope = self._row_weights(batch, config, num_items_in_batch)
        return (
            batch.index,
            batch.mask,
            batch.advantages.contiguous(),
            weights,
            batch.old_per_token_logps,
            batch.ref_per_token_logps if config.beta != 0.0 else None,
            sampler,
            slope,
            pulled_to(batch, config),
            batch.nll_weights,
            batch.temperatures,
        )

    def _row_weights(
        self, batch: TokenBatch, config: GRPOLossConfig, num_items_in_batch: Tensor | float | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Loss weights, policy factor and dloss/dentropy, (n,) each; as `tables`."""
        if batch.mask.is_cuda:
            from igrpo_kernels import triton_objective

            if triton_objective.covers(batch, config):
                return triton_objective.row_weights(batch, config, num_items_in_batch, of_tokens=True)
        old, slope = batch.old_per_token_logps, entropy_slope(batch, config)
        weights = reduction_weights(batch, config, num_items_in_batch).contiguous()
        slope = None if slope is None else torch.where(batch.mask, slope, 0.0)
        return weights, None if old is None else policy_factor(old, batch, config), slope

    def token_loss(
        self, logits: Tensor, out: Tensor | None, inputs: tuple[Tensor | None, ...], config: GRPOLossConfig
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One pass over the logits where a row stays close to the processor, one write."""
        *rows, temperatures = inputs
        transform = config.logit_transform._replace(temperatures=temperatures)
        arguments = (_outer(logits), *rows, objective_numbers(config), *_numbers(transform))
        if out is None:
            logps, entropy, slope, grad = torch.ops.igrpo.token_loss(*arguments)
            return logps, entropy, slope, grad.view(logits.shape)
        found = torch.ops.igrpo.token_loss_(*arguments)
        return *found, out if out is logits else out.copy_(logits)

    def scale_(self, grad: Tensor, factor: Tensor) -> None:
        """grad *= factor (), for a factor that is nearly always 1: then the memory is not touched."""
        if grad.device.type != "cpu":  # looking at the factor here would be a sync; the kernel looks
            torch.ops.igrpo.scale_(_outer(grad if grad.dim() > 1 else grad[None]), factor.float())
        elif factor.item() != 1.0:
            grad.mul_(factor)


def new_tensor(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised, on the device of `like`; on a CPU in memory that earlier calls have left, if there is any."""
    if like.device.type != "cpu" or missing_library("_C_cpu") is not None:
        return torch.empty(shape, dtype=dtype, device=like.device)
    return torch.ops.igrpo.cpu_new(like.new_empty(0, dtype=dtype), shape)


def objective_numbers(config: GRPOLossConfig) -> list[float]:
    """ObjectiveParams of csrc/params.h, in its order."""
    return [
        _term_code(config.loss.term.name),
        int(config.kl_estimator[1]),
        float(config.use_bias_correction_kl),
        config.clip_low,
        config.clip_high,
        math.inf if config.delta is None else config.delta,
        math.inf if config.dual_clip is None else config.dual_clip,
        config.beta,
        config.sapo_temperature_pos,
        config.sapo_temperature_neg,
        config.kl_tau,
        config.dro_beta or 0.0,
    ]


def _term_code(name: str) -> int:
    """The number that csrc/token_objective.h gives a policy term of `losses.py`."""
    terms = _policy_terms()
    if name not in terms:
        raise ValueError(f"csrc/token_objective.h has no slope of the policy term {name!r}, only of {', '.join(terms)}")
    return terms.index(name)


_term_code._dynamo_marked_constant = True  # as `_resolve` in impls.py


@functools.cache
def _policy_terms() -> list[str]:
    return torch.ops.igrpo.policy_terms().split()


def _outer(x: Tensor) -> Tensor:
    """(n, V) or (B, T, V) as the operators take it: (outer, inner, V)."""
    return x if x.dim() == 3 else x[None]


def _numbers(transform: LogitTransform) -> tuple[float, float, float, Tensor | None]:
    scale, cap, temperature, temperatures = transform
    return scale, cap or 0.0, temperature, temperatures


# ---- the libraries

_HASH_OPERATOR = {"_C_cpu": "source_hash", "_C_cuda": "cuda_source_hash"}


@functools.cache
def missing_library(name: str) -> str | None:
    """Loads igrpo_kernels/<name>.so once; None when its operators are there, else why not and what to do."""
    path = Path(__file__).parent / f"{name}.so"
    if not path.is_file():
        lacked = "no torch, no C++ compiler" if name == "_C_cpu" else "no nvcc, or a torch without CUDA,"
        return (
            f"{path.name} is not built ({lacked} or IGRPO_SKIP_EXT=1 at the installation); {build_command()} builds it"
        )
    try:
        torch.ops.load_library(path)
        built = getattr(torch.ops.igrpo, _HASH_OPERATOR[name])()
    except (OSError, AttributeError) as error:  # another processor or torch; cut short; no operators of ours
        words = str(error.__cause__ or error).splitlines()[0]
        return f"{path.name} does not load ({words}); {build_command()} builds it again for this torch"
    sources = source_hash(name)
    if sources is not None and sources != built:
        return f"{path.name} was built from other sources than the ones in csrc/; {build_command()} builds it again"
    if name == "_C_cpu":
        _register_fake_kernels()
    return None


@functools.cache
def build_command() -> str:
    """What builds both libraries from where this package came, or stops and says why it cannot."""
    if source_hash("_C_cpu") is not None:
        return "`IGRPO_REQUIRE_EXT=1 pip install --no-deps -e .` in the source folder"
    try:
        noted = importlib.metadata.distribution("igrpo").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        noted = None
    origin = json.loads(noted) if noted else {"url": "igrpo"}
    source = origin["url"]
    if "vcs_info" in origin:
        source = f"{origin['vcs_info']['vcs']}+{source}@{origin['vcs_info']['commit_id']}"
    # pip keeps the wheel without the libraries, too.
    options = "--force-reinstall --no-deps --no-cache-dir --no-binary igrpo"
    return f"`IGRPO_REQUIRE_EXT=1 pip install {options} '{source}'`"


@functools.cache  # torch 2.11 refuses a second registration
def _register_fake_kernels() -> None:
    def stats(logits, *_):
        n = logits.shape[0] * logits.shape[1]
        return tuple(logits.new_empty(shape, dtype=torch.float32) for shape in ((n,), (n,), (2, n)))

    def loss_rows(logits, *_):
        n = logits.shape[0] * logits.shape[1]
        return tuple(logits.new_empty((n,), dtype=torch.float32) for _ in range(3))

    def gradient(logits, *_):
        return logits.new_empty(logits.shape)

    torch.library.register_fake("igrpo::row_stats", stats)
    torch.library.register_fake("igrpo::row_grad", gradient)
    torch.library.register_fake("igrpo::row_grad_", lambda *_: None)
    torch.library.register_fake("igrpo::token_loss", lambda logits, *_: (*loss_rows(logits), gradient(logits)))
    torch.library.register_fake("igrpo::token_loss_", loss_rows)
    torch.library.register_fake("igrpo::scale_", lambda *_: None)
    torch.library.register_fake("igrpo::cpu_new", lambda like, shape: like.new_empty(shape))
