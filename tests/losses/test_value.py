import math

import pytest
import torch

from rlhf_ray.losses import value_loss


def one_token(value, old_value, target, clip):
    values = torch.tensor([[value]], requires_grad=True)
    loss, metrics = value_loss(
        values, torch.tensor([[old_value]]), torch.tensor([[target]]), torch.ones(1, 1), clip=clip
    )
    loss.backward()
    return loss.item(), values.grad.item(), metrics["value_clip_fraction"].item()


def test_half_the_mean_squared_error():
    # 1/2 * (1^2 + 2^2) / 2 = 1.25; gradient (v - R) / 2
    values = torch.tensor([[1.0, 2.0]], requires_grad=True)
    loss, metrics = value_loss(values, torch.zeros(1, 2), torch.tensor([[0.0, 4.0]]), torch.ones(1, 2))
    loss.backward()
    assert loss.item() == 1.25
    assert values.grad.tolist() == [[0.5, -1.0]]
    assert {name: metric.item() for name, metric in metrics.items()} == {
        "value_clip_fraction": 0.0,
        "value_mean": 1.5,
        "return_mean": 2.0,
    }


@pytest.mark.parametrize(
    ("value", "expected", "gradient", "fraction"),
    [
        # Old value 0, return 1, clip 0.5.
        (0.25, 0.28125, -0.75, 0.0),  # 1/2 * 0.75^2: within the range
        (0.75, 0.125, 0.0, 1.0),  # 1/2 * (0.5 - 1)^2: moved far enough toward the return
        (-0.75, 1.53125, -1.75, 0.0),  # 1/2 * 1.75^2, more than 1/2 * 1.5^2: moved the wrong way, is pulled back
        (2.0, 0.5, 1.0, 0.0),  # 1/2 * 1^2, more than 1/2 * 0.5^2: overshot, is pulled back
    ],
)
def test_clip_hand_computed(value, expected, gradient, fraction):
    assert one_token(value, 0.0, 1.0, 0.5) == pytest.approx((expected, gradient, fraction))


@pytest.mark.parametrize(
    ("value", "expected", "gradient", "fraction"),
    [
        # Old value 2, return 1, clip 0.5: the mirror image, seen from 2.
        (1.75, 0.28125, 0.75, 0.0),
        (1.25, 0.125, 0.0, 1.0),  # 1/2 * (1.5 - 1)^2
        (2.75, 1.53125, 1.75, 0.0),
        (0.0, 0.5, -1.0, 0.0),
    ],
)
def test_clip_toward_a_lower_return_hand_computed(value, expected, gradient, fraction):
    assert one_token(value, 2.0, 1.0, 0.5) == pytest.approx((expected, gradient, fraction))


def test_clip_out_of_reach_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    values, old_values, returns = torch.randn(3, 4, 5, generator=generator).unbind(0)
    mask = torch.ones(4, 5)
    free, _ = value_loss(values, old_values, returns, mask)
    assert torch.equal(value_loss(values, old_values, returns, mask, clip=100.0)[0], free)
    assert free.item() == pytest.approx(0.5 * torch.nn.functional.mse_loss(values, returns).item())


def test_clipped_loss_is_never_below_the_plain_one():
    generator = torch.Generator().manual_seed(1)
    values, old_values, returns = torch.randn(3, 40, 5, generator=generator).unbind(0)
    mask = torch.ones(40, 5)
    clipped, metrics = value_loss(values, old_values, returns, mask, clip=0.3)
    assert clipped > value_loss(values, old_values, returns, mask)[0]
    assert 0 < metrics["value_clip_fraction"] < 1


def test_first_step_has_the_full_gradient():
    # values = old_values, the two terms of the max are equal there.
    assert one_token(0.3, 0.3, 1.0, 0.2)[1] == pytest.approx(-0.7)


@pytest.mark.parametrize("clip", [0.0, -1.0, math.nan])
def test_clip_that_is_not_positive_is_refused(clip):
    row = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="clip = "):
        value_loss(row, row, row, torch.ones(1, 2), clip=clip)


@pytest.mark.parametrize(
    ("value", "expected", "gradient"),
    [
        (0.25, 0.28125, -0.75),  # 1/2 * 0.75^2: a small error is squared
        (0.0, 0.5, -1.0),  # 1/2 * 1^2, at the joint
        (-2.0, 2.5, -1.0),  # 1 * (3 - 1/2): the gradient is bounded
        (1e30, 1e30, 1.0),
    ],
)
def test_huber_hand_computed(value, expected, gradient):
    values = torch.tensor([[value]], requires_grad=True)
    loss, _ = value_loss(values, torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1), huber=1.0)
    loss.backward()
    assert loss.item() == pytest.approx(expected)
    assert values.grad.item() == gradient


@pytest.mark.parametrize(
    ("huber", "error", "expected", "gradient"),
    [
        # rlax (github.com/google-deepmind/rlax), clipping_test.py, HuberLossTest: values and derivatives at delta 1.
        (1.0, -2.0, 1.5, -1.0),
        (1.0, -1.0, 0.5, -1.0),
        (1.0, -0.5, 0.125, -0.5),
        (1.0, 0.0, 0.0, 0.0),
        (1.0, 0.5, 0.125, 0.5),
        (1.0, 1.0, 0.5, 1.0),
        (1.0, 2.0, 1.5, 1.0),
        # Other deltas, by hand: 0.5 * (3 - 0.25), 4 * (5 - 2), 1/2 * 3^2.
        (0.5, 3.0, 1.375, 0.5),
        (4.0, -5.0, 12.0, -4.0),
        (4.0, 3.0, 4.5, 3.0),
    ],
)
def test_huber_equals_published_numbers_and_scales_with_its_width(huber, error, expected, gradient):
    values = torch.tensor([[7.0 + error]], requires_grad=True)
    loss, _ = value_loss(values, torch.zeros(1, 1), torch.full((1, 1), 7.0), torch.ones(1, 1), huber=huber)
    loss.backward()
    assert (loss.item(), values.grad.item()) == (expected, gradient)


def test_huber_out_of_reach_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    values, old_values, returns = torch.randn(3, 4, 5, generator=generator).unbind(0)
    for clip in (None, 0.3):
        squared, _ = value_loss(values, old_values, returns, torch.ones(4, 5), clip=clip)
        huber, _ = value_loss(values, old_values, returns, torch.ones(4, 5), clip=clip, huber=100.0)
        torch.testing.assert_close(huber, squared)


def test_huber_and_clip_take_the_larger_of_two_linear_losses():
    # Old value 0, return 5, clip 0.5, huber 1. Value 2: errors 3 and 4.5, losses 2.5 and 4, the clipped one holds.
    # Value -2: errors 7 and 5.5, losses 6.5 and 5.
    for value, expected, gradient in ((2.0, 4.0, 0.0), (-2.0, 6.5, -1.0)):
        values = torch.tensor([[value]], requires_grad=True)
        loss, metrics = value_loss(
            values, torch.zeros(1, 1), torch.full((1, 1), 5.0), torch.ones(1, 1), clip=0.5, huber=1.0
        )
        loss.backward()
        assert (loss.item(), values.grad.item()) == (expected, gradient)
        assert metrics["value_clip_fraction"].item() == (gradient == 0.0)


@pytest.mark.parametrize("huber", [0.0, -1.0, math.nan])
def test_huber_that_is_not_positive_is_refused(huber):
    row = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="huber = "):
        value_loss(row, row, row, torch.ones(1, 2), huber=huber)
