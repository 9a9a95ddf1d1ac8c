import math

import pytest
import torch

from rlhf_ray.losses import cispo_loss, ppo_loss

CLIP = {"clip_low": 0.2, "clip_high": 0.3}


def one_token(ratio, advantage, **clip):
    """Loss and gradient of a token of probability 1/2 under the policy."""
    logprobs = torch.tensor([[0.5]]).log().requires_grad_()
    loss, _ = cispo_loss(
        logprobs, torch.tensor([[0.5 / ratio]]).log(), torch.tensor([[advantage]]), torch.ones(1, 1), **{**CLIP, **clip}
    )
    loss.backward()
    return loss.item(), logprobs.grad.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "weight"),
    [(1.1, 2.0, 1.1), (1.5, 2.0, 1.3), (0.5, 2.0, 0.8), (1.1, -2.0, 1.1), (1.5, -2.0, 1.3), (0.5, -2.0, 0.8)],
)
def test_hand_computed_on_both_sides_of_the_clip(ratio, advantage, weight):
    # -weight * A * ln(1/2), and the gradient -weight * A, which no clip takes away.
    loss, gradient = one_token(ratio, advantage)
    assert loss == pytest.approx(weight * advantage * math.log(2), rel=1e-5)
    assert gradient == pytest.approx(-weight * advantage, rel=1e-5)


def test_clip_low_of_one_or_more_is_no_lower_bound():
    for clip_low in (1.0, 5.0):
        assert one_token(0.01, 1.0, clip_low=clip_low)[1] == pytest.approx(-0.01, rel=1e-4)


def test_every_token_keeps_a_gradient_where_ppo_drops_some():
    generator = torch.Generator().manual_seed(0)
    logprobs, old_logprobs, advantages = torch.randn(3, 8, 9, generator=generator, dtype=torch.float64).unbind(0)
    mask = torch.ones(8, 9)
    logprobs.requires_grad_()
    gradients = [
        torch.autograd.grad(loss(logprobs, old_logprobs, advantages, mask, **CLIP)[0], logprobs)[0]
        for loss in (cispo_loss, ppo_loss)
    ]
    ratio = (logprobs - old_logprobs).exp().detach()
    torch.testing.assert_close(gradients[0], -ratio.clamp(0.8, 1.3) * advantages / 72)
    assert (gradients[0] != 0).all()
    assert (gradients[1] == 0).any()
    inside = (ratio > 0.8) & (ratio < 1.3)
    assert inside.any()
    torch.testing.assert_close(gradients[0][inside], gradients[1][inside])


def test_value_is_minus_the_weighted_logprob():
    generator = torch.Generator().manual_seed(1)
    logprobs, old_logprobs, advantages = torch.randn(3, 4, 5, generator=generator).unbind(0)
    mask = torch.rand(4, 5, generator=generator) < 0.6
    loss, _ = cispo_loss(logprobs, old_logprobs, advantages, mask, clip_low=1.0, clip_high=math.inf)
    torch.testing.assert_close(loss, -((logprobs - old_logprobs).exp() * advantages * logprobs)[mask].mean())


def test_metrics_count_both_bounds_at_any_advantage():
    # Ratios 2, 2, 0.5, 1 with A = 1, -1, 1, 1. k3, r - 1 - ln r: 0.306853 twice, 0.193147, 0; mean 0.201713.
    logprobs = torch.tensor([[2.0, 2.0, 0.5, 1.0]]).log()
    _, metrics = cispo_loss(
        logprobs, torch.zeros(1, 4), torch.tensor([[1.0, -1.0, 1.0, 1.0]]), torch.ones(1, 4), **CLIP
    )
    assert {name: metric.item() for name, metric in metrics.items()} == pytest.approx(
        {
            "clip_fraction": 0.75,
            "clip_fraction_low": 0.25,
            "clip_fraction_high": 0.5,
            "approx_kl": 0.201713,
            "ratio_mean": 1.375,
            "ratio_max": 2.0,
        },
        rel=1e-5,
    )


@pytest.mark.parametrize("clip", [{"clip_low": -0.1}, {"clip_high": math.nan}])
def test_misuse_is_refused(clip):
    row = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="must not be negative"):
        cispo_loss(row, row, row, torch.ones(1, 2), **CLIP | clip)
