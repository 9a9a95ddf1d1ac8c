from __future__ import annotations

import math

import pytest
import torch

from rlhf_ray.losses import expected_value, hl_gauss_loss

ONE = torch.ones(1, 1)


def target_of(y, *, bins, low, high, smoothing=0.75):
    """The definition, bin by bin."""
    width = (high - low) / bins
    normal = torch.distributions.Normal(y, smoothing * width)
    below = [normal.cdf(torch.tensor(low + k * width, dtype=torch.float64)).item() for k in range(bins + 1)]
    return [(below[k + 1] - below[k]) / (below[-1] - below[0]) for k in range(bins)]


def test_hand_computed():
    # Two bins from 0 to 2 and a return between them: half of the target in each. softmax(0, log 3) = (1/4, 3/4).
    logits = torch.tensor([[[0.0, math.log(3.0)]]])
    loss, metrics = hl_gauss_loss(logits, ONE, ONE, low=0.0, high=2.0)
    assert loss.item() == pytest.approx(0.5 * math.log(4.0) + 0.5 * math.log(4.0 / 3.0), rel=1e-6)
    assert metrics["value_mean"].item() == pytest.approx(0.25 * 0.5 + 0.75 * 1.5)
    assert metrics["return_mean"].item() == 1.0


@pytest.mark.parametrize("y", [-1.0, -0.93, 0.0, 0.31, 1.0, 7.0])
def test_target_is_that_of_the_definition_and_its_gradient(y):
    logits = torch.randn(1, 1, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    loss, _ = hl_gauss_loss(logits, torch.full((1, 1), y), ONE, low=-1.0, high=1.0)
    loss.backward()
    target = torch.tensor(target_of(min(max(y, -1.0), 1.0), bins=9, low=-1.0, high=1.0), dtype=torch.float64)
    wanted = logits.detach().softmax(-1)[0, 0] - target
    torch.testing.assert_close(logits.grad[0, 0], wanted, rtol=1e-6, atol=1e-7)


def test_a_critic_that_fits_the_target_has_the_return_as_its_value():
    for y in (-0.6, 0.05, 0.5):
        target = torch.tensor(target_of(y, bins=51, low=-1.0, high=1.0), dtype=torch.float64)
        assert expected_value(target.log(), low=-1.0, high=1.0).item() == pytest.approx(y, abs=1e-4)


def test_values_lie_within_the_bins():
    logits = 50.0 * torch.eye(4)
    torch.testing.assert_close(expected_value(logits, low=-2.0, high=2.0), torch.tensor([-1.5, -0.5, 0.5, 1.5]))
    assert expected_value(torch.zeros(3, 7), low=-1.0, high=1.0).abs().max() < 1e-6


def test_parts_add_up_and_what_is_masked_has_no_part():
    generator = torch.Generator().manual_seed(1)
    logits, returns = torch.randn(3, 4, 5, generator=generator), torch.randn(3, 4, generator=generator)
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0]])
    whole, parts = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss, _ = hl_gauss_loss(whole, returns, mask, low=-2.0, high=2.0)
    loss.backward()
    losses = [
        hl_gauss_loss(parts[i : i + 1], returns[i : i + 1], mask[i : i + 1], low=-2.0, high=2.0, normalizer=5)[0]
        for i in range(3)
    ]
    sum(losses).backward()
    assert sum(losses).item() == pytest.approx(loss.item())
    torch.testing.assert_close(parts.grad, whole.grad)
    assert not whole.grad[mask == 0].any()
    garbage = torch.where(mask[..., None] == 0, torch.nan, logits)
    again, _ = hl_gauss_loss(garbage, torch.where(mask == 0, torch.inf, returns), mask, low=-2.0, high=2.0)
    assert again.item() == loss.item()


@pytest.mark.parametrize("changes", [{"low": 1.0}, {"smoothing": 0.0}, {"value_logits": torch.zeros(1, 1, 1)}])
def test_what_makes_no_distribution_is_refused(changes):
    given = {"value_logits": torch.zeros(1, 1, 3), "returns": ONE, "mask": ONE, "low": 0.0, "high": 1.0}
    with pytest.raises(ValueError, match="no distribution"):
        hl_gauss_loss(**given | changes)
