from __future__ import annotations

import math

import pytest

from igrpo.rollout.advantage import group_advantages


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
