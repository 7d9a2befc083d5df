"""Losses and options that other codebases had first, each against its formula written a second time, in fp64.

Where the codebase itself can be imported, tests/integrations compares with it.
"""

from dataclasses import dataclass, field, replace

import pytest
import torch

from igrpo_kernels import GRPOLossConfig, grpo_loss, linear_grpo_loss
from igrpo_kernels.batch import TokenBatch
from igrpo_kernels.losses import LOSSES
from igrpo_kernels.objective import coupling
from igrpo_kernels.rejection import criteria
from tests.kernels.oracle import (
    IMPLS,
    assert_close_to_truth,
    boundary_inputs,
    linear_loss_and_grads,
    loss_and_grad,
    random_head,
)
from tests.kernels.oracle import packed as as_packed


def clipped(lp, o, s, A, m):
    w = (lp - o).exp()
    return -torch.minimum(w * A, w.clamp(0.8, 1.2) * A)


def covariance(lp, A, m):
    mean = [(x.detach() * m).sum() / m.sum() for x in (A, lp)]
    return ((A - mean[0]) * (lp.detach() - mean[1])).masked_fill(~m, -torch.inf)


def kl_cov(lp, o, s, A, m):
    top = covariance(lp, A, m).flatten().topk(int(0.1 * m.sum())).indices
    penalty = torch.zeros(m.numel(), dtype=torch.float64).index_fill(0, top, 2.0).view(m.shape)
    return -(lp - o).exp() * A + penalty * (lp - o).abs()


def all_clip_cov(lp, o, s, A, m):
    """With a share that holds every candidate, nothing is drawn by lot."""
    w, cov = (lp - o).exp(), covariance(lp, A, m)
    beyond = ((w > 1.2) & (A > 0)) | ((w < 0.8) & (A < 0))
    return clipped(lp, o, s, A, m).masked_fill(~beyond & (cov > 0.5) & (cov < 2.0), 0.0)


def gspo_token(lp, o, s, A, m):
    log_s = (((lp - o) * m).sum(-1) / m.sum(-1))[:, None].detach()
    w = (log_s + lp - lp.detach()).exp()
    return -torch.minimum(w * A, w.clamp(0.8, 1.2) * A)


def rejecting(rule):
    def loss(lp, o, s, A, m):
        u = (o - s).clamp(-20, 20) * m
        return clipped(lp, o, s, A, m).masked_fill(~rule(u, m.sum(-1, keepdim=True)), 0.0)

    return loss


def k2(u):
    return u * u / 2


def k3(u):
    return u.exp() - 1 - u


@dataclass
class Case:
    """A configuration and its loss per token (B, T) from lp, o, s, A, mask; by default a mean over tokens."""

    config: GRPOLossConfig
    loss: object
    tensors: dict = field(default_factory=dict)
    total: object = None


def of(**keys):
    return GRPOLossConfig(**{"loss_type": "bnpo", **keys})


G = torch.Generator().manual_seed(7)
C, N = (torch.randn(8, 24, generator=G, dtype=torch.float64) for _ in range(2))
CASES = {
    "topr": Case(of(loss_type="topr"), lambda lp, o, s, A, m:
        -torch.where(A > 0, 1.0, (lp - o).exp().clamp(0, 1).detach()) * A * lp),
    "dro": Case(of(loss_type="dro", dro_beta=0.7), lambda lp, o, s, A, m: -A * lp + 0.35 * (lp - o) ** 2),
    "kl_cov": Case(of(loss_type="kl_cov", kl_cov_ratio=0.1, ppo_kl_coef=2.0), kl_cov),
    "clip_cov": Case(of(loss_type="clip_cov", clip_cov_ratio=1.0, clip_cov_lb=0.5, clip_cov_ub=2.0), all_clip_cov),
    "gspo_token": Case(of(importance_sampling_level="sequence_token"), gspo_token),
    "kl_tau": Case(of(kl_tau=0.3), lambda lp, o, s, A, m: clipped(lp, o, s, A, m) + 0.3 * (lp - s) ** 2),
    "kl_tau without a sampler": Case(of(kl_tau=0.3),
        lambda lp, o, s, A, m: clipped(lp, o, s, A, m) + 0.3 * (lp - o) ** 2,
        {"sampling_per_token_logps": None}),
    "seq-mask-tis": Case(of(importance_sampling_mode="seq-mask-tis", importance_sampling_clip_min=0.94,
        importance_sampling_clip_max=1.075), lambda lp, o, s, A, m: clipped(lp, o, s, A, m) * (o - s).exp() * (
        lambda g: (g >= 0.94) & (g <= 1.075))((((o - s) * m).sum(-1) / m.sum(-1)).exp())[:, None]),
    "token_k1": Case(of(rollout_rs="token_k1", rollout_rs_threshold=1.3),
        rejecting(lambda u, n: (u.exp() >= 1 / 1.3) & (u.exp() <= 1.3))),
    "token_k2": Case(of(rollout_rs="token_k2", rollout_rs_threshold=0.03), rejecting(lambda u, n: k2(u) <= 0.03)),
    "token_k3": Case(of(rollout_rs="token_k3", rollout_rs_threshold=0.03), rejecting(lambda u, n: k3(u) <= 0.03)),
    "seq_sum_k1": Case(of(rollout_rs="seq_sum_k1", rollout_rs_threshold="0.25_2.3"), rejecting(
        lambda u, n: ((-u).sum(-1, keepdim=True).exp() >= 0.25) & ((-u).sum(-1, keepdim=True).exp() <= 2.3))),
    "seq_mean_k2": Case(of(rollout_rs="seq_mean_k2", rollout_rs_threshold="0.045"),
        rejecting(lambda u, n: k2(u).sum(-1, keepdim=True) / n <= 0.045)),
    "seq_max_k3": Case(of(rollout_rs="seq_max_k3", rollout_rs_threshold=0.2),
        rejecting(lambda u, n: k3(u).amax(-1, keepdim=True) <= 0.2)),
    "two options": Case(of(rollout_rs="token_k2, seq_mean_k3", rollout_rs_threshold="0.03,0.05",
        importance_sampling_mode="token_truncate", importance_sampling_clip_max=1.2), lambda lp, o, s, A, m:
        rejecting(lambda u, n: (k2(u) <= 0.03) & (k3(u).sum(-1, keepdim=True) / n <= 0.05))(lp, o, s, A, m)
        * (o - s).exp().clamp(max=1.2)),
    "loss_weights": Case(of(beta=0.2, kl_estimator="k2", use_bias_correction_kl=False),
        lambda lp, o, s, A, m: C * (clipped(lp, o, s, A, m) + 0.1 * (lp - o) ** 2), {"loss_weights": C}),
    "nll_weights": Case(of(), clipped, {"nll_weights": N},
        lambda lp, L, m: (L * m).sum() / m.sum() - (N * lp * m).sum()),
    "prompt_mean": Case(of(loss_type="prompt_mean"), clipped, {}, lambda lp, L, m: sum(
        (L * m)[b : b + 2].sum() / m[b : b + 2].sum() for b in range(0, 8, 2)) / 4),
}  # fmt: skip


def the_truth(inputs, case):
    logits = inputs.logits.clone().requires_grad_()
    lp = logits.log_softmax(-1).gather(-1, inputs.completion_ids[..., None]).squeeze(-1)
    o, s, A, m = inputs.old_per_token_logps, inputs.sampling_per_token_logps, inputs.advantages, inputs.completion_mask
    per_token = case.loss(lp, o, s, A[:, None].expand_as(lp), m)
    loss = (per_token * m).sum() / m.sum() if case.total is None else case.total(lp, per_token, m)
    loss.backward()
    return loss, logits.grad, (per_token.detach() == 0) & m


def inputs_of(case):
    inputs = boundary_inputs()
    if "loss_weights" in case.tensors:
        inputs = replace(inputs, ref_per_token_logps=inputs.old_per_token_logps)
    tensors = {"sampling_per_token_logps": inputs.sampling_per_token_logps, **case.tensors}
    if case.config.loss_type == "prompt_mean":
        tensors["prompt_lengths"] = inputs.prompt_lengths()
    return inputs, tensors


def cut(tensors, mask):
    """As packed sequences have them."""
    return {k: x[mask] if x is not None and x.shape == mask.shape else x for k, x in tensors.items()}


def compare(name, impl, fp64=False):
    case = CASES[name]
    inputs, tensors = inputs_of(case)
    loss, grad, dropped = the_truth(inputs, case)
    if case.config.rollout_rs or name == "seq-mask-tis":
        assert 0.05 < dropped.double().sum() / inputs.completion_mask.sum() < 0.95
    mask = inputs.completion_mask
    for some, extra, wanted in (
        (inputs, tensors, grad), (as_packed(inputs), cut(tensors, mask), grad[mask]),
    ):  # fmt: skip
        if not fp64:
            some = some.to(torch.float32)
            extra = {k: x.float() if x is not None and x.is_floating_point() else x for k, x in extra.items()}
        out, actual = loss_and_grad(some, case.config, impl=impl, **extra)
        assert_close_to_truth("loss", out.loss, loss, rtol=1e-10 if fp64 else 2e-5)
        assert_close_to_truth("gradient", actual, wanted, rtol=1e-10 if fp64 else 3e-5)
        if case.config.rollout_rs:
            share = out.metrics["sampling/rollout_rs_masked_fraction"].item()
            assert share == pytest.approx((dropped.sum() / mask.sum()).item())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_are_the_formulas(name, impl):
    compare(name, impl, fp64=impl == "torch")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", CASES)
def test_from_hidden_states(name, impl):
    """Chunked, compacted, and with rows left out where nothing has a gradient; half of the advantages are 0."""
    case = CASES[name]
    inputs, tensors = inputs_of(case)
    inputs = replace(inputs, advantages=inputs.advantages * (torch.arange(8) % 4 > 1))
    hidden, weight, bias = random_head(inputs)
    logits = hidden @ weight.T + bias
    lp = logits.log_softmax(-1).gather(-1, inputs.completion_ids[..., None]).squeeze(-1).detach()
    shift = lp - inputs.logits.log_softmax(-1).gather(-1, inputs.completion_ids[..., None]).squeeze(-1)
    moved = {k: getattr(inputs, k) + shift for k in (
        "old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps")}  # fmt: skip
    inputs = replace(inputs, logits=logits.detach(), **moved)
    if tensors["sampling_per_token_logps"] is not None:
        tensors["sampling_per_token_logps"] = inputs.sampling_per_token_logps
    loss, grad, _ = the_truth(inputs, case)
    for metrics in (True, False):
        out, grads = linear_loss_and_grads(
            hidden, weight, bias, inputs, case.config, impl=impl, compute_metrics=metrics, **tensors
        )
        assert_close_to_truth("loss", out.loss, loss, rtol=1e-6)
        assert_close_to_truth("dW", grads[1], torch.einsum("btv,bth->vh", grad, hidden.detach()), rtol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_gspo_token_is_gspo_where_a_sequence_has_one_advantage(impl):
    inputs = boundary_inputs(level="sequence")
    token, sequence = (
        loss_and_grad(inputs, GRPOLossConfig("grpo", level, beta=0.0), impl=impl)
        for level in ("sequence_token", "sequence")
    )
    torch.testing.assert_close((token[0].loss, token[1]), (sequence[0].loss, sequence[1]))


def test_clip_cov_draws_as_many_as_it_says_the_same_ones_each_time():
    inputs = boundary_inputs()
    config = GRPOLossConfig("clip_cov", clip_cov_ratio=0.05, clip_cov_lb=0.2)
    batch = {"sampling_per_token_logps": None}
    first, again = (loss_and_grad(inputs, config, **batch) for _ in range(2))
    torch.testing.assert_close(first[1], again[1], rtol=0, atol=0)
    plain = loss_and_grad(inputs, GRPOLossConfig("dapo"), **batch)[1]
    lost = (plain.abs().sum(-1) > 0) & (first[1].abs().sum(-1) == 0)
    n = int(inputs.completion_mask.sum())
    assert int(lost.sum()) == int(0.05 * n)
    assert first[0].metrics["clip_ratio/region_mean"].item() == pytest.approx(int(0.05 * n) / n)
    other = loss_and_grad(replace(inputs, completion_ids=(inputs.completion_ids + 1) % 37), config, **batch)[1]
    assert not torch.equal(other.abs().sum(-1) == 0, first[1].abs().sum(-1) == 0)


@pytest.mark.parametrize("impl", IMPLS)
def test_on_the_bounds_nothing_is_lost(impl):
    """Bounds belong to what they enclose: u = 0 at a k1 of "1_1", a geometric mean of exactly 1, w = 1 of topr."""
    logits = torch.zeros(2, 2, 4, requires_grad=True)
    ids, old = torch.zeros(2, 2, dtype=torch.long), torch.full((2, 2), -2.0 * torch.log(torch.tensor(2.0)).item())
    for config in (
        GRPOLossConfig(rollout_rs="token_k1,seq_mean_k1,seq_sum_k1", rollout_rs_threshold="1_1"),
        GRPOLossConfig(importance_sampling_mode="seq-mask-tis", importance_sampling_clip_min=1.0,
                       importance_sampling_clip_max=1.0 + 1e-9),
        GRPOLossConfig(loss_type="topr"),
    ):  # fmt: skip
        out = grpo_loss(
            logits, ids, torch.tensor([1.0, -1.0]), old_per_token_logps=old, sampling_per_token_logps=old,
            config=config, impl=impl,
        )  # fmt: skip
        (grad,) = torch.autograd.grad(out.loss, logits)
        assert (grad[0, :, 0] < 0).all() and (grad[1, :, 0] > 0).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", CASES)
def test_extremes_are_silent_where_they_are_dropped_and_show_where_they_count(name, impl):
    """NaN of the sampler is no evidence; what is masked may hold anything; a NaN of the old policy shows."""
    case = CASES[name]
    inputs, tensors = inputs_of(case)
    inputs = inputs.to(torch.float32)
    tensors = {k: x.float() if x is not None and x.is_floating_point() else x for k, x in tensors.items()}
    mask = inputs.completion_mask
    clean = loss_and_grad(inputs, case.config, impl=impl, **tensors)
    dirty = {k: x.masked_fill(~mask, torch.nan) if x is not None and x.shape == mask.shape else x
             for k, x in tensors.items()}  # fmt: skip
    out, grad = loss_and_grad(inputs, case.config, impl=impl, **dirty)
    torch.testing.assert_close((out.loss, grad), (clean[0].loss, clean[1]), rtol=0, atol=0)
    if tensors["sampling_per_token_logps"] is not None:
        unscored = tensors["sampling_per_token_logps"].clone()
        unscored[0, :3] = torch.nan
        out, grad = loss_and_grad(inputs, case.config, impl=impl, **{**tensors, "sampling_per_token_logps": unscored})
        assert out.loss.isfinite() and grad.isfinite().all()
    if case.config.rollout_rs is None:  # else it may be rejected
        old = inputs.old_per_token_logps.clone()
        old[1, 0] = torch.nan
        assert loss_and_grad(inputs, case.config, impl=impl, **{**tensors, "old_per_token_logps": old})[0].loss.isnan()


@pytest.mark.parametrize("impl", IMPLS)
def test_weights_of_zero_silence_a_token_of_probability_zero(impl):
    logits = torch.zeros(1, 3, 4)
    logits[0, 1, 0] = -torch.inf
    ids, weights = torch.zeros(1, 3, dtype=torch.long), torch.tensor([[1.0, 0.0, 1.0]])
    for config in (GRPOLossConfig("dro", dro_beta=0.5), GRPOLossConfig("bnpo", kl_tau=0.1), GRPOLossConfig("topr")):
        leaf = logits.clone().requires_grad_()
        out = grpo_loss(
            leaf, ids, -torch.ones(1), old_per_token_logps=torch.full((1, 3), -2.0), loss_weights=weights,
            nll_weights=weights, config=config, impl=impl,
        )  # fmt: skip
        out.loss.backward()
        assert out.loss.isfinite() and leaf.grad.isfinite().all() and (leaf.grad[0, 1] == 0).all()
    old = torch.tensor([[-2.0, -200.0, -2.0]])  # a ratio of exp(198), which nothing bounds
    for config in (GRPOLossConfig("dppo_tv"), GRPOLossConfig("dppo_kl"), GRPOLossConfig(rollout_rs="token_k2",
                   rollout_rs_threshold=1.0, loss_type="dppo_tv")):  # fmt: skip
        leaf = torch.zeros(1, 3, 4).requires_grad_()
        weighted = {} if config.rollout_rs else {"loss_weights": weights}
        out = grpo_loss(
            leaf, ids, -torch.ones(1), old_per_token_logps=old, sampling_per_token_logps=torch.full((1, 3), -2.0),
            config=config, impl=impl, **weighted,
        )  # fmt: skip
        out.loss.backward()
        assert out.loss.isfinite() and leaf.grad.isfinite().all() and (leaf.grad[0, 1] == 0).all()


def test_without_advantages_only_what_needs_none_remains():
    inputs = replace(boundary_inputs(), advantages=torch.zeros(8, dtype=torch.float64))
    for config, extra, some in (
        (GRPOLossConfig("dapo"), {}, False), (GRPOLossConfig("dapo", kl_tau=0.1), {}, True),
        (GRPOLossConfig("dro", dro_beta=0.1), {}, True), (GRPOLossConfig("kl_cov", kl_cov_ratio=0.5), {}, True),
        (GRPOLossConfig("dapo"), {"nll_weights": torch.ones(8, dtype=torch.float64)}, True),
    ):  # fmt: skip
        _, grads = linear_loss_and_grads(*random_head(inputs), inputs, config, compute_metrics=False, **extra)
        assert bool((grads[1] != 0).any()) == some, config


def test_what_must_be_measured_first():
    inputs = boundary_inputs()
    sampled = TokenBatch.build(
        inputs.completion_ids, inputs.advantages, dtype=torch.float64,
        sampling_per_token_logps=inputs.sampling_per_token_logps,
    )  # fmt: skip
    given = replace(sampled, old_per_token_logps=inputs.old_per_token_logps.flatten())
    for keys, without_old, with_old in (
        ({"importance_sampling_mode": "seq-mask-tis"}, "sequence", "token"),
        ({"rollout_rs": "seq_max_k2", "rollout_rs_threshold": 1.0}, "sequence", "token"),
        ({"rollout_rs": "token_k2", "rollout_rs_threshold": 1.0}, "token", "token"),
        ({"loss_type": "clip_cov"}, "batch", "batch"),
        ({"importance_sampling_level": "sequence_token"}, "sequence", "sequence"),
    ):
        config = GRPOLossConfig(**keys)
        assert (coupling(sampled, config), coupling(given, config)) == (without_old, with_old)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["token_k1", "seq_sum_k1", "seq-mask-tis", "two options", "kl_tau"])
def test_without_old_log_probs_the_policy_s_own_stand_there(name, impl):
    case = CASES[name]
    inputs, tensors = inputs_of(case)
    logps = inputs.logits.log_softmax(-1).gather(-1, inputs.completion_ids[..., None]).squeeze(-1)
    expected, grad = loss_and_grad(replace(inputs, old_per_token_logps=logps), case.config, **tensors)
    given = {**tensors, "old_per_token_logps": None}
    given = {k: x.float() if x is not None else None for k, x in given.items()}
    out, actual = loss_and_grad(inputs.to(torch.float32), case.config, impl=impl, **given)
    assert_close_to_truth("loss", out.loss, expected.loss, rtol=2e-5)
    assert_close_to_truth("gradient", actual, grad, rtol=3e-5)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"loss_type": "dro"}, "loss_type='dro' needs dro_beta"),
        ({"dro_beta": 0.1}, "dro_beta=0.1 has no effect with loss_type='grpo'; .* one of dro"),
        ({"clip_cov_ratio": 0.1}, "clip_cov_ratio=0.1 has no effect .* one of clip_cov"),
        ({"loss_type": "clip_cov", "ppo_kl_coef": 2.0}, "ppo_kl_coef=2.0 has no effect .* one of kl_cov"),
        ({"loss_type": "clip_cov", "clip_cov_lb": 5.0}, "clip_cov_lb=5.0 must be less than clip_cov_ub=5.0"),
        ({"loss_type": "kl_cov", "kl_cov_ratio": 0.0}, "kl_cov_ratio=0.0 must be above 0"),
        ({"loss_type": "cispo", "importance_sampling_level": "sequence_token"}, "ratio is a constant; use .*'seq"),
        ({"loss_type": "dro", "dro_beta": 1.0, "importance_sampling_level": "sequence"}, "own weights; use .*'token"),
        ({"loss_type": "vespo", "importance_sampling_mode": "seq-mask-tis"}, "combined with loss_type='vespo'"),
        ({"kl_tau": -0.1}, "kl_tau=-0.1 must be >= 0"),
        ({"rollout_rs": "token_k2"}, "needs rollout_rs_threshold"),
        ({"rollout_rs_threshold": 2.0}, "rollout_rs_threshold=2.0 has no effect without rollout_rs"),
        ({"rollout_rs": "seq_max_k1", "rollout_rs_threshold": 2.0}, "blind to one side; write seq_max_k2"),
        ({"rollout_rs": "seq_k1", "rollout_rs_threshold": 2.0}, "'seq_k1' is unknown; choose some of token_k1"),
        ({"rollout_rs": "", "rollout_rs_threshold": 2.0}, "rollout_rs='' is unknown"),
        ({"rollout_rs": 1, "rollout_rs_threshold": 2.0}, "rollout_rs=1 must be text"),
        ({"rollout_rs": "token_k1", "rollout_rs_threshold": "2_0.5"}, "'2_0.5' does not fit .*; write two"),
        ({"rollout_rs": "token_k1", "rollout_rs_threshold": 0.5}, "does not fit rollout_rs='token_k1'"),
        ({"rollout_rs": "token_k2", "rollout_rs_threshold": "0.5_2"}, "write one number above 0"),
        ({"rollout_rs": "token_k2", "rollout_rs_threshold": True}, "rollout_rs_threshold=True text or a number"),
        ({"rollout_rs": "token_k2", "rollout_rs_threshold": "nan"}, "'nan' does not fit"),
        ({"rollout_rs": "token_k2,seq_sum_k2", "rollout_rs_threshold": "1,2,3"}, "has 3 thresholds .* 2 options"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense(keys, words):
    with pytest.raises(ValueError, match=words):
        GRPOLossConfig(**keys)


def test_tensors_that_are_missing_or_do_not_fit():
    logits, ids, advantages = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.long), torch.zeros(2)
    for keys, tensors, words in (
        ({"rollout_rs": "token_k2", "rollout_rs_threshold": 1.0}, {}, "rollout_rs='token_k2' needs sampling_per_token"),
        ({"kl_tau": 0.1}, {}, "kl_tau=0.1 needs sampling_per_token_logps or old_per_token_logps"),
        ({"loss_type": "prompt_mean"}, {}, r"needs prompt_lengths \(S,\)"),
        (
            {"loss_type": "prompt_mean"},
            {"prompt_lengths": torch.ones(3)},
            r"one number per sequence \(2,\), got \(3,\)",
        ),
        ({}, {"loss_weights": torch.ones(3)}, r"loss_weights has shape \(3,\)"),
        ({}, {"nll_weights": torch.ones(2, 3).long()}, "nll_weights must be a floating-point tensor"),
    ):
        for function, first in ((grpo_loss, (logits,)), (linear_grpo_loss, (logits, torch.zeros(7, 5)))):
            with pytest.raises(ValueError, match=words):
                function(*first, ids, advantages, config=GRPOLossConfig(**keys), **tensors)


def test_thresholds_are_verl_s():
    assert criteria("token_k1", 2.0) == criteria("token_k1", "0.5_2.0") == criteria("token_k1,token_k1", "2")
    low, high = criteria("seq_sum_k1", "0.5_2.0")[0][2:]
    assert (low, high) == (pytest.approx(-0.6931471805599453), pytest.approx(0.6931471805599453))
    assert [c.high for c in criteria("token_k2,seq_max_k3", 3)] == [3.0, 3.0]
    assert {loss.term.couples for loss in LOSSES.values()} == {"token", "sequence", "batch"}
