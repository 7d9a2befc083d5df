from __future__ import annotations

import math
from itertools import combinations, product
from statistics import fmean, stdev

import pytest
import torch

from igrpo.config.train_config import ConfigError, TrainConfig
from igrpo.data_types import Completion, Problem, RolloutGroup, Scored
from igrpo.rollout.advantage import advantages_of, group_advantages
from igrpo.rollout.schedule import Flow, uninformative

NOTHING = Completion((), (), "", "stop", 0)


def test_hand_computed_groups_of_four():
    # One right of four: mean 1/4, sample std sqrt((9/16 + 3/16) / 3) = 1/2 -> +1.5 and -0.5. Two of four: ±sqrt(3)/2.
    one, two = group_advantages([[1, 0, 0, 0], [1, 1, 0, 0]])
    assert one == pytest.approx((1.5, -0.5, -0.5, -0.5))
    assert two == pytest.approx((math.sqrt(3) / 2,) * 2 + (-math.sqrt(3) / 2,) * 2)


def test_equal_rewards_give_exact_zeros_whatever_their_float_sum():
    assert group_advantages([[0.1] * 7, [1 / 3] * 3]) == [(0.0,) * 7, (0.0,) * 3]


def test_scales():
    rewards = [[0.0, 2.0], [1.0, 1.0]]
    assert group_advantages(rewards, "none") == [(-1.0, 1.0), (0.0, 0.0)]
    batch_std = math.sqrt((1 + 1 + 0 + 0) / 3)
    assert group_advantages(rewards, "batch")[0] == pytest.approx((-1 / batch_std, 1 / batch_std))
    # The same whichever process has which group; each once divided by the deviation of its own.
    assert group_advantages(rewards[:1], "batch", batch=rewards) == group_advantages(rewards, "batch")[:1]


@pytest.mark.parametrize("estimator", ["grpo", "rloo", "maxrl", "pass_at_k"])
@pytest.mark.parametrize("pass_k", [1, 2, 3])
def test_equal_unjudged_and_single_rewards(estimator, pass_k):
    groups = [[0.1] * 7, [0.0] * 3, [1.0], [], [None, None], [None, 0.5], [None, 1.0, 0.25, 0.5]]
    made = group_advantages(groups, estimator=estimator, pass_k=pass_k)
    assert made[:6] == [(0.0,) * len(group) for group in groups[:6]]
    judged = group_advantages([groups[6][1:]], estimator=estimator, pass_k=pass_k)[0]
    assert made[6] == (0.0, *judged) and any(judged)


def test_hand_computed_estimators():
    rewards = [[1.0, 0.0, 0.0, 1.0, 0.5]]
    assert group_advantages(rewards, estimator="rloo")[0] == pytest.approx((0.625, -0.625, -0.625, 0.625, 0.0))
    assert group_advantages(rewards, estimator="maxrl")[0] == pytest.approx((1.0, -1.0, -1.0, 1.0, 0.0))
    # One right of four, k = 2: the right one adds 1 to each of its pairs, a wrong one nothing to any.
    assert group_advantages([[0, 1, 0, 0]], estimator="pass_at_k", pass_k=2) == [(0.0, 2.0, 0.0, 0.0)]
    assert group_advantages(rewards, estimator="pass_at_k", pass_k=1) == group_advantages(rewards, estimator="rloo")
    with pytest.raises(ConfigError, match=r"maxrl .* -0\.5"):
        group_advantages([[1.0, -0.5]], estimator="maxrl")


@pytest.mark.parametrize("k", [2, 3, 4, 5])
def test_pass_at_k_by_its_definition(k):
    rewards = [0.25, 1.0, 0.0, 1.0, 0.75]
    wanted = []
    for i, own in enumerate(rewards):
        others = [r for j, r in enumerate(rewards) if j != i]
        wanted.append(k * fmean(max(own, *some) - max(some) for some in combinations(others, k - 1)))
    assert group_advantages([rewards], estimator="pass_at_k", pass_k=k)[0] == pytest.approx(wanted)


@pytest.mark.parametrize("estimator, k", [("rloo", 1), *(("pass_at_k", k) for k in (1, 2, 4)), ("maxrl", 4)])
def test_the_mean_over_all_groups_is_the_gradient_of_what_is_promised(estimator, k):
    """Every group of four from a policy over three answers, in fp64: E[(1/n) sum A grad log pi] is exact.

    maxrl's is that of sum_{j<=n} (pass@j) / j, its truncated log-likelihood, in groups where something is right: where
    nothing is, it leaves out the control variate, whose mean there is the difference.
    """
    n, values = 4, torch.tensor([0.0, 1.0, 1.0] if estimator == "maxrl" else [0.0, 0.5, 1.0], dtype=torch.float64)
    theta = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    probabilities = theta.softmax(0)
    scores = torch.stack([torch.autograd.grad(p.log(), theta, retain_graph=True)[0] for p in probabilities])
    found = torch.zeros(3, dtype=torch.float64)
    for drawn in product(range(3), repeat=n):
        chance = probabilities.detach()[list(drawn)].prod()
        (advantages,) = group_advantages([[float(values[i]) for i in drawn]], estimator=estimator, pass_k=k)
        found += chance * sum(a * scores[i] for a, i in zip(advantages, drawn, strict=True)) / n
    if estimator == "maxrl":
        p = probabilities[1] + probabilities[2]
        wanted = sum((1 - (1 - p) ** j) / j for j in range(1, n + 1))
        found -= (1 - p.detach()) ** n * scores[0]
    else:
        wanted = sum(  # E[max of k]
            probabilities[list(drawn)].prod() * values[list(drawn)].max() for drawn in product(range(3), repeat=k)
        )
    (gradient,) = torch.autograd.grad(wanted, theta)
    torch.testing.assert_close(found, gradient, atol=1e-12, rtol=0)


def scored(*rewards: float | None) -> Scored:
    return Scored(NOTHING, dict(zip("ab", rewards, strict=True)), sum(2.0 * r for r in rewards if r is not None))


def test_each_reward_normalised_by_itself():
    """GDPO by hand: an equal sum of different rewards still has a gradient; batches span processes."""
    config = TrainConfig(
        model_name_or_path="m", dataset_name="d", reward_weights=[2.0, 1.0],
        multi_objective_aggregation="normalize_then_sum",
    )  # fmt: skip
    one = [scored(1.0, 0.0), scored(0.0, 10.0), scored(0.0, 10.0)]
    two = [scored(None, 1.0), scored(None, 3.0), scored(None, None)]
    a, b = math.sqrt(1 / 3), math.sqrt(100 / 3)
    first, second = 2 * (2 / 3) / a - (20 / 3) / b, 2 * (-1 / 3) / a + (10 / 3) / b
    last = 1 / math.sqrt(2)
    divisor = stdev([first, second, second, -last, last])
    wanted = [[first / divisor, second / divisor, second / divisor], [-last / divisor, last / divisor, 0.0]]
    both = advantages_of([one, two], config, "grpo")
    assert [list(group) for group in both] == [pytest.approx(group) for group in wanted]
    others = []
    advantages_of([two], config, "grpo", lambda mine: others.append(mine) or [mine])
    assert advantages_of([one], config, "grpo", lambda mine: [mine, others[0]]) == both[:1]
    equal = [scored(1.0, 1.0)] * 3
    assert advantages_of([equal], config, "grpo") == [(0.0,) * 3]
    unjudged = TrainConfig(model_name_or_path="m", dataset_name="d", scale_rewards="none")
    assert advantages_of([two], unjudged, "grpo") == [(-2.0, 2.0, 0.0)]


def test_the_mean_of_the_drafts_as_the_baseline():
    """RLTF-SD by hand: equal refinements that beat their drafts are worth something, in the batch and alone."""

    def of(scale: str, gather=lambda one: [one]) -> list[tuple[float, ...]]:
        config = TrainConfig(
            model_name_or_path="m", dataset_name="d", refinement_baseline="drafts", scale_rewards=scale
        )
        return advantages_of([refined, [scored(0.5, None), scored(None, None)]], config, "grpo", gather, [drafted, []])

    refined = [scored(0.5, None), scored(0.5, None), scored(None, None)]  # scored() weighs by 2
    drafted = [scored(0.5, None), scored(0.0, None), scored(None, None)]
    assert of("none") == [(0.5, 0.5, 0.0), (0.0, 0.0)]  # no draft of the second to compare with
    assert of("batch") == [(0.0, 0.0, 0.0), (0.0, 0.0)], "nothing in the batch differs"
    wide = of("batch", lambda mine: [mine, [[3.0]]])
    assert wide[0] == pytest.approx((0.5 / stdev([1.0, 1.0, 1.0, 3.0]), 0.5 / stdev([1.0, 1.0, 1.0, 3.0]), 0.0))


def test_a_group_alone_is_not_asked_for_the_deviation_of_its_batch():
    config = TrainConfig(
        model_name_or_path="m", dataset_name="d", zero_variance="resample", refinement_baseline="drafts",
        scale_rewards="batch",
    )  # fmt: skip
    flows = []
    for drafts, refinements in (((0.0, 0.0), (1.0, 1.0)), ((1.0, 1.0), (1.0, 1.0)), ((0.0, 0.0), (0.0, 1.0))):
        drafts, refinements = (tuple(scored(r, None) for r in group) for group in (drafts, refinements))
        group = RolloutGroup(Problem(0, "", ""), drafts, 0, (), refinements, (0.0, 0.0))
        flows.append(Flow(group.problem, 1, "", None, None, group=group))
    assert list(uninformative(flows, config)) == [1]
