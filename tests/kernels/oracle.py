"""Inputs that sit on the decision boundaries of the loss, and comparisons against the fp64 truth.

Shared by the tests of every implementation. Random old log-probs far from the current ones would clip every token and
let a zero gradient pass; `boundary_inputs` draws them around the current ones and asserts that every branch is hit.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from igrpo_kernels import GRPOLossConfig, GRPOLossOutput, available_impls, grpo_loss, linear_grpo_loss
from igrpo_kernels.batch import TokenBatch
from igrpo_kernels.losses import LOSSES, TermInputs

# Implementations the shared tests run on, as far as this machine has them; a new one joins by adding its name.
IMPLS = tuple(name for name in ("torch", "cpu") if available_impls()[name] == "available")
_FIRST = {loss.term: name for name, loss in reversed(LOSSES.items())}
# Every loss, and of each term every level: reductions do not look at levels.
LOSS_LEVELS = [
    (name, level)
    for name, loss in LOSSES.items()
    for level in (loss.term.levels if name == _FIRST[loss.term] else ("token",))
]
REQUIRED = {"dro": {"dro_beta": 0.3}}  # what a loss does not go without


def _weight_is_constant(loss_type: str) -> bool:
    """Whether the ratio enters the policy term as a constant: then the loss is a number times logp."""
    logps, ones = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    log_ratio, weight = logps.clone().requires_grad_(), ones.clone().requires_grad_()
    batch = TokenBatch.build(torch.zeros(1, 1, dtype=torch.int64), ones, dtype=torch.float64)
    x = TermInputs(logps, logps, log_ratio, weight, ones, None, batch)
    config = GRPOLossConfig(loss_type=loss_type, max_completion_length=1, **REQUIRED.get(loss_type, {}))
    return not LOSSES[loss_type].term.function(x, config).requires_grad


CONSTANT_WEIGHTS = tuple(name for name in LOSSES if _weight_is_constant(name))


@dataclass(frozen=True)
class LossInputs:
    """Everything a loss call takes except the configuration; padded (B, T), or packed (n,) when cu_seqlens is set."""

    logits: Tensor  # (B, T, V) or (n, V)
    completion_ids: Tensor  # (B, T) or (n,), as the rest
    advantages: Tensor  # (B,)
    completion_mask: Tensor | None
    old_per_token_logps: Tensor
    ref_per_token_logps: Tensor
    sampling_per_token_logps: Tensor
    cu_seqlens: Tensor | None = None

    def to(self, dtype: torch.dtype) -> "LossInputs":
        """Logits in `dtype`, the per-token constants in the dtype the mathematics runs in."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        names = ("advantages", "old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps")
        return replace(self, logits=self.logits.to(dtype), **{name: getattr(self, name).to(wide) for name in names})

    def prompt_lengths(self) -> Tensor:
        """Two sequences to a prompt."""
        mask, offsets = self.completion_mask, self.cu_seqlens
        lengths = offsets.diff() if mask is None else mask.reshape(len(self.advantages), -1).sum(-1)
        prompt = torch.arange(len(lengths)) // 2
        return torch.zeros_like(lengths).index_add(0, prompt, lengths)[prompt]

    def keywords(self, config: GRPOLossConfig) -> dict[str, Tensor | None]:
        """The keyword tensors of a loss call, only those that `config` asks for."""
        sampler = config.importance_sampling_mode is not None or config.off_policy_mask_threshold is not None
        return {
            "completion_mask": self.completion_mask,
            "prompt_lengths": self.prompt_lengths() if config.loss_type == "prompt_mean" else None,
            "old_per_token_logps": self.old_per_token_logps,
            "ref_per_token_logps": self.ref_per_token_logps if config.beta else None,
            "sampling_per_token_logps": self.sampling_per_token_logps if sampler else None,
            "cu_seqlens": self.cu_seqlens,
        }


def boundary_inputs(
    *, B: int = 8, T: int = 24, V: int = 37, level: str = "token", seed: int = 0, config: GRPOLossConfig | None = None
) -> LossInputs:
    """Padded fp64 inputs whose tokens are clipped low, clipped high, unclipped and masked, at least 5 % each."""
    config = config or GRPOLossConfig(importance_sampling_level=level)
    generator = torch.Generator().manual_seed(seed)
    logits = 2.0 * torch.randn(B, T, V, generator=generator, dtype=torch.float64)
    ids = torch.randint(V, (B, T), generator=generator)
    # Alternating signs over sequences sorted by their ratio put both signs at both ends of the clip range.
    magnitude = 0.5 + torch.rand(B, generator=generator, dtype=torch.float64)
    advantages = magnitude * torch.where(torch.arange(B) % 2 == 0, -1.0, 1.0)
    lengths = torch.randint(max(T // 2, 1), T + 1, (B,), generator=generator)
    mask = torch.arange(T) < lengths[:, None]

    logps = torch.log_softmax(logits, -1).gather(-1, ids[..., None]).squeeze(-1)
    noise = 0.3 * _stratified_randn((B, T), generator)
    if level != "token":  # token noise averages out over a sequence, so each sequence gets its own shift
        noise = 0.3 * noise + 0.5 * _stratified_randn((B,), None)[:, None]
    old = logps - noise
    inputs = LossInputs(
        logits=logits,
        completion_ids=ids,
        advantages=advantages,
        completion_mask=mask,
        old_per_token_logps=old,
        ref_per_token_logps=logps + 0.3 * _stratified_randn((B, T), generator),
        sampling_per_token_logps=old + 0.3 * _stratified_randn((B, T), generator),
    )
    assert_every_branch_is_hit(noise, inputs, config)
    return inputs


def row_temperatures(mask: Tensor) -> Tensor:
    """A temperature for each row, a factor of 100 between neighbours; NaN where masked."""
    return torch.where(torch.arange(mask.numel()) % 2 == 0, 0.2, 20.0).masked_fill(~mask.flatten(), torch.nan)


def assert_every_branch_is_hit(log_ratio: Tensor, inputs: LossInputs, config: GRPOLossConfig) -> None:
    """Every branch of the clipped surrogate holds at least 5 % of the tokens, or the inputs cannot test it."""
    mask, advantages = inputs.completion_mask, inputs.advantages[:, None]
    if config.importance_sampling_level != "token":
        lengths = mask.sum(-1, keepdim=True).clamp(min=1)
        log_ratio = ((log_ratio * mask).sum(-1, keepdim=True) / lengths).expand_as(log_ratio)
    ratio = log_ratio.exp()
    low = mask & (ratio < 1 - config.epsilon) & (advantages < 0)
    high = mask & (ratio > 1 + (config.epsilon_high or config.epsilon)) & (advantages > 0)
    shares = {"clipped low": low, "clipped high": high, "unclipped": mask & ~low & ~high, "masked": ~mask}
    for name, rows in shares.items():
        share = rows.double().mean().item()
        assert share >= 0.05, f"only {share:.1%} of the tokens are {name}: these inputs cannot test that branch"


def full_config(loss_type: str = "grpo", level: str = "token", **extra) -> GRPOLossConfig:
    """Every term of the loss switched on; for `boundary_inputs` of the default size."""
    values = {
        "loss_type": loss_type,
        "importance_sampling_level": level,
        "epsilon_high": 1.3 if loss_type == "cispo" else 0.28,
        "beta": 0.1,
        "entropy_coef": 0.02,
        "top_entropy_quantile": 0.8,
        "importance_sampling_mode": "token_truncate",
        "off_policy_mask_threshold": 0.02,
        "max_completion_length": 24,
        **REQUIRED.get(loss_type, {}),
    }
    return GRPOLossConfig(**{**values, **extra})


def random_head(
    inputs: LossInputs, *, hidden_size: int = 8, dtype: torch.dtype = torch.float64, bias: bool = True
) -> list[Tensor | None]:
    """Leaves hidden (..., H), weight (V, H) and bias (V,) or None for the tokens and vocabulary of `inputs`."""
    generator = torch.Generator().manual_seed(5)
    vocab = inputs.logits.shape[-1]
    shapes = [(*inputs.completion_ids.shape, hidden_size), (vocab, hidden_size), (vocab,)][: 2 + bias]
    leaves = [torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]
    return leaves if bias else [*leaves, None]


def packed(inputs: LossInputs) -> LossInputs:
    """The unmasked tokens of padded inputs, one sequence after the other."""
    mask = inputs.completion_mask
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(-1).cumsum(0)])
    return LossInputs(
        logits=inputs.logits[mask],
        completion_ids=inputs.completion_ids[mask],
        advantages=inputs.advantages,
        completion_mask=None,
        old_per_token_logps=inputs.old_per_token_logps[mask],
        ref_per_token_logps=inputs.ref_per_token_logps[mask],
        sampling_per_token_logps=inputs.sampling_per_token_logps[mask],
        cu_seqlens=offsets,
    )


def loss_and_grad(
    inputs: LossInputs, config: GRPOLossConfig, *, impl: str = "torch", **keywords
) -> tuple[GRPOLossOutput, Tensor]:
    """`grpo_loss` and its gradient with respect to the logits."""
    logits = inputs.logits.detach().clone().requires_grad_()
    keywords = {**inputs.keywords(config), **keywords}
    out = grpo_loss(logits, inputs.completion_ids, inputs.advantages, config=config, impl=impl, **keywords)
    out.loss.backward()
    return out, logits.grad


def linear_loss_and_grads(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    inputs: LossInputs,
    config: GRPOLossConfig,
    *,
    impl: str = "torch",
    **keywords,
) -> tuple[GRPOLossOutput, list[Tensor | None]]:
    """`linear_grpo_loss` and its gradients with respect to hidden states, weight and bias."""
    leaves = [None if x is None else x.detach().clone().requires_grad_(x.requires_grad) for x in (hidden, weight, bias)]
    keywords = {**inputs.keywords(config), **keywords}
    out = linear_grpo_loss(
        leaves[0],
        leaves[1],
        inputs.completion_ids,
        inputs.advantages,
        lm_head_bias=leaves[2],
        config=config,
        impl=impl,
        **keywords,
    )
    out.loss.backward()
    return out, [None if x is None else x.grad for x in leaves]


def assert_close_to_truth(
    name: str,
    actual: Tensor,
    truth: Tensor,
    *,
    baseline: Tensor | None = None,
    factor: float = 1.0,
    rtol: float = 0.0,
    atol: float = 0.0,
) -> None:
    """|actual - truth| <= factor·|baseline - truth| + rtol·max|truth| + atol, elementwise.

    `truth` is fp64, `baseline` what plain PyTorch makes of the same input in the dtype under test. Infinities must
    sit in the same places and any NaN fails. rtol is relative to the largest true value: a gradient's small entries
    are differences of larger ones and carry their rounding.
    """
    assert actual.shape == truth.shape, f"{name}: shape {tuple(actual.shape)} instead of {tuple(truth.shape)}"
    actual, truth = actual.detach().double(), truth.detach().double()
    assert not actual.isnan().any(), f"{name}: {int(actual.isnan().sum())} NaN of {actual.numel()}"
    infinite = truth.isinf() | actual.isinf()
    assert torch.equal(actual[infinite], truth[infinite]), f"{name}: infinities differ"
    actual, truth = actual.masked_fill(infinite, 0.0), truth.masked_fill(infinite, 0.0)
    scale = truth.abs().max().item() if truth.numel() else 0.0
    allowed = torch.full_like(truth, rtol * scale + atol)
    if baseline is not None:
        allowed += factor * (baseline.detach().double().masked_fill(infinite, 0.0) - truth).abs()
    excess = (actual - truth).abs() - allowed
    if excess.numel() and excess.max() > 0:
        worst = int(excess.argmax())
        position = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), excess.shape))
        raise AssertionError(
            f"{name}: {int((excess > 0).sum())} of {excess.numel()} values too far from the truth; worst at "
            f"{position}: {actual.flatten()[worst].item()!r} instead of {truth.flatten()[worst].item()!r}, "
            f"allowed error {allowed.flatten()[worst].item():.3e}"
        )


def _stratified_randn(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Normal quantiles in random order (sorted without a generator): the shares of the tails do not depend on luck."""
    count = torch.Size(shape).numel()
    quantiles = torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    order = torch.arange(count) if generator is None else torch.randperm(count, generator=generator)
    return quantiles[order].reshape(shape)
