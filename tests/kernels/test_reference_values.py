"""Loss, gradient and metrics against numbers derived by hand.

Two sequences of three tokens over three words; the last token of the second sequence is masked. The probabilities of
the sampled tokens are P, their ratios to the old policy W, so that tokens fall on every side of the clip range.
"""

from math import exp, log

import pytest
import torch

from igrpo_kernels import GRPOLossConfig, grpo_loss

P = [[0.5, 0.25, 0.4], [0.2, 0.6, 0.3]]  # pi(token)
W = [[2.0, 1.1, 0.5], [0.5, 1.5, 1.0]]  # pi/pi_old(token)
A = [2.0, -1.0]
MASK = [[1, 1, 1], [1, 1, 0]]
W_SEQ = [(2.0 * 1.1 * 0.5) ** (1 / 3), (0.5 * 1.5) ** (1 / 2)]  # 1.03 and 0.87: neither clipped by 0.2


def make_inputs():
    """Logits are log-probabilities: word 0 is the sampled token, the other two share the rest 3:1."""
    p = torch.tensor(P, dtype=torch.float64)
    logits = torch.stack([p, (1 - p) * 0.75, (1 - p) * 0.25], -1).log().requires_grad_()
    keywords = {
        "completion_ids": torch.zeros(2, 3, dtype=torch.long),
        "advantages": torch.tensor(A, dtype=torch.float64),
        "completion_mask": torch.tensor(MASK),
        "old_per_token_logps": (p / torch.tensor(W, dtype=torch.float64)).log(),
    }
    return logits, keywords


def evaluate(config, **extra):
    logits, keywords = make_inputs()
    out = grpo_loss(logits, **{**keywords, **extra}, config=config, impl="torch")
    out.loss.backward()
    return out, logits


def check(config, loss, dlogp, **extra):
    """`dlogp[b][t]` is dloss/dlogp of each token; the logits' gradient follows as dlogp·(onehot - p)."""
    out, logits = evaluate(config, **extra)
    assert out.loss.item() == pytest.approx(loss, rel=1e-12)
    p = logits.detach().softmax(-1)
    onehot = torch.zeros_like(p)
    onehot[..., 0] = 1.0
    expected = torch.tensor(dlogp, dtype=torch.float64)[..., None] * (onehot - p)
    torch.testing.assert_close(logits.grad, expected, rtol=1e-12, atol=1e-14)
    return {name: value.item() for name, value in out.metrics.items()}


# Clipped surrogate, epsilon = 0.2, per token: -min(w·A, clip(w)·A).
L0 = [-1.2 * 2.0, -1.1 * 2.0, -0.5 * 2.0]  # clipped high, inside, low ratio but A > 0 so unclipped
L1 = [0.8 * 1.0, 1.5 * 1.0]  # clipped low; high ratio but A < 0 so unclipped
G0 = [0.0, -1.1 * 2.0, -0.5 * 2.0]  # d/dlogp = -w·A where unclipped
G1 = [0.0, 1.5 * 1.0]


def scaled(factor_0, factor_1, g0=G0, g1=G1):
    return [[factor_0 * g for g in g0], [factor_1 * g for g in g1] + [0.0]]


@pytest.mark.parametrize(
    ("loss_type", "factor_0", "factor_1"),
    [
        ("grpo", 1 / (2 * 3), 1 / (2 * 2)),  # mean over tokens, then over sequences
        ("bnpo", 1 / 5, 1 / 5),  # mean over the five unmasked tokens
        ("dr_grpo", 1 / (2 * 7), 1 / (2 * 7)),  # B · max_completion_length
        ("dapo", 1 / 11, 1 / 11),  # num_items_in_batch
        ("luspo", 1 / 2, 1 / 2),  # sum over tokens, mean over sequences
    ],
)
def test_clipped_surrogate_and_its_reductions(loss_type, factor_0, factor_1):
    config = GRPOLossConfig(loss_type=loss_type, max_completion_length=7)
    loss = factor_0 * sum(L0) + factor_1 * sum(L1)
    metrics = check(config, loss, scaled(factor_0, factor_1), num_items_in_batch=11)
    assert metrics["clip_ratio/low_mean"] == pytest.approx(1 / 5)
    assert metrics["clip_ratio/high_mean"] == pytest.approx(1 / 5)
    assert metrics["clip_ratio/region_mean"] == pytest.approx(2 / 5)
    assert metrics["clip_ratio/low_min"] == pytest.approx(0.0)  # first sequence
    assert metrics["clip_ratio/high_max"] == pytest.approx(1 / 3)  # first sequence


@pytest.mark.parametrize("num_items", [None, 5, 5.0, torch.tensor(5), torch.tensor([5.0])])
def test_dapo_normaliser_may_be_a_number_a_tensor_or_the_local_count(num_items):
    config = GRPOLossConfig(loss_type="dapo")
    check(config, (sum(L0) + sum(L1)) / 5, scaled(1 / 5, 1 / 5), num_items_in_batch=num_items)


def test_num_items_in_batch_has_no_effect_on_sequence_means():
    check(GRPOLossConfig(), sum(L0) / 6 + sum(L1) / 4, scaled(1 / 6, 1 / 4), num_items_in_batch=11)


def test_epsilon_high_moves_only_the_upper_bound():
    loss = (-1.6 * 2 - 1.1 * 2 - 0.5 * 2 + 0.8 + 1.5) / 5
    check(GRPOLossConfig(loss_type="bnpo", epsilon_high=0.6), loss, scaled(1 / 5, 1 / 5))


def test_delta_bounds_the_ratio_of_negative_advantages():
    loss = (sum(L0) + 0.8 + 1.3) / 5  # the token with w = 1.5 and A = -1 is held at 1.3
    metrics = check(GRPOLossConfig(loss_type="bnpo", delta=1.3), loss, scaled(1 / 5, 1 / 5, g1=[0.0, 0.0]))
    assert metrics["clip_ratio/high_mean"] == pytest.approx(1 / 5)


def test_delta_below_the_upper_bound_hides_high_clips_from_the_metric():
    # -min(min(w, 1.15)·2, clip(w)·2): the first token is held at 1.15 by delta, before 1.2 could clip it.
    loss = (-1.15 * 2 - 1.1 * 2 - 0.5 * 2 + 0.8 + 1.2) / 5
    metrics = check(GRPOLossConfig(loss_type="bnpo", delta=1.15), loss, scaled(1 / 5, 1 / 5, g1=[0.0, 0.0]))
    assert metrics["clip_ratio/high_mean"] == 0.0


def test_dual_clip_floors_negative_advantages_only():
    loss = (sum(L0) + 0.8 + 1.25) / 5  # w = 1.5, A = -1 costs at most 1.25; w = 2, A = 2 is untouched
    metrics = check(GRPOLossConfig(loss_type="bnpo", dual_clip=1.25), loss, scaled(1 / 5, 1 / 5, g1=[0.0, 0.0]))
    assert metrics["clip_ratio/dual_mean"] == pytest.approx(1 / 5)
    check(GRPOLossConfig(loss_type="bnpo", dual_clip=1.75), (sum(L0) + sum(L1)) / 5, scaled(1 / 5, 1 / 5))


def test_cispo_bounds_the_ratio_itself_and_keeps_every_gradient():
    bounded = [[1.4, 1.1, 0.5], [0.5, 1.4]]
    dlogp = [[-c * 2.0 / 11 for c in bounded[0]], [c * 1.0 / 11 for c in bounded[1]] + [0.0]]
    loss = sum(dlogp[b][t] * log(P[b][t]) for b in range(2) for t in range(3))
    metrics = check(GRPOLossConfig(loss_type="cispo", epsilon_high=1.4), loss, dlogp, num_items_in_batch=11)
    assert metrics["cispo_clip_ratio"] == pytest.approx(1 / 5)  # w = 1.5 has A < 0 and is not counted
    assert "clip_ratio/low_mean" not in metrics


def test_sapo_gates_with_a_sigmoid_per_sign():
    loss, dlogp = 0.0, [[0.0] * 3, [0.0] * 3]
    for b, t_pos in ((0, 0.9), (1, 1.3)):
        n = (3, 2)[b]
        for t in range(n):
            gate = 1 / (1 + exp(-t_pos * (W[b][t] - 1)))
            loss += -4 / t_pos * gate * A[b] / n / 2
            dlogp[b][t] = -4 * gate * (1 - gate) * W[b][t] * A[b] / n / 2
    config = GRPOLossConfig(loss_type="sapo", sapo_temperature_pos=0.9, sapo_temperature_neg=1.3)
    assert not [name for name in check(config, loss, dlogp) if name.startswith("clip_ratio")]


def test_vespo_weighs_sequences_by_phi():
    w = [2.0 * 1.1 * 0.5, 0.5 * 1.5]  # products, not means
    phi = [exp(3 + 2 * log(w[0]) - 3 * w[0]), exp(2 + 3 * log(w[1]) - 2 * w[1])]
    dlogp = [[-phi[0] * 2.0 / 11] * 3, [phi[1] / 11] * 2 + [0.0]]
    loss = sum(dlogp[b][t] * log(P[b][t]) for b in range(2) for t in range(3))
    metrics = check(GRPOLossConfig(loss_type="vespo"), loss, dlogp, num_items_in_batch=11)
    assert metrics["vespo/phi_seq_mean"] == pytest.approx((phi[0] + phi[1]) / 2)


def test_vespo_adds_the_log_sampler_ratio():
    ratio = [[1.5, 0.8, 1.0], [1.25, 2.5]]
    w = [1.1 * 1.5 * 0.8, 0.75 * 1.25 * 2.0]  # 2.5 truncated to 2
    phi = [exp(3 + 2 * log(w[0]) - 3 * w[0]), exp(2 + 3 * log(w[1]) - 2 * w[1])]
    dlogp = [[-phi[0] * 2.0 / 11] * 3, [phi[1] / 11] * 2 + [0.0]]
    loss = sum(dlogp[b][t] * log(P[b][t]) for b in range(2) for t in range(3))
    config = GRPOLossConfig(
        loss_type="vespo", importance_sampling_mode="token_truncate", importance_sampling_clip_max=2.0
    )
    check(config, loss, dlogp, num_items_in_batch=11, sampling_per_token_logps=sampler_logps(ratio))


def test_sequence_level_shares_one_ratio_and_couples_the_gradients():
    # loss = mean_b(-w_b·A_b); each token of a sequence of n carries dw_b/dlogp = w_b/n.
    loss = (-W_SEQ[0] * 2.0 + W_SEQ[1] * 1.0) / 2
    dlogp = [[-W_SEQ[0] * 2.0 / 3 / 2] * 3, [W_SEQ[1] / 2 / 2] * 2 + [0.0]]
    metrics = check(GRPOLossConfig(importance_sampling_level="sequence"), loss, dlogp)
    assert metrics["clip_ratio/region_mean"] == 0.0
    clipped = GRPOLossConfig(importance_sampling_level="sequence", epsilon=0.1)  # 0.87 < 0.9 with A < 0
    metrics = check(clipped, (-W_SEQ[0] * 2.0 + 0.9) / 2, [dlogp[0], [0.0] * 3])
    assert metrics["clip_ratio/low_mean"] == pytest.approx(1 / 2)  # one of two sequences, not 2 of 5 tokens


def test_sequence_level_sapo_and_cispo():
    gate = [1 / (1 + exp(-1.0 * (W_SEQ[0] - 1))), 1 / (1 + exp(-1.05 * (W_SEQ[1] - 1)))]
    loss = (-4 / 1.0 * gate[0] * 2.0 + 4 / 1.05 * gate[1] * 1.0) / 2
    d = [-4 * gate[0] * (1 - gate[0]) * W_SEQ[0] * 2.0, 4 * gate[1] * (1 - gate[1]) * W_SEQ[1]]
    dlogp = [[d[0] / 3 / 2] * 3, [d[1] / 2 / 2] * 2 + [0.0]]
    check(GRPOLossConfig(loss_type="sapo", importance_sampling_level="sequence"), loss, dlogp)
    dlogp = [[-1.01 * 2.0 / 5] * 3, [W_SEQ[1] / 5] * 2 + [0.0]]  # 1.03 held at 1.01
    loss = sum(dlogp[b][t] * log(P[b][t]) for b in range(2) for t in range(3))
    check(GRPOLossConfig(loss_type="cispo", importance_sampling_level="sequence", epsilon_high=1.01), loss, dlogp)


X = [[0.3, -0.2, 0.1], [-0.4, 0.5, 0.0]]  # log pi_ref - log pi
KL = {
    "k1": (lambda x: -x, lambda x: 1.0),  # estimate, and its derivative in logp
    "k2": (lambda x: x * x / 2, lambda x: -x),
    "k3": (lambda x: exp(x) - x - 1, lambda x: 1 - exp(x)),
}


def ref_logps():
    return torch.tensor(P, dtype=torch.float64).log() + torch.tensor(X, dtype=torch.float64)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("corrected", [False, True])
def test_kl_estimators_with_and_without_bias_correction(estimator, corrected):
    value, slope = KL[estimator]
    loss, kl_sum, dlogp = (sum(L0) + sum(L1)) / 5, 0.0, scaled(1 / 5, 1 / 5)
    for b, t in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1)):
        w, x = (W[b][t] if corrected else 1.0), X[b][t]
        kl_sum += w * value(x)
        loss += 0.1 * w * value(x) / 5
        dlogp[b][t] += 0.1 * (w * slope(x) + (w * value(x) if corrected else 0.0)) / 5  # dw/dlogp = w
    config = GRPOLossConfig(loss_type="bnpo", beta=0.1, kl_estimator=estimator, use_bias_correction_kl=corrected)
    metrics = check(config, loss, dlogp, ref_per_token_logps=ref_logps())
    assert metrics["kl"] == pytest.approx(kl_sum / 5)


def test_bias_corrected_kl_on_the_sequence_level_couples_tokens():
    value, slope = KL["k3"]
    dlogp, loss = [[0.0] * 3, [0.0] * 3], 0.0
    for b, n in ((0, 3), (1, 2)):
        k = [value(X[b][t]) for t in range(n)]
        loss += (-W_SEQ[b] * A[b] + 0.1 * W_SEQ[b] * sum(k) / n) / 2
        for t in range(n):
            through_ratio = W_SEQ[b] / n * (-A[b] + 0.1 * sum(k) / n)  # every token moves the shared ratio
            dlogp[b][t] = (through_ratio + 0.1 * W_SEQ[b] * slope(X[b][t]) / n) / 2
    config = GRPOLossConfig(importance_sampling_level="sequence", beta=0.1)
    check(config, loss, dlogp, ref_per_token_logps=ref_logps())


def sampler_logps(ratio):
    """log pi_sampler such that pi_old/pi_sampler is `ratio` on the unmasked tokens."""
    out = torch.zeros(2, 3, dtype=torch.float64)
    for b, row in enumerate(ratio):
        for t, r in enumerate(row):
            out[b, t] = log(P[b][t] / W[b][t]) - log(r)
    return out


RATIO = [[1.5, 0.3, 1.0], [1.2, 2.5]]  # pi_old/pi_sampler per token
RATIO_SEQ = [1.5 * 0.3, 1.2 * 2.5]  # products: 0.45 and 3.0


@pytest.mark.parametrize(
    ("mode", "low", "high", "expected"),
    [
        ("token_truncate", None, 2.0, [[1.5, 0.3, 1.0], [1.2, 2.0]]),
        ("token_truncate", 0.5, 2.0, [[1.5, 0.5, 1.0], [1.2, 2.0]]),
        ("token_truncate", 0.5, None, [[1.5, 0.5, 1.0], [1.2, 2.5]]),
        ("token_mask", None, 2.0, [[1.5, 0.3, 1.0], [1.2, 0.0]]),
        ("token_mask", 0.5, 2.0, [[1.5, 0.0, 1.0], [1.2, 0.0]]),
        ("sequence_truncate", 0.5, 2.0, [[0.5] * 3, [2.0] * 2]),
        ("sequence_mask", None, 2.9, [[0.45] * 3, [0.0] * 2]),
        ("sequence_mask", 0.5, 3.1, [[0.0] * 3, [3.0] * 2]),
    ],
)
def test_sampler_correction_modes(mode, low, high, expected):
    config = GRPOLossConfig(
        loss_type="bnpo",
        importance_sampling_mode=mode,
        importance_sampling_clip_min=low,
        importance_sampling_clip_max=high,
    )
    loss = sum(x * r for x, r in zip(L0 + L1, expected[0] + expected[1], strict=True)) / 5
    g0 = [g * r for g, r in zip(G0, expected[0], strict=True)]
    g1 = [g * r for g, r in zip(G1, expected[1], strict=True)]
    metrics = check(config, loss, scaled(1 / 5, 1 / 5, g0, g1), sampling_per_token_logps=sampler_logps(RATIO))
    values = expected[0] + expected[1] if mode.startswith("token") else [expected[0][0], expected[1][0]]
    assert metrics["sampling/importance_sampling_ratio/mean"] == pytest.approx(sum(values) / len(values))
    assert metrics["sampling/importance_sampling_ratio/min"] == pytest.approx(min(values))
    assert metrics["sampling/importance_sampling_ratio/max"] == pytest.approx(max(values))
    differences = [abs(log(r)) for r in RATIO[0] + RATIO[1]]
    assert metrics["sampling/sampling_logp_difference/mean"] == pytest.approx(sum(differences) / 5)
    assert metrics["sampling/sampling_logp_difference/max"] == pytest.approx(max(differences))


def test_kl_is_neither_gated_nor_corrected_for_the_sampler():
    value, _ = KL["k3"]
    config = GRPOLossConfig(
        loss_type="bnpo",
        beta=0.1,
        use_bias_correction_kl=False,
        importance_sampling_mode="token_truncate",
        importance_sampling_clip_max=1e-15,
        off_policy_mask_threshold=-10.0,
    )
    out, _ = evaluate(config, ref_per_token_logps=ref_logps(), sampling_per_token_logps=sampler_logps(RATIO))
    kl = [value(X[b][t]) for b, t in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1))]
    assert out.loss.item() == pytest.approx(0.1 * sum(kl) / 5, rel=1e-10)  # all that survives


def test_off_policy_mask_drops_negative_sequences_far_from_the_sampler():
    # mean(log sampler - log pi) of the second sequence = -mean(log(w·ratio)) = -(log 0.6 + log 3.75) / 2
    divergence = -(log(0.5 * 1.2) + log(1.5 * 2.5)) / 2
    sampler = sampler_logps(RATIO)
    keep = GRPOLossConfig(loss_type="bnpo", off_policy_mask_threshold=divergence + 1e-9)
    check(keep, (sum(L0) + sum(L1)) / 5, scaled(1 / 5, 1 / 5), sampling_per_token_logps=sampler)
    drop = GRPOLossConfig(loss_type="bnpo", off_policy_mask_threshold=divergence - 1e-9)
    check(drop, sum(L0) / 5, scaled(1 / 5, 0.0), sampling_per_token_logps=sampler)
    # Without sampler log-probs the old policy stands in: -(log 0.5 + log 1.5) / 2 = 0.144
    check(GRPOLossConfig(loss_type="bnpo", off_policy_mask_threshold=0.14), sum(L0) / 5, scaled(1 / 5, 0.0))
    keep = GRPOLossConfig(loss_type="bnpo", off_policy_mask_threshold=0.15)
    check(keep, (sum(L0) + sum(L1)) / 5, scaled(1 / 5, 1 / 5))


def entropy_of(p):
    return -sum(q * log(q) for q in (p, (1 - p) * 0.75, (1 - p) * 0.25))


ENTROPY = [[entropy_of(p) for p in row] for row in P]


def test_entropy_and_its_bonus_are_token_means():
    mean = (sum(ENTROPY[0]) + sum(ENTROPY[1][:2])) / 5
    config = GRPOLossConfig(entropy_coef=0.01)  # grpo: the bonus is not averaged per sequence
    out, logits = evaluate(config)
    policy = sum(L0) / 6 + sum(L1) / 4
    assert out.metrics["entropy"].item() == pytest.approx(mean, rel=1e-12)
    assert out.metrics["policy_loss"].item() == pytest.approx(policy, rel=1e-12)
    assert out.loss.item() == pytest.approx(policy - 0.01 * mean, rel=1e-12)
    torch.testing.assert_close(
        out.entropy[:, :2], torch.tensor([row[:2] for row in ENTROPY], dtype=torch.float64), rtol=1e-12, atol=0
    )
    # token (1, 0) is clipped, so only the bonus moves its logits: dH/dz_v = -p_v·(log p_v + H)
    p = logits.detach()[1, 0].softmax(-1)
    expected = 0.01 / 5 * p * (p.log() + ENTROPY[1][0])
    torch.testing.assert_close(logits.grad[1, 0], expected, rtol=1e-10, atol=1e-15)


def test_top_entropy_quantile_keeps_the_most_uncertain_tokens():
    unmasked = sorted([*ENTROPY[0], *ENTROPY[1][:2]])
    assert ENTROPY[1][2] > unmasked[0]  # the masked token must not take part in the quantile
    # share 0.5: threshold at rank 0.5·(5-1) = 2, the median itself; three of five tokens stay
    threshold = unmasked[2]
    keep = [[float(h >= threshold) for h in row] for row in ENTROPY]
    keep[1][2] = 0.0
    loss = sum(x * k for x, k in zip(L0 + L1, keep[0] + keep[1][:2], strict=True)) / 5
    g0 = [g * k for g, k in zip(G0, keep[0], strict=True)]
    g1 = [g * k for g, k in zip(G1, keep[1][:2], strict=True)]
    config = GRPOLossConfig(loss_type="bnpo", top_entropy_quantile=0.5)
    check(config, loss, scaled(1 / 5, 1 / 5, g0, g1))
    # share 0.6: rank 0.4·4 = 1.6 lies between the second and third; the same three tokens stay
    check(GRPOLossConfig(loss_type="bnpo", top_entropy_quantile=0.6), loss, scaled(1 / 5, 1 / 5, g0, g1))
    # the bonus acts on the kept tokens only
    out, _ = evaluate(GRPOLossConfig(loss_type="bnpo", top_entropy_quantile=0.5, entropy_coef=0.1))
    kept = [h for row, flags in zip(ENTROPY, keep, strict=True) for h, k in zip(row, flags, strict=True) if k]
    assert out.loss.item() == pytest.approx(loss - 0.1 * sum(kept) / 3, rel=1e-12)


def test_temperature_scale_and_softcap_act_on_the_logits_in_that_order():
    logits = torch.tensor([[[1.0, -2.0]]], dtype=torch.float64, requires_grad=True)
    config = GRPOLossConfig(temperature=0.5, logit_scale=3.0, final_logit_softcapping=4.0)
    out = grpo_loss(logits, torch.tensor([[0]]), torch.ones(1, dtype=torch.float64), config=config, impl="torch")
    z = [4 * torch.tensor(3.0 * x / 4, dtype=torch.float64).tanh().item() / 0.5 for x in (1.0, -2.0)]
    p = 1 / (1 + exp(z[1] - z[0]))
    assert out.per_token_logps.item() == pytest.approx(log(p), rel=1e-9)
    out.loss.backward()  # on policy: -A·w, slope -1 in logp; dz/dx = scale/T·(1 - tanh²)
    slope = [3.0 / 0.5 * (1 - torch.tensor(3.0 * x / 4, dtype=torch.float64).tanh().item() ** 2) for x in (1.0, -2.0)]
    expected = torch.tensor([[[-(1 - p) * slope[0], (1 - p) * slope[1]]]], dtype=torch.float64)
    torch.testing.assert_close(logits.grad, expected, rtol=1e-9, atol=0)


def test_without_old_logps_the_ratio_is_one_and_min_ties_give_the_full_gradient():
    loss = (-2.0 * 3 + 1.0 * 2) / 5
    metrics = check(
        GRPOLossConfig(loss_type="bnpo"), loss, [[-2 / 5] * 3, [1 / 5] * 2 + [0.0]], old_per_token_logps=None
    )
    assert metrics["clip_ratio/region_mean"] == 0.0


def test_per_token_advantages():
    advantages = torch.tensor([[2.0, -2.0, 1.0], [-1.0, 3.0, 5.0]], dtype=torch.float64)
    loss = (-1.2 * 2 + 1.1 * 2 - 0.5 * 1 + 0.8 * 1 - 1.2 * 3) / 5
    dlogp = [[0.0, 1.1 * 2 / 5, -0.5 / 5], [0.0, 0.0, 0.0]]
    check(GRPOLossConfig(loss_type="bnpo"), loss, dlogp, advantages=advantages)


def test_an_empty_sequence_counts_in_clip_extremes_on_the_sequence_level_only():
    only_second = torch.tensor([[0, 0, 0], [1, 1, 0]])  # its tokens: one of two clipped low; as a sequence: clipped
    out, _ = evaluate(GRPOLossConfig(), completion_mask=only_second)
    assert out.metrics["clip_ratio/low_min"].item() == pytest.approx(1 / 2)
    config = GRPOLossConfig(importance_sampling_level="sequence", epsilon=0.1)
    out, _ = evaluate(config, completion_mask=only_second)
    assert out.metrics["clip_ratio/low_mean"].item() == pytest.approx(1 / 2)
    assert out.metrics["clip_ratio/low_min"].item() == 0.0


def test_unscored_sampler_tokens_are_left_out_of_the_differences_and_keep_ratio_one():
    sampler = sampler_logps(RATIO)
    sampler[0, 1] = float("nan")
    out, _ = evaluate(GRPOLossConfig(importance_sampling_mode="token_mask"), sampling_per_token_logps=sampler)
    differences = [abs(log(r)) for r in (1.5, 1.0, 1.2, 2.5)]
    metrics = {name: value.item() for name, value in out.metrics.items()}
    assert metrics["sampling/sampling_logp_difference/mean"] == pytest.approx(sum(differences) / 4)
    assert metrics["sampling/sampling_logp_difference/max"] == pytest.approx(max(differences))
    assert metrics["sampling/importance_sampling_ratio/min"] == pytest.approx(1.0)
    assert metrics["sampling/importance_sampling_ratio/mean"] == pytest.approx((1.5 + 1.0 + 1.0 + 1.2 + 2.5) / 5)


def test_an_empty_sequence_has_sampler_ratio_one():
    config = GRPOLossConfig(importance_sampling_mode="sequence_mask")
    only_second = torch.tensor([[0, 0, 0], [1, 1, 0]])
    out, _ = evaluate(config, completion_mask=only_second, sampling_per_token_logps=sampler_logps(RATIO))
    assert out.metrics["sampling/importance_sampling_ratio/mean"].item() == pytest.approx((1.0 + 1.2 * 2.5) / 2)
