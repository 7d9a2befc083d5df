"""Providers over materialised logits: selective_log_softmax and grpo_loss."""

from functools import partial

import torch
from torch import Tensor

from benchmarks.objective import grpo_from_logps
from benchmarks.problems import Outputs, Problem
from benchmarks.provider import Forward, Provider, interpreted
from igrpo_kernels import grpo_loss, selective_log_softmax

LOGPS, LOSS = "selective_log_softmax", "grpo_loss"
LIGER = {"package": "liger_kernel", "install": "liger-kernel==0.8.5", "impl": "liger", "cuda": True, "extra_row": True}


def ours(impl: str, inplace: bool) -> Forward:
    def forward(p: Problem) -> Outputs:
        if p.op == LOGPS:
            found = selective_log_softmax(p.leaf, p.ids, return_entropy=p.wants_entropy, impl=impl)
            return {"logps": found[0], "entropy": found[1]} if p.wants_entropy else {"logps": found}
        ref = p.ref if p.config.beta else None
        out = grpo_loss(
            p.leaf, p.ids, p.advantages, old_per_token_logps=p.old, ref_per_token_logps=ref, config=p.config, impl=impl,
            inplace=inplace,
        )  # fmt: skip
        return {"loss": out.loss}

    return forward


def eager_logps(logits: Tensor, ids: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
    """What a careful user writes, in fp32."""
    log_p = torch.log_softmax(logits.float(), dim=-1)
    logps = log_p.gather(-1, ids[..., None]).squeeze(-1)
    return logps, -(log_p.exp() * log_p).sum(-1) if entropy else None


def eager_outputs(
    leaf: Tensor, ids: Tensor, advantages: Tensor, old: Tensor | None, ref: Tensor | None, op: str, entropy: bool,
    options: dict,
) -> Outputs:  # fmt: skip
    logps, h = eager_logps(leaf, ids, entropy)
    if op == LOGPS:
        return {"logps": logps, "entropy": h} if entropy else {"logps": logps}
    return {"loss": grpo_from_logps(logps, h, advantages, old, ref, **options)}


def eager(compiled: bool, dynamic: bool | None = False) -> Forward:
    # Where lengths stay, code for this very length is the fastest the compiler has.
    function = torch.compile(eager_outputs, dynamic=dynamic) if compiled else eager_outputs

    def forward(p: Problem) -> Outputs:
        c = p.config
        options = {"sequence": p.variant == "gspo", "beta": c.beta, "entropy_coef": c.entropy_coef}
        return function(p.leaf, p.ids, p.advantages, p.old, p.ref, p.op, p.wants_entropy, options)

    return forward


def trl() -> Forward:
    """TRL's Triton kernel, which gives both; on a CPU, where it does not run, the PyTorch code TRL falls back to."""
    if torch.cuda.is_available() or interpreted():
        from trl.kernels import selective_log_softmax_and_entropy as both

        def one(logits: Tensor, ids: Tensor) -> Tensor:
            return both(logits, ids, temperature=1.0)[0]
    else:
        from trl.trainer.utils import selective_log_softmax as one
        from trl.trainer.utils import selective_log_softmax_and_entropy as both

    def forward(p: Problem) -> Outputs:
        logps, h = both(p.leaf, p.ids, temperature=1.0) if p.wants_entropy else (one(p.leaf, p.ids), None)
        if p.op == LOGPS:
            return {"logps": logps, "entropy": h} if p.wants_entropy else {"logps": logps}
        c = p.config
        loss = grpo_from_logps(
            logps, h, p.advantages, p.old, p.ref, sequence=p.variant == "gspo", beta=c.beta, entropy_coef=c.entropy_coef
        )
        return {"loss": loss}

    return forward


def liger_loss(inplace: bool) -> Forward:
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    def forward(p: Problem) -> Outputs:
        c = p.config
        loss, _ = triton_grpo_loss(
            p.leaf, p.old, p.ref if c.beta else None, p.ids, p.advantages, completion_mask=p.mask, temperature=1.0,
            beta=c.beta, eps_low=0.2, eps_high=0.2, inplace=inplace, loss_type="grpo", reduce=True,
            importance_sampling_level=c.importance_sampling_level, use_bias_correction_kl=c.use_bias_correction_kl,
        )  # fmt: skip
        return {"loss": loss}

    return forward


def liger_logps() -> Forward:
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

    return lambda p: {"logps": fused_selective_log_softmax(p.leaf.detach(), p.ids, temperature=1.0, mask=None)}


def quack() -> Forward:
    """Cross-entropy with the row on chip: 4 bytes per logit, and only that loss."""
    from quack.cross_entropy import cross_entropy

    def forward(p: Problem) -> Outputs:
        logits = p.leaf.reshape(-1, p.shape.V)
        return {"loss": cross_entropy(logits, p.ids.reshape(-1), reduction="mean", inplace_backward=True)}

    return forward


OURS = (
    *(
        Provider(impl, impl, partial(ours, impl, False), ops=(LOGPS, LOSS))
        for impl in ("cuda", "triton", "cpu", "torch")
    ),
    *(
        Provider(f"{impl}, in place", impl, partial(ours, impl, True), ops=(LOSS,))
        for impl in ("cuda", "triton", "cpu")
    ),
)
RIVALS = (
    Provider("eager", "eager", partial(eager, False), ops=(LOGPS, LOSS)),
    Provider("torch.compile", "compile", partial(eager, True), ops=(LOGPS, LOSS), compiled=True),
    Provider("trl", "trl", trl, "trl", "trl==1.16.0", ops=(LOGPS, LOSS)),
    Provider("liger", build=partial(liger_loss, False), ops=(LOSS,), lacks=("entropy bonus",), **LIGER),
    Provider("liger, in place", build=partial(liger_loss, True), ops=(LOSS,), lacks=("entropy bonus",), **LIGER),
    Provider("liger", build=liger_logps, ops=(LOGPS,), lacks=("entropy",), forward_only=True, **LIGER),
    Provider("quack, in place", "quack", quack, "quack", "quack-kernels", True, (LOSS,), only=("cross entropy",)),
)
