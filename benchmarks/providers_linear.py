"""Providers from hidden states and the head's weight: linear_selective_log_softmax and linear_grpo_loss."""

from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.objective import grpo_from_logps
from benchmarks.problems import Outputs, Problem
from benchmarks.provider import Forward, Provider
from benchmarks.providers_logits import eager_outputs
from igrpo_kernels import linear_grpo_loss, linear_selective_log_softmax, lm_head

LOGPS, LOSS = "linear_selective_log_softmax", "linear_grpo_loss"


def ours(impl: str) -> Forward:
    def forward(p: Problem) -> Outputs:
        if p.op == LOGPS:
            found = linear_selective_log_softmax(p.leaf, p.weight, p.ids, return_entropy=p.wants_entropy, impl=impl)
            return {"logps": found[0], "entropy": found[1]} if p.wants_entropy else {"logps": found}
        out = linear_grpo_loss(
            p.leaf, p.weight, p.ids, p.advantages, old_per_token_logps=p.old,
            ref_per_token_logps=p.ref if p.config.beta else None, config=p.config, impl=impl,
        )  # fmt: skip
        return {"loss": out.loss}

    return forward


def one_stream(impl: str) -> Forward:
    """What the second stream brings."""
    forward = ours(impl)

    def alone(p: Problem) -> Outputs:
        with patch.dict(lm_head.HALF_ROWS, clear=True):
            return forward(p)

    return alone


def eager_linear(leaf: Tensor, weight: Tensor, *rest) -> Outputs:
    return eager_outputs(F.linear(leaf, weight), *rest)


def eager(compiled: bool, dynamic: bool | None = False) -> Forward:
    function = torch.compile(eager_linear, dynamic=dynamic) if compiled else eager_linear

    def forward(p: Problem) -> Outputs:
        c, op = p.config, p.op.removeprefix("linear_")
        options = {"sequence": p.variant == "gspo", "beta": c.beta, "entropy_coef": c.entropy_coef}
        return function(p.leaf, p.weight, p.ids, p.advantages, p.old, p.ref, op, p.wants_entropy, options)

    return forward


def from_logps(p: Problem, logps: Tensor, entropy: Tensor | None) -> Outputs:
    """Ends a provider that computes log-probs (n,) and perhaps entropies (n,)."""
    logps = logps.view(p.ids.shape)
    entropy = None if entropy is None else entropy.view(p.ids.shape)
    if p.op == LOGPS:
        return {"logps": logps, "entropy": entropy} if p.wants_entropy else {"logps": logps}
    c = p.config
    return {"loss": grpo_from_logps(logps, entropy, p.advantages, p.old, p.ref, sequence=p.variant == "gspo",
                                    beta=c.beta, entropy_coef=c.entropy_coef)}  # fmt: skip


def trl() -> Forward:
    """What TRL's GRPOTrainer calls, with its own chunk of 32,768 columns."""
    from trl.kernels import ChunkedLogProbFunction

    def forward(p: Problem) -> Outputs:
        wanted = ("entropy",) if p.wants_entropy else ()
        hidden, ids = p.leaf.view(-1, p.shape.H), p.ids.view(-1)
        logps, h, *_ = ChunkedLogProbFunction.apply(hidden, p.weight, None, ids, 1.0, 32_768, None, 1.0, wanted)
        return from_logps(p, logps, h if p.wants_entropy else None)

    return forward


def liger_loss() -> Forward:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    losses = {}

    def forward(p: Problem) -> Outputs:
        c = p.config
        if p.variant not in losses:
            losses[p.variant] = LigerFusedLinearGRPOLoss(
                beta=c.beta, use_ref_model=c.beta != 0, loss_type="grpo", epsilon_low=0.2, epsilon_high=0.2,
                temperature=1.0, importance_sampling_level=c.importance_sampling_level, compiled=True,
                use_bias_correction_kl=c.use_bias_correction_kl,
            )  # fmt: skip
        loss, _ = losses[p.variant](
            p.leaf, p.weight, p.ids, p.mask, p.advantages, old_per_token_logps=p.old,
            ref_per_token_logps=p.ref if c.beta else None,
        )  # fmt: skip
        return {"loss": loss}

    return forward


def liger_scaled_ce() -> Forward:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    def forward(p: Problem) -> Outputs:
        hidden, ids = p.leaf.view(-1, p.shape.H), p.ids.view(-1)
        found = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, p.weight, ids, 1.0, -100, 1, p.wants_entropy)
        nll, entropy = found[:2] if isinstance(found, tuple) else (found, None)
        return from_logps(p, -nll, entropy if p.wants_entropy else None)

    return forward


def cce(impl: str) -> Forward:
    from cut_cross_entropy import linear_cross_entropy

    # Its default leaves small softmax entries out of the gradient; without that it is exact.
    options = {"filter_eps": None} if impl == "cce" else {}
    return lambda p: from_logps(
        p, -linear_cross_entropy(p.leaf, p.weight, p.ids, reduction="none", impl=impl, **options), None
    )


def pytorch() -> Forward:
    """Cross-entropy only."""

    def forward(p: Problem) -> Outputs:
        if not hasattr(F, "linear_cross_entropy"):
            raise NotImplementedError(f"torch {torch.__version__} has no linear_cross_entropy; 2.13 does")
        hidden, ids = p.leaf.view(-1, p.shape.H), p.ids.view(-1)
        return {"loss": F.linear_cross_entropy(hidden, p.weight, ids, reduction="mean")}

    return forward


def quack() -> Forward:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def forward(p: Problem) -> Outputs:
        hidden, ids = p.leaf.view(-1, p.shape.H), p.ids.view(-1)
        return {"loss": chunked_linear_cross_entropy(hidden, p.weight, ids, chunk_size=4096, reduction="mean")}

    return forward


CCE = {"package": "cut_cross_entropy", "install": "cut-cross-entropy==25.1.1", "impl": "cce", "ops": (LOGPS, LOSS),
       "lacks": ("entropy", "entropy bonus")}  # fmt: skip
LIGER = {"package": "liger_kernel", "install": "liger-kernel==0.8.5", "impl": "liger"}
ONLY_CE = ("cross entropy",)
OURS = (
    *(Provider(impl, impl, partial(ours, impl), ops=(LOGPS, LOSS)) for impl in ("cuda", "triton", "cpu", "torch")),
    *(Provider(f"{i}, one stream", i, partial(one_stream, i), cuda=True, ops=(LOSS,)) for i in ("cuda", "triton")),
)
RIVALS = (
    Provider("eager", "eager", partial(eager, False), ops=(LOGPS, LOSS)),
    Provider("torch.compile", "compile", partial(eager, True), ops=(LOGPS, LOSS), compiled=True),
    Provider("trl, chunked", "trl", trl, "trl", "trl==1.16.0", ops=(LOGPS, LOSS)),
    Provider("liger FusedLinearGRPO", build=liger_loss, ops=(LOSS,), lacks=("entropy bonus",), compiled=True, **LIGER),
    Provider("liger scaled CE", build=liger_scaled_ce, ops=(LOGPS, LOSS), **LIGER),
    Provider("cce", build=partial(cce, "cce"), cuda=True, **CCE),
    Provider("cce, its torch_compile", build=partial(cce, "torch_compile"), compiled=True, **CCE),
    Provider("F.linear_cross_entropy", "pytorch", pytorch, ops=(LOSS,), only=ONLY_CE),
    Provider("quack, chunked", "quack", quack, "quack", "quack-kernels", True, (LOSS,), only=ONLY_CE),
)
