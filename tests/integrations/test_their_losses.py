"""What verl and prime-rl compute themselves, through their adapters: verl's newer losses and prime-rl's default."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from igrpo.config.train_config import TrainConfig
from igrpo_kernels import GRPOLossConfig
from igrpo_kernels.batch import TokenBatch
from igrpo_kernels.integrations import prime_rl, verl
from igrpo_kernels.losses import ROLLOUT_RS
from igrpo_kernels.rejection import accepts
from tests.integrations.test_other_codebases import B, H, T, V, dual_clip_ppo, same, token_mean, token_sum
from tests.integrations.test_other_codebases import x as x


def dro(y: SimpleNamespace) -> torch.Tensor:
    return -y.advantages * y.logps + 0.15 * (y.logps - y.old) ** 2


def kl_cov(y: SimpleNamespace) -> torch.Tensor:
    """The two tokens of the largest covariance, which are all that 0.2 of 12 holds."""
    kept = y.mask.bool()
    a, lp = y.advantages[kept], y.logps.detach()[kept]
    top = torch.zeros_like(a).index_fill(0, ((a - a.mean()) * (lp - lp.mean())).topk(2).indices, 0.7)
    penalty = torch.zeros_like(y.mask).masked_scatter(kept, top)
    return -y.advantages * (y.logps - y.old).exp() + penalty * (y.logps - y.old).abs()


WRITTEN = {
    "dro": (GRPOLossConfig("dro", dro_beta=0.3), dro),
    "kl_cov": (GRPOLossConfig("kl_cov", kl_cov_ratio=0.2, ppo_kl_coef=0.7), kl_cov),
    "default": (GRPOLossConfig(dual_clip=3.0), lambda y: dual_clip_ppo(y, 0.2, 0.2, 3.0)),
    "cispo": (GRPOLossConfig("cispo_two_sided"), lambda y:
        -(y.logps - y.old).exp().clamp(0.8, 1.2).detach() * y.advantages * y.logps),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITTEN)
def test_verl_losses_written_out(x, name):
    """All ten of verl 0.9.1 were compared with its own functions, with and without rollout weights, in fp64."""
    config, formula = WRITTEN[name]
    loss, metrics = verl.policy_loss(config, token_mean)(
        x.old, x.logps, x.advantages, x.mask, rollout_is_weights=x.weights
    )
    same(loss, (formula(x) * x.weights * x.mask).sum() / x.mask.sum(), x.logps)
    distance = (x.old - x.logps).abs() if name == "kl_cov" else x.old - x.logps
    assert metrics["actor/ppo_kl"] == pytest.approx(float((distance * x.mask).sum() / x.mask.sum()), rel=1e-4)


def test_verls_default_of_kl_covs_penalty():
    assert GRPOLossConfig("kl_cov").ppo_kl_coef == TrainConfig.ppo_kl_coef == 0.1


@pytest.mark.parametrize("loss_type", ["dppo_tv", "gmpo"])
def test_verls_lower_clip_fraction(x, loss_type):
    """Of DPPO the tokens inside the trust region whose ratio is capped, of GMPO those beyond a bound and A < 0."""
    config = GRPOLossConfig(loss_type, epsilon=0.1, epsilon_high=0.1, delta=1.2 if loss_type == "dppo_tv" else None)
    _, metrics = verl.policy_loss(config, token_mean)(x.old, x.logps, x.advantages, x.mask)
    d, moved, a = x.logps - x.old, x.logps.exp() - x.old.exp(), x.advantages
    if loss_type == "gmpo":
        above, below = (d.abs() > 0.1) & (a > 0), (d.abs() > 0.1) & (a < 0)
    else:
        above = torch.where(a > 0, moved > 0.1, moved < -0.1)
        below = (d.exp() > 1.2) & ~above
    wanted = [float((t * x.mask).sum() / x.mask.sum()) for t in (above, below)]
    assert [metrics[f"actor/pg_clipfrac{end}"] for end in ("", "_lower")] == pytest.approx(wanted) and min(wanted) > 0


def test_verl_weighs_a_geometric_mean_with_the_weights_geometric_mean(x):
    loss, _ = verl.policy_loss(GRPOLossConfig("gmpo"), token_sum)(
        x.old, x.logps, x.advantages, x.mask, rollout_is_weights=x.weights
    )
    d, n = x.logps - x.old, x.mask.sum(-1, keepdim=True)
    bounded = torch.where(x.advantages > 0, d.clamp(max=0.2), d.clamp(min=-0.2))
    mean = lambda t: ((t * x.mask).sum(-1, keepdim=True) / n).exp()  # noqa: E731
    same(loss, -(x.advantages * mean(bounded) * mean(x.weights.log()) * x.mask).sum(), x.logps)


@pytest.mark.parametrize("weighted", [False, True])
def test_prime_rls_default_loss(x, weighted):
    """Its default_loss_fn: masked by how far the probability moved, ratio to the sampler, squared log-ratio on all."""
    low, high, tau = 0.02, 0.03, 0.1
    config = GRPOLossConfig("dppo_tv", epsilon=low, epsilon_high=high, kl_tau=tau)
    dropped = 0
    for i in range(B):
        lp, old, a, mask = x.logps[i], x.old[i], x.advantages[i], x.mask[i].bool()
        weights = x.weights[i].clone() if weighted else None
        moved = lp.exp() - old.exp()
        inside = ~torch.where(a > 0, moved > high, moved < -low)
        per_token = -(inside * a * (lp - old).exp()) + tau * (lp - old) ** 2
        if weighted:
            weights[0] = 0.0
            per_token = per_token * weights
        loss, _ = prime_rl.sequence_loss(lp, old, a, mask, config, weights)
        if loss.detach() != 0:
            same(loss, (per_token * mask).sum(), x.logps)
        dropped += int((~inside & mask).sum())
    assert dropped > 0


@pytest.mark.needs_package("verl")
@pytest.mark.parametrize("options", [*ROLLOUT_RS, "seq_max_k2,token_k3,seq_sum_k1"])
def test_rejection_is_verls_own(x, options):
    helper = pytest.importorskip("verl.trainer.ppo.rollout_corr_helper", exc_type=ImportError)
    sampler = x.sampler.clone()
    sampler[0, 2], sampler[1, 1] = x.old[0, 2] - 50.0, x.old[1, 0] + 30.0
    for ratios, bound in (("0.7_1.3", "0.05"), ("0.5_2.0", "0.5"), ("1.5", "3.0")):
        threshold = ",".join(ratios if name.endswith("k1") else bound for name in options.split(","))
        theirs, _ = helper.compute_rollout_rejection_mask(x.old - sampler, x.mask, options, threshold)
        batch = TokenBatch.build(
            torch.zeros(x.mask.shape, dtype=torch.long), x.advantages, dtype=torch.float32, completion_mask=x.mask,
            old_per_token_logps=x.old, sampling_per_token_logps=sampler,
        )  # fmt: skip
        config = GRPOLossConfig(rollout_rs=options, rollout_rs_threshold=threshold)
        kept = (accepts(batch.old_per_token_logps, batch, config) & batch.mask).view(x.mask.shape)
        assert torch.equal(kept, theirs.bool())


def test_prime_rls_lm_head_divides_every_token_by_its_own_temperature(monkeypatch):
    name = "prime_rl.trainer.models.layers.lm_head"
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(PrimeLmOutput=dict))
    for i in range(1, 5):
        monkeypatch.setitem(sys.modules, ".".join(name.split(".")[:i]), SimpleNamespace())
    hidden, labels = torch.randn(B, T, H, requires_grad=True), torch.randint(V, (B, T))
    head, temperatures = prime_rl.FusedOutputLinear(H, V, chunk_size=4), 0.5 + torch.rand(B, T)
    out = head(hidden, labels, temperatures)
    log_p = (hidden @ head.weight.T / temperatures[..., None]).log_softmax(-1)
    truth = log_p.gather(-1, labels[..., None])[..., 0]
    torch.testing.assert_close(out["logprobs"], truth)
    torch.testing.assert_close(out["entropy"], -(log_p.exp() * log_p).sum(-1))
    leaves = (hidden, head.weight)
    grads = [torch.autograd.grad(x.sin().sum(), leaves) for x in (out["logprobs"], truth)]
    torch.testing.assert_close(*grads)
    with pytest.raises(ValueError, match="needs labels and temperature"):
        head(hidden, labels)
