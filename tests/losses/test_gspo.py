import math

import pytest
import torch

from rlhf_ray.losses import aggregate, gspo_loss
from rlhf_ray.losses.aggregation import MODES

CLIP = {"clip_low": 0.2, "clip_high": 0.3}
UNCLIPPED = {"clip_low": 1.0, "clip_high": math.inf}


def with_ratios(ratios, advantages, mask=None, **kwargs):
    """One row whose tokens have these ratios; returns loss, metrics and the gradient by logprobs."""
    logprobs = torch.tensor([ratios]).log().requires_grad_()
    advantages = torch.tensor([advantages])
    mask = torch.ones_like(advantages) if mask is None else torch.tensor([mask])
    loss, metrics = gspo_loss(logprobs, torch.zeros_like(advantages), advantages, mask, **{**CLIP, **kwargs})
    loss.backward()
    return loss.item(), {name: metric.item() for name, metric in metrics.items()}, logprobs.grad[0].tolist()


@pytest.mark.parametrize(
    ("ratios", "advantage", "expected", "gradient"),
    [
        # s is the root of the product; where unclipped the gradient is -s A / 2 at each token.
        ([4.0, 0.25], 2.0, -2.0, -1.0),  # s = 1, although both tokens are far outside the bounds
        ([2.0, 0.72], 2.0, -2.4, -1.2),  # s = 1.2
        ([2.0, 2.0], 2.0, -2.6, 0.0),  # -1.3 * 2
        ([0.5, 0.5], 2.0, -1.0, -0.5),  # min(1.0, 1.6): a good sequence may always be pulled up
        ([2.0, 2.0], -2.0, 4.0, 2.0),  # min(-4.0, -2.6): a bad sequence may always be pushed down
        ([0.5, 0.5], -2.0, 1.6, 0.0),  # 0.8 * 2
    ],
)
def test_each_side_of_the_clip_hand_computed(ratios, advantage, expected, gradient):
    loss, _, got = with_ratios(ratios, [advantage, advantage])
    assert loss == pytest.approx(expected, rel=1e-5)
    assert got == pytest.approx([gradient, gradient], rel=1e-5)


def test_masked_tokens_do_not_enter_the_ratio():
    # The root of 1.6 * 0.625 is 1: the third token, masked, would make it a cube root of 7.
    loss, metrics, gradient = with_ratios([1.6, 0.625, 7.0], [1.0, 1.0, 1.0], [1, 1, 0])
    assert loss == pytest.approx(-1.0)
    assert gradient == pytest.approx([-0.5, -0.5, 0.0])
    assert metrics["ratio_max"] == pytest.approx(1.0)


def test_advantages_may_differ_between_tokens():
    # s = 1.5 at both; the positive token is clipped at 1.3, the negative one is not.
    loss, _, gradient = with_ratios([3.0, 0.75], [1.0, -2.0])
    assert loss == pytest.approx((-1.3 + 3.0) / 2)
    assert gradient == pytest.approx([0.0, 1.5])


def random_batch():
    generator = torch.Generator().manual_seed(0)
    new, old, advantages = torch.randn(3, 6, 5, generator=generator, dtype=torch.float64).unbind(0)
    mask = torch.rand(6, 5, generator=generator) < 0.6
    mask[0], mask[1] = True, False
    return new.clone().requires_grad_(), old, advantages, mask


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("clip", [UNCLIPPED, CLIP])
def test_value_and_gradient_are_those_of_the_sequence_form(mode, clip):
    # The published sequence objective: s itself is differentiated, and each sequence has one advantage.
    new, old, advantages, mask = random_batch()
    advantages = advantages[:, :1].expand_as(new)
    loss, _ = gspo_loss(new, old, advantages, mask, aggregation=mode, **clip)
    lengths = mask.sum(1, keepdim=True).clamp(min=1)
    s = (((new - old) * mask).sum(1, keepdim=True) / lengths).exp()
    clipped = s.clamp(1 - clip["clip_low"], 1 + clip["clip_high"])
    objective = torch.minimum(s * advantages, clipped * advantages)
    sequence_loss = aggregate(-objective, mask, mode)
    torch.testing.assert_close(loss, sequence_loss)
    got, expected = (torch.autograd.grad(x, new)[0] for x in (loss, sequence_loss))
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(got, expected)


def test_unclipped_gradient_is_the_analytic_one_of_each_token():
    # Loss sum over t of -s_t A_t / (n R), R sequences of n tokens: gradient -s A_t / (n R) at token t.
    new, old, advantages, mask = random_batch()
    loss, _ = gspo_loss(new, old, advantages, mask, aggregation="seq_mean_token_mean", **UNCLIPPED)
    (gradient,) = torch.autograd.grad(loss, new)
    lengths = mask.sum(1, keepdim=True)
    s = (((new - old) * mask).sum(1, keepdim=True) / lengths.clamp(min=1)).exp()
    expected = -s * advantages * mask / lengths.clamp(min=1) / (lengths > 0).sum()
    torch.testing.assert_close(gradient, expected.detach())


def test_one_token_is_ppo():
    loss, metrics, gradient = with_ratios([1.5], [-2.0])
    assert loss == pytest.approx(3.0)
    assert gradient == pytest.approx([3.0])
    assert metrics["clip_fraction"] == 0.0


@pytest.mark.parametrize(
    ("mean_log_ratio", "advantage", "clipped"),
    [(3.5e-4, 1.0, 0.0), (4.5e-4, 1.0, 1.0), (4.5e-4, -1.0, 0.0), (-2.5e-4, -1.0, 0.0), (-3.5e-4, -1.0, 1.0)],
)
def test_tells_apart_what_lies_within_bounds_as_narrow_as_the_published(mean_log_ratio, advantage, clipped):
    # arXiv:2507.18071, section 5.1: 3e-4 below and 4e-4 above. Log-probabilities of -8 have a spacing of 1e-6 at most.
    old_logprobs = torch.full((1, 64), -8.0)
    logprobs = (old_logprobs + mean_log_ratio + 0.5 * torch.tensor([1.0, -1.0]).repeat(32)).requires_grad_()
    advantages, mask = torch.full((1, 64), advantage), torch.ones(1, 64)
    loss, metrics = gspo_loss(logprobs, old_logprobs, advantages, mask, clip_low=3e-4, clip_high=4e-4)
    loss.backward()
    assert metrics["clip_fraction"].item() == clipped
    # Every token has the same share: of the mean over 64, and of a ratio within 5e-4 of 1.
    assert logprobs.grad.flatten().tolist() == pytest.approx([-(1 - clipped) * advantage / 64] * 64, rel=1e-3)


def test_metrics_hand_computed():
    # Rows with s = 2 and 0.5, of 2 tokens and 1: the first clipped above, the second below.
    # k3 of each token, r - 1 - ln r: 4 -> 1.613706, 1 -> 0, 0.5 -> 0.193147; mean 0.602284.
    logprobs = torch.tensor([[4.0, 1.0], [0.5, 9.0]]).log()
    advantages, mask = torch.tensor([[1.0, 1.0], [-1.0, -1.0]]), torch.tensor([[1, 1], [1, 0]])
    _, metrics = gspo_loss(logprobs, torch.zeros(2, 2), advantages, mask, **CLIP)
    assert {name: metric.item() for name, metric in metrics.items()} == pytest.approx(
        {
            "clip_fraction": 1.0,
            "clip_fraction_low": 1 / 3,
            "clip_fraction_high": 2 / 3,
            "approx_kl": 0.602284,
            "ratio_mean": 1.5,
            "ratio_max": 2.0,
        },
        rel=1e-5,
    )


@pytest.mark.parametrize("difference", [math.inf, -math.inf])
@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_a_token_of_probability_zero_stays_finite(difference, advantage):
    logprobs = torch.tensor([[difference, 0.0]], requires_grad=True)
    loss, metrics = gspo_loss(logprobs, torch.zeros(1, 2), torch.full((1, 2), advantage), torch.ones(1, 2), **CLIP)
    loss.backward()
    assert math.isfinite(loss.item())
    assert torch.isfinite(logprobs.grad).all()
    assert math.isfinite(metrics["ratio_mean"].item())


@pytest.mark.parametrize("clip", [{"clip_low": -0.1}, {"clip_high": math.nan}])
def test_misuse_is_refused(clip):
    row = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="must not be negative"):
        gspo_loss(row, row, row, torch.ones(1, 2), **CLIP | clip)
