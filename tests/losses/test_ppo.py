import math

import pytest
import torch

from rlhf_ray.losses import ppo_loss

CLIP = {"clip_low": 0.2, "clip_high": 0.3}
METRICS = {"approx_kl", "clip_fraction", "clip_fraction_high", "clip_fraction_low", "ratio_max", "ratio_mean"}


def with_ratios(ratios, advantages, **kwargs):
    """One row whose tokens have these ratios; returns loss, metrics and the gradient by logprobs."""
    logprobs = torch.tensor([ratios]).log().requires_grad_()
    advantages = torch.tensor([advantages])
    mask = torch.ones_like(advantages)
    loss, metrics = ppo_loss(logprobs, torch.zeros_like(advantages), advantages, mask, **{**CLIP, **kwargs})
    loss.backward()
    return loss.item(), {name: metric.item() for name, metric in metrics.items()}, logprobs.grad[0].tolist()


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "gradient"),
    [
        # -min(r A, clip(r, 0.8, 1.3) A); where unclipped the gradient by the log-probability is -r A.
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 2.0, -2.6, 0.0),  # -1.3 * 2
        (0.5, 2.0, -1.0, -1.0),  # min(1.0, 1.6): a good token may always be pulled up
        (1.1, -2.0, 2.2, 2.2),
        (1.5, -2.0, 3.0, 3.0),  # min(-3.0, -2.6): a bad token may always be pushed down
        (0.5, -2.0, 1.6, 0.0),  # 0.8 * 2
        (1.5, 0.0, 0.0, 0.0),
    ],
)
def test_each_side_of_the_clip_hand_computed(ratio, advantage, expected, gradient):
    loss, _, got = with_ratios([ratio], [advantage])
    assert loss == pytest.approx(expected, rel=1e-6)
    assert got == pytest.approx([gradient], rel=1e-6)


def test_equals_the_published_equation():
    generator = torch.Generator().manual_seed(0)
    new, old, advantages = torch.randn(3, 20, 30, generator=generator, dtype=torch.float64).unbind(0)
    ratio = (new - old).exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.3) * advantages)
    loss, _ = ppo_loss(new, old, advantages, torch.ones(20, 30), **CLIP)
    torch.testing.assert_close(loss, -surrogate.mean())
    dual = torch.where(advantages < 0, torch.maximum(surrogate, 2.5 * advantages), surrogate)
    loss, _ = ppo_loss(new, old, advantages, torch.ones(20, 30), **CLIP, dual_clip=2.5)
    torch.testing.assert_close(loss, -dual.mean())


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "gradient"),
    [
        (5.0, -2.0, 6.0, 0.0),  # -dual_clip * A = 3 * 2, less than 5 * 2
        (2.0, -2.0, 4.0, 4.0),  # below the bound: as without
        (0.5, -2.0, 1.6, 0.0),  # the lower clip still holds
        (5.0, 2.0, -2.6, 0.0),  # positive advantages are not concerned
    ],
)
def test_dual_clip_bounds_the_loss_of_bad_tokens(ratio, advantage, expected, gradient):
    loss, _, got = with_ratios([ratio], [advantage], dual_clip=3.0)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert got == pytest.approx([gradient], rel=1e-6)


def test_equals_published_numbers_of_the_dual_clip():
    # SkyRL (github.com/NovaSky-AI/SkyRL), test_losses.py, test_policy_loss_dual_clip, adapted there from NeMo-RL:
    # ratios 0.5, 1 and 10, losses -0.5, 1 and 3 * 4, their mean 4.1667.
    logprobs, old_logprobs = torch.tensor([[-1.69315, -1.0, -0.69741]]), torch.tensor([[-1.0, -1.0, -3.0]])
    advantages = torch.tensor([[1.0, -1.0, -4.0]])
    loss, _ = ppo_loss(logprobs, old_logprobs, advantages, torch.ones(1, 3), clip_low=0.2, clip_high=0.2, dual_clip=3.0)
    assert loss.item() == pytest.approx(4.1667, abs=1e-4)


def test_ratio_one_gives_the_policy_gradient():
    # At logprobs = old_logprobs the loss is -mean(A) and its gradient -A / n, whatever the clip, 0 included.
    advantages = torch.tensor([[0.5, -1.5, 3.0, -0.25]])
    for clip in (0.0, 0.2):
        logprobs = torch.tensor([[-0.3, -2.0, -11.0, 0.0]], requires_grad=True)
        loss, metrics = ppo_loss(
            logprobs, logprobs.detach().clone(), advantages, torch.ones(1, 4), clip_low=clip, clip_high=clip
        )
        loss.backward()
        assert loss.item() == pytest.approx(-advantages.mean().item())
        torch.testing.assert_close(logprobs.grad, -advantages / 4)
        assert {name: metric.item() for name, metric in metrics.items()} == {
            **dict.fromkeys(METRICS, 0.0),
            "ratio_mean": 1.0,
            "ratio_max": 1.0,
        }


def test_metrics_hand_computed():
    # Ratios 2, 0.5, 1, 0.5 with A = 1, -1, -1, 1: only the first is clipped above, only the second below.
    # k3 of old -> new is r - 1 - ln r: 0.306853, 0.193147, 0, 0.193147; mean 0.173287.
    _, metrics, _ = with_ratios([2.0, 0.5, 1.0, 0.5], [1.0, -1.0, -1.0, 1.0])
    assert metrics == pytest.approx(
        {
            "clip_fraction": 0.5,
            "clip_fraction_low": 0.25,
            "clip_fraction_high": 0.25,
            "approx_kl": 0.173287,
            "ratio_mean": 1.0,
            "ratio_max": 2.0,
        },
        rel=1e-5,
    )


def test_clip_bounds_are_separate():
    # Within (1 - 0.2, 1 + 0.5) for 1.4, outside (1 - 0.2, 1 + 0.3).
    assert with_ratios([1.4], [1.0], clip_high=0.5)[1]["clip_fraction_high"] == 0.0
    assert with_ratios([1.4], [1.0])[1]["clip_fraction_high"] == 1.0
    assert with_ratios([0.7], [-1.0], clip_low=0.4)[1]["clip_fraction_low"] == 0.0
    assert with_ratios([0.7], [-1.0])[1]["clip_fraction_low"] == 1.0


def test_behavior_weights_scale_loss_and_gradient_of_each_token():
    # Unclipped ratios 1: loss (-1 * 0.5 + 2 * 3) / 2 = 2.75, gradient -A * w / 2.
    loss, _, gradient = with_ratios([1.0, 1.0], [1.0, -2.0], behavior_weights=torch.tensor([[0.5, 3.0]]))
    assert loss == pytest.approx(2.75)
    assert gradient == pytest.approx([-0.25, 3.0])


@pytest.mark.parametrize("difference", [100.0, 1e30, math.inf, -100.0, -1e30, -math.inf])
@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_huge_log_ratio_stays_finite(difference, advantage):
    logprobs = torch.tensor([[difference, 0.0]], requires_grad=True)
    loss, _ = ppo_loss(logprobs, torch.zeros(1, 2), torch.full((1, 2), advantage), torch.ones(1, 2), **CLIP)
    loss.backward()
    assert math.isfinite(loss.item())
    assert logprobs.grad[0].tolist() == pytest.approx([0.0, -advantage / 2], abs=1e-30)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"clip_low": -0.1}, "clip_low = -0.1"),
        ({"clip_high": math.nan}, "clip_high = nan"),
        ({"dual_clip": 1.0}, "dual_clip = 1.0: must be greater than 1"),
        ({"behavior_weights": torch.ones(1)}, r"behavior_weights \(1,\)"),
    ],
)
def test_misuse_is_refused(kwargs, message):
    row = torch.zeros(1, 2)
    with pytest.raises(ValueError, match=message):
        ppo_loss(row, row, row, torch.ones(1, 2), **{**CLIP, **kwargs})
