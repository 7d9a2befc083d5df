"""Adapters for verl, OpenRLHF and prime-rl.

None of the three installs on a machine without a GPU, so each adapter is checked against its library's documented
formula written out in PyTorch here; where the library can be imported, against the library itself, too.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from igrpo_kernels import GRPOLossConfig, SamplingMask
from igrpo_kernels.integrations import openrlhf, prime_rl, verl
from igrpo_kernels.integrations.per_token import policy_settings

B, T, H, V = 3, 7, 8, 30


@pytest.fixture
def x() -> SimpleNamespace:
    """Ratios on both sides of every bound, both signs of the advantage, ragged lengths."""
    g = torch.Generator().manual_seed(2)
    logps = -torch.rand(B, T, generator=g) * 3
    return SimpleNamespace(
        logps=logps.requires_grad_(),
        old=logps.detach() + 0.6 * torch.randn(B, T, generator=g),
        sampler=logps.detach() + 0.3 * torch.randn(B, T, generator=g),
        advantages=torch.randn(B, 1, generator=g).expand(B, T).contiguous(),
        mask=(torch.arange(T) < torch.tensor([[7], [4], [1]])).float(),
        weights=torch.rand(B, T, generator=g) + 0.5,
    )


def same(ours: tuple, theirs: tuple, leaf: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs)
    mine, other = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for loss in (ours, theirs))
    assert float(other.abs().max()) > 1e-3
    torch.testing.assert_close(mine, other)


def dual_clip_ppo(x: SimpleNamespace, low: float, high: float, c: float) -> torch.Tensor:
    ratio = (x.logps - x.old).exp()
    worse = torch.maximum(-x.advantages * ratio, -x.advantages * ratio.clamp(1 - low, 1 + high))
    return torch.where(x.advantages < 0, torch.minimum(worse, -x.advantages * c), worse)


# --- verl


def token_mean(loss_mat: torch.Tensor, loss_mask: torch.Tensor, loss_agg_mode: str, **_: Any) -> torch.Tensor:
    assert loss_agg_mode == "token-mean"
    return (loss_mat * loss_mask).sum() / loss_mask.sum()


def test_verl_policy_loss_is_dual_clip_ppo(x):
    config = GRPOLossConfig(epsilon=0.2, epsilon_high=0.3, dual_clip=1.8)
    loss, metrics = verl.policy_loss(config, token_mean)(
        x.old, x.logps, x.advantages, x.mask, config=None, rollout_is_weights=x.weights
    )
    per_token = dual_clip_ppo(x, 0.2, 0.3, 1.8)
    same(loss, (per_token * x.weights * x.mask).sum() / x.mask.sum(), x.logps)
    ratio = (x.logps - x.old).exp()
    outside = ((ratio < 0.8) & (x.advantages < 0)) | ((ratio > 1.3) & (x.advantages > 0))
    dual = (ratio > 1.8) & (x.advantages < 0)
    share = lambda t: float((t * x.mask).sum() / x.mask.sum())  # noqa: E731
    assert metrics == pytest.approx({
        "actor/pg_clipfrac": share(outside), "actor/pg_clipfrac_lower": share(dual),
        "actor/ppo_kl": share(x.old - x.logps),
    }, rel=1e-5)  # fmt: skip
    assert min(metrics["actor/pg_clipfrac"], metrics["actor/pg_clipfrac_lower"]) > 0


GSPO = GRPOLossConfig(epsilon=0.01, epsilon_high=0.02, importance_sampling_level="sequence")
VERL = {
    "vanilla": (GRPOLossConfig(epsilon=0.2, epsilon_high=0.3, dual_clip=3.0), "token-mean"),
    "gspo": (GSPO, "seq-mean-token-mean"),
    "sapo": (GRPOLossConfig(loss_type="sapo"), "seq-mean-token-mean"),
    **{name: (GRPOLossConfig(name, epsilon=0.02, epsilon_high=0.03, delta=3.0), "token-mean")
        for name in ("dppo_tv", "dppo_kl")},
    "cispo": (GRPOLossConfig("cispo_two_sided"), "token-mean"),
    "geo_mean": (GRPOLossConfig("gmpo"), "seq-mean-token-mean"),
    "dro": (GRPOLossConfig("dro", dro_beta=0.3), "token-mean"),
    "kl_cov": (GRPOLossConfig("kl_cov", kl_cov_ratio=0.2, ppo_kl_coef=0.7), "token-mean"),
    "clip_cov": (GRPOLossConfig("clip_cov", clip_cov_ratio=1.0, clip_cov_lb=0.1), "token-mean"),
}  # fmt: skip


@pytest.mark.needs_package("verl")
@pytest.mark.parametrize("name", VERL)
def test_verl_policy_losses_are_verls_own(x, name):
    core = pytest.importorskip("verl.trainer.ppo.core_algos", exc_type=ImportError)
    from verl.workers.config import FSDPActorConfig, PolicyLossConfig

    config, mode = VERL[name]
    keys = ("dro_beta", "kl_cov_ratio", "ppo_kl_coef", "clip_cov_ratio", "clip_cov_lb", "clip_cov_ub")
    actor = FSDPActorConfig(
        strategy="fsdp", rollout_n=4, use_dynamic_bsz=True, clip_ratio_low=config.epsilon,
        clip_ratio_high=config.epsilon if config.epsilon_high is None else config.epsilon_high, clip_ratio_c=3.0,
        policy_loss=PolicyLossConfig(loss_mode=name, **{key: getattr(config, key) for key in keys}),
    )  # fmt: skip
    args = (x.old, x.logps, x.advantages, x.mask)
    theirs, _ = core.get_policy_loss_fn(name)(*args, loss_agg_mode=mode, config=actor)
    core.register_policy_loss(f"igrpo_{name}")(verl.policy_loss(config))
    ours, _ = core.get_policy_loss_fn(f"igrpo_{name}")(*args, loss_agg_mode=mode, config=actor)
    same(ours, theirs, x.logps)


@pytest.mark.parametrize("per_token", ["advantages", "rollout weights"])
def test_verl_gspo_is_gspo_token(x, per_token):
    """w = sg(s)·exp(l - sg(l)): each token's gradient has that token's own advantage and weight (30 to 60 % off)."""
    advantages = torch.randn(B, T, generator=torch.Generator().manual_seed(5)) if per_token == "advantages" else None
    advantages = x.advantages if advantages is None else advantages
    weights = x.weights if per_token == "rollout weights" else None
    config = GRPOLossConfig(epsilon=0.3, epsilon_high=0.3, importance_sampling_level="sequence")
    loss, _ = verl.policy_loss(config, token_mean)(
        x.old, x.logps, advantages, x.mask, rollout_is_weights=weights
    )  # fmt: skip
    log_s = (((x.logps - x.old) * x.mask).sum(-1) / x.mask.sum(-1)).detach()[:, None]
    w = (log_s + x.logps - x.logps.detach()).exp()
    per_row = torch.maximum(-advantages * w, -advantages * w.clamp(0.7, 1.3)) * (1.0 if weights is None else weights)
    same(loss, (per_row * x.mask).sum() / x.mask.sum(), x.logps)


def test_verl_counts_what_cispo_clips_whatever_the_advantage(x):
    config = GRPOLossConfig(loss_type="cispo", epsilon_high=1.1)
    _, metrics = verl.policy_loss(config, token_mean)(x.old, x.logps, x.advantages, x.mask)
    clips = ((x.logps - x.old).exp() > 1.1) & x.mask.bool()
    assert clips[x.advantages < 0].any() and clips[x.advantages > 0].any()
    assert metrics["actor/pg_clipfrac"] == pytest.approx(float(clips.sum() / x.mask.sum()))


def test_log_ratios_beyond_twenty_are_held_there(x):
    """As in verl and OpenRLHF: in the loss, whose gradient is then 0, and in verl's ppo_kl."""
    old = x.old.clone()
    old[0, 0], old[1, 1] = old[0, 0] - 50.0, old[1, 1] + 50.0
    held = (x.logps - old).clamp(-20.0, 20.0)
    advantages = -torch.ones_like(x.logps)
    wanted = torch.maximum(-advantages * held.exp(), -advantages * held.exp().clamp(0.8, 1.2))
    wanted = (wanted * x.mask).sum() / x.mask.sum()
    loss, metrics = verl.policy_loss(GRPOLossConfig(), token_mean)(old, x.logps, advantages, x.mask)
    same(loss, wanted, x.logps)
    assert metrics["actor/ppo_kl"] == pytest.approx(float(-(held * x.mask).sum() / x.mask.sum()), rel=1e-5)
    same(openrlhf.PolicyLoss()(x.logps, old, advantages, x.mask)[0], wanted, x.logps)


ADAPTED = {
    **{f"verl {name}": lambda y, config=config: verl.policy_loss(config, token_sum)(
        y.old, y.logps, y.advantages, y.mask, rollout_is_weights=y.weights) for name, config in {
            "vanilla": GRPOLossConfig(dual_clip=1.8), "sapo": GRPOLossConfig(loss_type="sapo"),
            "gspo": GRPOLossConfig(importance_sampling_level="sequence"), "cispo": GRPOLossConfig(loss_type="cispo"),
        }.items()},
    **{f"openrlhf {level} {mode} {kind} {mean}": lambda y, keys={
        "is_correction_level": level, "is_correction_mode": mode, "policy_loss_type": kind, "token_level_loss": mean,
    }: openrlhf.PolicyLoss(**keys)(y.logps, y.old, y.advantages, y.mask, y.sampler)
        for level, mode in (("off", "mask"), ("token", "mask"), ("token", "clip"), ("seq", "mask"))
        for kind in ("ppo", "gspo") for mean in (True, False)},
    "prime-rl": lambda y: prime_rl.sequence_loss(
        y.logps[1], y.old[1], y.advantages[1], y.mask[1], GRPOLossConfig(), y.weights[1]),
}  # fmt: skip


def token_sum(loss_mat: torch.Tensor, loss_mask: torch.Tensor, **_: Any) -> torch.Tensor:
    return (loss_mat * loss_mask).sum()


@pytest.mark.parametrize("case", ADAPTED)
def test_what_stands_under_the_mask_changes_nothing(x, case):
    """NaN there reached metrics, correction and loss; a batch masked whole gave NaN."""
    clean = ADAPTED[case](x)
    poisoned = {k: torch.where(x.mask != 0, v.detach(), torch.nan) for k, v in vars(x).items() if k != "mask"}
    leaf = poisoned["logps"].requires_grad_()
    dirty = ADAPTED[case](SimpleNamespace(**poisoned, mask=x.mask))
    assert numbers(clean) == numbers(dirty)
    assert torch.equal(torch.autograd.grad(clean[0], x.logps)[0], torch.autograd.grad(dirty[0], leaf)[0])
    nothing = ADAPTED[case](SimpleNamespace(**{**vars(x), "mask": torch.zeros_like(x.mask)}))
    assert float(nothing[0]) == 0.0 and all(abs(v) < float("inf") for v in numbers(nothing))
    assert not torch.autograd.grad(nothing[0], x.logps)[0].any()


def numbers(result: tuple) -> list[float]:
    """Loss and metrics, in order."""
    flat = [result[0], *(result[1].values() if isinstance(result[1], dict) else result[1:])]
    return [float(v) for v in flat if v is not None]


def test_verl_log_probabilities_and_entropies():
    """On one process; on tensor-parallel ranks: `verl_case` of tests/kernels/vocab_parallel_ranks.py."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(B, T, H, generator=g).requires_grad_(), torch.randn(V, H, generator=g).requires_grad_()
    labels = torch.randint(0, V, (B, T), generator=g)
    logps, entropy = verl.linear_cross_entropy(hidden, weight, labels, 0.7, "none", None)
    exact = ((hidden @ weight.t()) / 0.7).log_softmax(-1).view(-1, V)
    wanted = exact.gather(-1, labels.view(-1, 1))[:, 0], -(exact.exp() * exact).sum(-1)
    torch.testing.assert_close((logps, entropy), wanted)
    mix = torch.randn(2, B * T, generator=g)
    mine, other = (
        torch.autograd.grad((mix[0] * a + mix[1] * b).sum(), (hidden, weight), retain_graph=True)
        for a, b in ((logps, entropy), wanted)
    )
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="reduction='mean' is not covered"):
        verl.linear_cross_entropy(hidden, weight, labels, 1.0, "mean", None)


# --- OpenRLHF


def openrlhf_loss(x: SimpleNamespace, keys: dict[str, Any], call: dict[str, Any]) -> tuple:
    """OpenRLHF 0.11's PolicyLoss, written out."""
    k = {"dual_clip": None, "token_level_loss": True, "policy_loss_type": "ppo", "is_correction_level": "off",
         "is_correction_mode": "mask", "is_correction_threshold": (0.5, 5.0), **keys}  # fmt: skip
    mask, gspo, corrects = x.mask, k["policy_loss_type"] == "gspo", k["is_correction_level"] != "off"
    mean = lambda t: (t * mask).sum() / mask.sum()  # noqa: E731
    log_ratio = x.logps - (x.sampler if gspo and corrects else x.old)
    if gspo:
        log_ratio = ((log_ratio * mask).sum(-1) / mask.sum(-1))[:, None].expand(B, T)
    ratio = log_ratio.exp()
    low_high = 1 - k["clip_eps_low"], 1 + k["clip_eps_high"]
    one, two = ratio * x.advantages, ratio.clamp(*low_high) * x.advantages
    kept = torch.minimum(one, two)
    if k["dual_clip"] is not None:
        kept = torch.where(x.advantages < 0, torch.maximum(kept, k["dual_clip"] * x.advantages), kept)
    loss, kl, filtered = -kept, None, None
    if corrects and not gspo:
        low, high = k["is_correction_threshold"]
        token = (x.old - x.sampler).exp()
        statistic = token
        if k.get("is_correction_gating", "ratio") != "ratio":
            p, q = (t.exp().clamp(1e-6, 1 - 1e-6) for t in (x.sampler, x.old))
            binary_kl = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
            statistic = binary_kl if k["is_correction_gating"] == "binary_kl" else (p - q).abs()
            if k["is_correction_level"] == "seq":
                statistic = ((statistic * mask).sum(-1) / mask.sum(-1))[:, None]
        elif k["is_correction_level"] == "seq":
            statistic = (((x.old - x.sampler) * mask).sum(-1) / mask.sum(-1)).exp()[:, None]
        outside = (statistic < low) | (statistic > high)
        loss = loss * (statistic.clamp(low, high) if k["is_correction_mode"] == "clip" else token * ~outside)
        filtered = outside.float().mean() if k["is_correction_level"] == "seq" else mean(outside.float())
        kl = mean(x.sampler - x.old)
    if k["token_level_loss"] and not gspo:
        total = mean(loss) if not call else (loss * mask).sum() / call["batch_num_tokens"] * call["dp_size"]
    else:
        per_sequence = (loss * mask).sum(-1) / mask.sum(-1)
        total = per_sequence.mean() if not call else per_sequence.sum() / call["global_batch_size"] * call["dp_size"]
    return total, mean((two < one).float()), mean(x.old - x.logps.detach()), kl, filtered


OPENRLHF: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ppo": ({}, {}),
    "dual clip, whole batch's tokens": ({"dual_clip": 1.8}, {"batch_num_tokens": 50.0, "dp_size": 2}),
    "per sample": ({"token_level_loss": False}, {}),
    "per sample, whole batch": ({"token_level_loss": False}, {"global_batch_size": 12.0, "dp_size": 2}),
    "gspo": ({"policy_loss_type": "gspo", "clip_eps_high": 0.1}, {}),
    "gspo from the sampler": ({"policy_loss_type": "gspo", "is_correction_level": "token"}, {}),
    "icepop": ({"is_correction_level": "token", "is_correction_threshold": (0.8, 1.25)}, {}),
    "tis": ({"is_correction_level": "token", "is_correction_mode": "clip", "is_correction_threshold": (0.8, 1.2)}, {}),
    "seq-mask-tis": ({"is_correction_level": "seq", "is_correction_threshold": (0.5, 1.2)}, {}),
    **{
        f"{level} {gating}": (
            {"is_correction_level": level, "is_correction_gating": gating, "is_correction_threshold": (0.0, high)},
            {},
        )
        for level, gating, high in (
            ("token", "tv", 0.05),
            ("seq", "tv", 0.08),
            ("token", "binary_kl", 0.01),
            ("seq", "binary_kl", 0.02),
        )
    },
}


@pytest.mark.parametrize("case", OPENRLHF)
def test_openrlhf_policy_loss(x, case):
    keys, call = OPENRLHF[case]
    keys = {"clip_eps_low": 0.2, "clip_eps_high": 0.3, **keys}
    args = (x.logps, x.old, x.advantages, x.mask, x.sampler)
    ours = openrlhf.PolicyLoss(**keys)(*args, **call)
    theirs = [openrlhf_loss(x, keys, call)]
    try:
        from openrlhf.models.loss import PolicyLoss

        theirs.append(PolicyLoss(**keys)(*args, **call))
    except ImportError:
        pass
    for wanted in theirs:
        same(ours[0], wanted[0], x.logps)
        for mine, other in zip(ours[1:], wanted[1:], strict=True):
            assert (mine is None) == (other is None)
            if mine is not None:
                torch.testing.assert_close(mine, other)
    assert float(ours[1]) > 0


def test_openrlhfs_filtered_share_of_single_tokens(x):
    loss = openrlhf.PolicyLoss(is_correction_level="token", is_correction_threshold=(0.9, 1.1))
    column = [t[:, :1] for t in (x.logps, x.old, x.advantages)]
    *_, share = loss(*column, torch.tensor([[1.0], [1.0], [0.0]]), column[1] + torch.tensor([[1.0], [0.0], [1.0]]))
    assert share == 0.5


def test_openrlhf_log_probabilities_leave_the_logits_alone():
    logits = torch.randn(B, T, V, generator=torch.Generator().manual_seed(0))
    before, labels = logits.clone(), torch.randint(0, V, (B, T))
    logps = openrlhf.log_probs_from_logits(logits, labels, temperature=0.7)
    assert torch.equal(logits, before)
    torch.testing.assert_close(logps, (logits / 0.7).log_softmax(-1).gather(-1, labels[..., None])[..., 0])


def test_log_probabilities_over_what_a_sampler_kept():
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(B, T, H, generator=g), torch.randn(V, H, generator=g)
    labels = torch.randint(0, V, (B, T), generator=g)
    mask = SamplingMask.from_lists([[a, (a + 1) % V, (a + 7) % V] for a in labels.flatten().tolist()])
    z = (hidden @ weight.t() / 0.7).masked_fill(~mask.table(V).view(B, T, V), -torch.inf).log_softmax(-1)
    wanted = z.gather(-1, labels[..., None])[..., 0]
    logps, _ = verl.linear_cross_entropy(hidden, weight, labels, 0.7, sampling_mask=mask)
    torch.testing.assert_close(logps.view(B, T), wanted)
    whole = openrlhf.log_probs_from_logits(hidden @ weight.t(), labels, 0.7, sampling_mask=mask)
    torch.testing.assert_close(whole, wanted)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"policy_loss_type": "dpo"}, "choose 'ppo' or 'gspo'"),
        ({"is_correction_gating": "kl"}, "take ratio, binary_kl or tv"),
        ({"is_correction_gating": "tv", "is_correction_level": "seq"}, "write is_correction_threshold=\\(0, 5.0\\)"),
        ({"is_correction_gating": "tv", "is_correction_level": "token", "is_correction_mode": "clip"}, "gating=ratio"),
        ({"is_correction_level": "seq", "is_correction_mode": "clip"}, "requires is_correction_level=token"),
        ({"dual_clip": 0.5}, "dual_clip=0.5 must be > 1"),
    ],
)
def test_openrlhf_settings_that_are_refused(keys, words):
    with pytest.raises(ValueError, match=words):
        openrlhf.PolicyLoss(**keys)


# --- prime-rl


def test_prime_rl_gets_the_sum_over_a_sequences_tokens(x):
    for i in range(B):
        mask, ratio = x.mask[i].bool(), (x.logps[i] - x.old[i]).exp()
        config = GRPOLossConfig(loss_type="cispo", epsilon_high=1.5)
        loss, metrics = prime_rl.sequence_loss(x.logps[i], x.old[i], x.advantages[i], mask, config)
        same(loss, -(ratio.detach().clamp(max=1.5) * x.advantages[i] * x.logps[i])[mask].sum(), x.logps)
        doubled, _ = prime_rl.sequence_loss(x.logps[i], x.old[i], x.advantages[i], mask, config, torch.full((T,), 2.0))
        torch.testing.assert_close(doubled, 2.0 * loss)
        torch.testing.assert_close(metrics["importance_ratio"], ratio.detach()[mask].mean())
        torch.testing.assert_close(metrics["log_ratio"], ratio.detach().log()[mask].mean())


def test_prime_rls_loss_weights_count(x, monkeypatch):
    """They were named in the docstring and never read."""
    outputs = SimpleNamespace(LossOutputs=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "prime_rl.trainer.rl.loss", outputs)
    for package in ("prime_rl", "prime_rl.trainer", "prime_rl.trainer.rl"):
        monkeypatch.setitem(sys.modules, package, SimpleNamespace())
    rows = {"trainer_logprobs": x.logps[0], "inference_logprobs": x.old[0], "advantages": x.advantages[0]}
    inputs = SimpleNamespace(**rows, loss_mask=x.mask[0].bool())
    whole = prime_rl.policy_loss(inputs).loss
    half = prime_rl.policy_loss(SimpleNamespace(**vars(inputs), loss_weights=torch.full((T,), 0.5))).loss
    torch.testing.assert_close(half, 0.5 * whole)


@pytest.mark.parametrize(
    "setting",
    [
        {"beta": 0.5},
        {"entropy_coef": 0.1},
        {"importance_sampling_mode": "token_mask"},
        {"temperature": 0.5},
        {"kl_tau": 0.1},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_keys_without_effect_on_a_policy_term_are_refused(x, setting):
    """They were taken and did nothing."""
    (name,) = setting
    with pytest.raises(ValueError, match=f"{name}: no effect"):
        verl.policy_loss(GRPOLossConfig(**setting))
    with pytest.raises(ValueError, match=f"{name}: no effect"):
        policy_settings(GRPOLossConfig(**setting))


@pytest.mark.needs_package("prime_rl")
def test_prime_rl_calls_it_with_its_own_types(x):
    library = pytest.importorskip("prime_rl.trainer.rl.loss", exc_type=ImportError)
    inputs = library.LossInputs(x.logps[0], x.old[0], None, x.advantages[0], x.mask[0].bool())
    assert isinstance(prime_rl.policy_loss(inputs, loss_type="sapo"), library.LossOutputs)
