import math

import pytest
import torch

from rlhf_ray.advantages import Moments, explained_variance


def measure(values, returns, mask=None):
    values, returns = torch.tensor(values), torch.tensor(returns)
    mask = torch.ones_like(values) if mask is None else torch.tensor(mask)
    return explained_variance(Moments.of(returns, mask), Moments.of(returns - values, mask))


def test_hand_computed():
    # Returns 0, 2, 4: mean 2, m2 8. Residuals 0, 1, 2: mean 1, m2 2. 1 - 2 / 8 = 0.75
    assert measure([0.0, 1.0, 2.0], [0.0, 2.0, 4.0]) == 0.75


def test_perfect_constant_and_opposite_critics():
    returns = [1.0, 2.0, 3.0]
    assert measure(returns, returns) == 1.0
    assert measure([7.0, 7.0, 7.0], returns) == 0.0
    # Residuals 2, 4, 6 have 4 times the variance: 1 - 4
    assert measure([-1.0, -2.0, -3.0], returns) == -3.0


def test_shards_equal_the_whole():
    generator = torch.Generator().manual_seed(0)
    returns, values = torch.randn(2, 6, 5, generator=generator).unbind(0)
    mask = torch.rand(6, 5, generator=generator) < 0.6
    whole = explained_variance(Moments.of(returns, mask), Moments.of(returns - values, mask))
    parts = [
        sum((Moments.of(x[rows], mask[rows]) for rows in (slice(0, 1), slice(1, 6))), Moments())
        for x in (returns, returns - values)
    ]
    assert explained_variance(*parts) == pytest.approx(whole, rel=1e-12)


def test_garbage_under_the_mask_changes_nothing():
    assert measure([0.0, 1.0, 2.0, math.nan], [0.0, 2.0, 4.0, math.inf], [1, 1, 1, 0]) == 0.75


def test_nothing_to_explain_is_zero():
    assert measure([1.0, 2.0], [3.0, 3.0]) == 0.0
    assert measure([1.0], [3.0]) == 0.0
    assert explained_variance(Moments(), Moments()) == 0.0


def test_float32_rounding_is_not_variance():
    # Equal returns that went through advantages + values in float32 differ in the last digit.
    values = torch.linspace(-3, 3, 1001)
    returns = (1.0 - values) + values
    assert returns.unique().numel() > 1
    mask = torch.ones_like(values)
    assert explained_variance(Moments.of(returns, mask), Moments.of(returns - values, mask)) == 0.0


def test_small_but_real_variance_counts():
    assert measure([1.0, 1.001], [1.0, 1.001]) == 1.0


def test_different_tokens_are_refused():
    with pytest.raises(ValueError, match=r"returns count 2.0 tokens, residuals 3.0"):
        explained_variance(Moments(count=2.0), Moments(count=3.0))
