import math

import pytest
import torch

from rlhf_ray.losses import gmpo_loss, gspo_loss
from rlhf_ray.losses.aggregation import MODES

CLIP = {"clip_low": math.log(2), "clip_high": math.log(4)}  # ratios from 1/2 to 4
UNCLIPPED = {"clip_low": math.inf, "clip_high": math.inf}


def with_ratios(ratios, advantages, mask=None, **kwargs):
    """One row whose tokens have these ratios; returns loss, metrics and the gradient by logprobs."""
    logprobs = torch.tensor([ratios]).log().requires_grad_()
    advantages = torch.tensor([advantages])
    mask = torch.ones_like(advantages) if mask is None else torch.tensor([mask])
    loss, metrics = gmpo_loss(logprobs, torch.zeros_like(advantages), advantages, mask, **{**CLIP, **kwargs})
    loss.backward()
    return loss.item(), {name: metric.item() for name, metric in metrics.items()}, logprobs.grad[0].tolist()


@pytest.mark.parametrize(
    ("ratios", "advantage", "expected", "gradient"),
    [
        # The root of the product of the clipped ratios, times -A; the gradient of an unclipped token is half of it.
        ([2.0, 0.5], 3.0, -3.0, [-1.5, -1.5]),
        ([9.0, 1.0], 3.0, -6.0, [0.0, -3.0]),  # 9 -> 4: one token loses its gradient, not the sequence
        ([9.0, 16.0], 3.0, -12.0, [0.0, 0.0]),
        ([0.04, 1.0], 3.0, -0.6, [-0.3, -0.3]),  # a good token may always be pulled up
        ([9.0, 1.0], -3.0, 9.0, [4.5, 4.5]),  # a bad token may always be pushed down
        ([0.125, 2.0], -3.0, 3.0, [0.0, 1.5]),  # 0.125 -> 0.5
    ],
)
def test_each_side_of_the_clip_hand_computed(ratios, advantage, expected, gradient):
    loss, _, got = with_ratios(ratios, [advantage, advantage])
    assert loss == pytest.approx(expected, rel=1e-5)
    assert got == pytest.approx(gradient, rel=1e-5)


def test_masked_tokens_do_not_enter_the_mean():
    loss, _, gradient = with_ratios([2.0, 0.5, 3.0], [1.0, 1.0, 1.0], [1, 1, 0])
    assert loss == pytest.approx(-1.0)
    assert gradient == pytest.approx([-0.5, -0.5, 0.0])


def test_advantages_may_differ_between_tokens():
    # 9 -> 4 at the positive token, 0.125 -> 0.5 at the negative one: root of 4 * 0.5 * 0.5 * 1 over four tokens = 1.
    loss, _, gradient = with_ratios([9.0, 0.125, 0.5, 1.0], [4.0, -2.0, 1.0, 1.0])
    assert loss == pytest.approx(-1.0)
    assert gradient == pytest.approx([0.0, 0.0, -0.25, -0.25])


def random_batch():
    generator = torch.Generator().manual_seed(0)
    new, old, advantages = torch.randn(3, 6, 5, generator=generator, dtype=torch.float64).unbind(0)
    mask = torch.rand(6, 5, generator=generator) < 0.6
    mask[0], mask[1] = True, False
    return new.clone().requires_grad_(), old, advantages, mask


def test_equals_the_published_objective():
    # One advantage a sequence: the signed geometric mean of |min(r A, clip(r) A)| over its tokens.
    new, old, advantages, mask = random_batch()
    advantages = advantages[:, :1].expand_as(new)
    loss, _ = gmpo_loss(new, old, advantages, mask, aggregation="seq_mean_token_mean", **CLIP)
    objectives = []
    for row in range(6):
        if mask[row].any():
            ratio, advantage = (new - old)[row, mask[row]].exp(), advantages[row, 0]
            terms = torch.minimum(ratio * advantage, ratio.clamp(0.5, 4.0) * advantage)
            objectives.append(advantage.sign() * terms.abs().prod() ** (1 / mask[row].sum()))
    published = -torch.stack(objectives).mean()
    torch.testing.assert_close(loss, published)
    gradients = [torch.autograd.grad(x, new)[0] for x in (loss, published)]
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().max() > 1e-3


def test_gradient_is_the_analytic_one():
    new, old, advantages, mask = random_batch()
    loss, _ = gmpo_loss(new, old, advantages, mask, **CLIP)
    (gradient,) = torch.autograd.grad(loss, new)
    d = (new - old).detach()
    clipped = torch.where(advantages >= 0, d.clamp(max=math.log(4)), d.clamp(min=-math.log(2)))
    lengths = mask.sum(1, keepdim=True).clamp(min=1)
    mean = ((clipped * mask).sum(1, keepdim=True) / lengths).exp()
    expected = -(advantages * mask).sum(1, keepdim=True) / lengths * mean * (mask & (clipped == d)) / mask.sum()
    torch.testing.assert_close(gradient, expected)
    assert ((clipped != d) & mask).any()


@pytest.mark.parametrize("mode", MODES)
def test_without_a_clip_it_is_gspo(mode):
    new, old, advantages, mask = random_batch()
    advantages = advantages[:, :1].expand_as(new)
    losses = [
        gmpo_loss(new, old, advantages, mask, aggregation=mode, **UNCLIPPED)[0],
        gspo_loss(new, old, advantages, mask, aggregation=mode, clip_low=1.0, clip_high=math.inf)[0],
    ]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*[torch.autograd.grad(loss, new)[0] for loss in losses])


@pytest.mark.parametrize("ratio", [0.5, 0.6702, 0.6704, 1.0, 1.4917, 1.4919, 3.0])
@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_one_token_is_ppo_with_the_published_bounds(ratio, advantage):
    # arXiv:2507.20673 clips at e^-0.4 = 0.67032 and e^0.4 = 1.49182.
    loss, metrics, gradient = with_ratios([ratio], [advantage], clip_low=0.4, clip_high=0.4)
    held = (advantage > 0 and ratio > 1.49182) or (advantage < 0 and ratio < 0.67032)
    bounded = min(max(ratio, 0.67032), 1.49182) if held else ratio
    assert loss == pytest.approx(-bounded * advantage, rel=1e-5)
    assert gradient == pytest.approx([0.0 if held else -ratio * advantage], rel=1e-5)
    assert metrics["clip_fraction"] == held


def test_metrics_are_of_tokens_before_the_clip():
    # Ratios 8, 1, 0.25, 0.25 with A = 1, 1, 1, -1: clipped are the first, above, and the last, below.
    # k3, r - 1 - ln r: 4.920558, 0, 0.636294 twice; mean 1.548287.
    _, metrics, _ = with_ratios([8.0, 1.0, 0.25, 0.25], [1.0, 1.0, 1.0, -1.0])
    assert metrics == pytest.approx(
        {
            "clip_fraction": 0.5,
            "clip_fraction_low": 0.25,
            "clip_fraction_high": 0.25,
            "approx_kl": 1.548287,
            "ratio_mean": 2.375,
            "ratio_max": 8.0,
        },
        rel=1e-5,
    )


@pytest.mark.parametrize("difference", [math.inf, -math.inf])
@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_a_token_of_probability_zero_stays_finite(difference, advantage):
    logprobs = torch.tensor([[difference, 0.0]], requires_grad=True)
    loss, _ = gmpo_loss(logprobs, torch.zeros(1, 2), torch.full((1, 2), advantage), torch.ones(1, 2), **CLIP)
    loss.backward()
    assert math.isfinite(loss.item())
    assert torch.isfinite(logprobs.grad).all()


@pytest.mark.parametrize("clip", [{"clip_low": -0.1}, {"clip_high": math.nan}])
def test_misuse_is_refused(clip):
    row = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="must not be negative"):
        gmpo_loss(row, row, row, torch.ones(1, 2), **CLIP | clip)
