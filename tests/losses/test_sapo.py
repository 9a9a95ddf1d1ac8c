import math

import pytest
import torch

from rlhf_ray.losses import ppo_loss, sapo_loss

TAU = {"temperature_positive": 1.0, "temperature_negative": 2.0}


def with_ratios(ratios, advantages, **kwargs):
    """One row whose tokens have these ratios; returns loss, metrics and the gradient by logprobs."""
    logprobs = torch.tensor([ratios]).log().requires_grad_()
    advantages = torch.tensor([advantages])
    mask = torch.ones_like(advantages)
    loss, metrics = sapo_loss(logprobs, torch.zeros_like(advantages), advantages, mask, **{**TAU, **kwargs})
    loss.backward()
    return loss.item(), {name: metric.item() for name, metric in metrics.items()}, logprobs.grad[0].tolist()


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "gradient"),
    [
        # p = sigmoid(tau (r - 1)); loss -4 / tau p A; gradient -4 p (1 - p) r A.
        (1.0, 3.0, -6.0, -3.0),  # p = 1/2, tau 1
        (1.0, -3.0, 3.0, 3.0),  # p = 1/2, tau 2
        (2.0, 3.0, -8.772703, -4.718686),  # p = sigmoid(1) = 0.7310586
        (2.0, -3.0, 5.284782, 2.519846),  # p = sigmoid(2) = 0.8807971
        (0.5, 3.0, -4.530488, -1.410023),  # p = sigmoid(-1/2) = 0.3775407
        (0.5, -3.0, 1.613648, 1.179671),  # p = sigmoid(-1) = 0.2689414
    ],
)
def test_hand_computed(ratio, advantage, expected, gradient):
    loss, _, got = with_ratios([ratio], [advantage])
    assert loss == pytest.approx(expected, rel=1e-5)
    assert got == pytest.approx([gradient], rel=1e-5)


def test_gradient_is_the_gated_policy_gradient():
    generator = torch.Generator().manual_seed(0)
    logprobs, old_logprobs, advantages = torch.randn(3, 8, 9, generator=generator, dtype=torch.float64).unbind(0)
    logprobs.requires_grad_()
    loss, metrics = sapo_loss(logprobs, old_logprobs, advantages, torch.ones(8, 9), **TAU)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    ratio = (logprobs - old_logprobs).exp().detach()
    # 4 p (1 - p) is sech^2 of half the argument of the sigmoid.
    tau = 1.0 + (advantages < 0)
    gate = torch.cosh(tau * (ratio - 1) / 2) ** -2
    torch.testing.assert_close(gradient, -gate * ratio * advantages / 72)
    torch.testing.assert_close(metrics["gate_mean"], gate.mean())
    assert (gradient[ratio < 9] != 0).all()


def test_a_wide_gate_is_ppo_without_a_clip():
    # 4 / tau * sigmoid(tau (r - 1)) -> 2 / tau + (r - 1): the same gradient, and a value that differs by a constant.
    generator = torch.Generator().manual_seed(1)
    logprobs, old_logprobs, advantages = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64).unbind(0)
    logprobs.requires_grad_()
    arguments = logprobs, old_logprobs, advantages, torch.ones(4, 5)
    wide, _ = sapo_loss(*arguments, temperature_positive=1e-4, temperature_negative=1e-4)
    plain, _ = ppo_loss(*arguments, clip_low=1.0, clip_high=math.inf)
    gradients = [torch.autograd.grad(loss, logprobs)[0] for loss in (wide, plain)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=0)


def test_a_narrower_gate_holds_back_more():
    gates = [with_ratios([1.5], [1.0], temperature_positive=tau)[1]["gate_mean"] for tau in (0.1, 1.0, 3.0, 10.0)]
    assert gates == sorted(gates, reverse=True)
    assert 0 < gates[-1] < gates[0] < 1


def test_temperatures_are_separate():
    for advantage, used in ((1.0, "temperature_positive"), (-1.0, "temperature_negative")):
        base = with_ratios([1.5], [advantage])
        assert with_ratios([1.5], [advantage], **{used: 5.0}) != base
        (other,) = TAU.keys() - {used}
        assert with_ratios([1.5], [advantage], **{other: 5.0}) == base


def test_metrics_hand_computed():
    # Ratios 2 and 1 with A = 1: gates 4 * 0.7310586 * 0.2689414 = 0.786448 and 1. k3: 0.306853 and 0.
    _, metrics, _ = with_ratios([2.0, 1.0], [1.0, 1.0])
    assert metrics == pytest.approx(
        {"approx_kl": 0.153426, "ratio_mean": 1.5, "ratio_max": 2.0, "gate_mean": 0.893224}, rel=1e-5
    )


@pytest.mark.parametrize("name", TAU)
@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_that_is_not_positive_is_refused(name, temperature):
    row = torch.zeros(1, 2)
    with pytest.raises(ValueError, match=f"{name} = {temperature}.*must be positive"):
        sapo_loss(row, row, row, torch.ones(1, 2), **TAU | {name: temperature})
