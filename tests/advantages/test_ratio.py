import math

import pytest
import torch

from rlhf_ray.advantages.ratio import MAX_LOG_RATIO, log_difference, probability_ratio


def test_hand_computed():
    # 0.75 / 0.5 = 1.5 and 0.25 / 0.5 = 0.5
    new, old = torch.tensor([0.75, 0.25]).log(), torch.tensor([0.5, 0.5]).log()
    torch.testing.assert_close(probability_ratio(new, old), torch.tensor([1.5, 0.5]))


def test_difference_is_finite_from_above_only():
    differences = torch.tensor([-math.inf, -0.5, 19.0, math.inf])
    assert log_difference(differences, torch.zeros(4)).tolist() == pytest.approx([-math.inf, -0.5, 19.0, 1e30])


def test_equal_logprobs_give_exactly_one():
    logprobs = -torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 30
    assert (log_difference(logprobs, logprobs.clone()) == 0.0).all()
    assert (probability_ratio(logprobs, logprobs.clone()) == 1.0).all()


@pytest.mark.parametrize("difference", [21.0, 1e4, math.inf])
def test_huge_difference_is_bounded_in_value_and_gradient(difference):
    logprobs = torch.tensor([difference], requires_grad=True)
    ratio = probability_ratio(logprobs, torch.zeros(1))
    ratio.sum().backward()
    assert ratio.item() == pytest.approx(math.exp(MAX_LOG_RATIO), rel=1e-5)
    assert logprobs.grad.item() == 0.0


@pytest.mark.parametrize("difference", [-200.0, -1e4, -math.inf])
def test_vanishing_ratio_has_vanishing_gradient(difference):
    logprobs = torch.tensor([difference], requires_grad=True)
    ratio = probability_ratio(logprobs, torch.zeros(1))
    ratio.sum().backward()
    assert ratio.item() == 0.0
    assert logprobs.grad.item() == 0.0


def test_half_precision_is_widened_before_it_is_subtracted():
    for dtype in (torch.float16, torch.bfloat16):
        ratio = probability_ratio(torch.tensor([25.0, 5.0], dtype=dtype), torch.zeros(2, dtype=dtype))
        assert ratio.dtype == torch.float32
        assert ratio.tolist() == pytest.approx([math.exp(MAX_LOG_RATIO), math.exp(5.0)], rel=1e-5)
