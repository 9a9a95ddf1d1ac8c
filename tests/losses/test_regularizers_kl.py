import math
from pathlib import Path

import pytest
import torch

from rlhf_ray.advantages import kl
from rlhf_ray.losses import kl_loss

REFERENCE = torch.tensor([0.25, 0.125, 0.625], dtype=torch.float64)


def policy_logits():
    # Probabilities 1/2, 1/4, 1/4: the samples 0, 0, 1, 2 are then exactly an expectation under the policy.
    return torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64).log().requires_grad_()


def expected_gradient(estimator):
    """Gradient by the logits of the mean loss over samples in exact proportion to the policy."""
    logits, samples = policy_logits(), torch.tensor([[0], [0], [1], [2]])
    logprobs = torch.log_softmax(logits, dim=0)[samples]
    loss, _ = kl_loss(logprobs, REFERENCE.log()[samples], torch.ones(4, 1), estimator=estimator)
    return torch.autograd.grad(loss, logits)[0]


def gradient_of(divergence):
    logits = policy_logits()
    return torch.autograd.grad(divergence(torch.softmax(logits, dim=0)), logits)[0]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_expected_gradient_is_that_of_the_kl(estimator):
    exact = gradient_of(lambda policy: (policy * (policy / REFERENCE).log()).sum())
    assert exact.abs().max() > 0.1
    torch.testing.assert_close(expected_gradient(estimator), exact)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_gradient_summed_over_the_vocabulary_is_that_of_the_kl(estimator):
    # Every token of a random distribution, weighted by its probability: 1 / probability is its normalizer.
    generator = torch.Generator().manual_seed(0)
    logits, reference = torch.randn(2, 11, generator=generator, dtype=torch.float64).unbind(0)
    logits, reference = logits.clone().requires_grad_(), torch.log_softmax(reference, dim=0)
    logprobs = torch.log_softmax(logits, dim=0)
    expectation = sum(
        kl_loss(
            logprobs[token].view(1, 1),
            reference[token].view(1, 1),
            torch.ones(1, 1),
            estimator=estimator,
            normalizer=1 / logprobs[token].exp().item(),
        )[0]
        for token in range(11)
    )
    divergence = (logprobs.exp() * (logprobs - reference)).sum()
    gradients = [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (expectation, divergence)]
    torch.testing.assert_close(*gradients)
    assert gradients[1].abs().max() > 0.01
    if estimator != "k2":  # whose value is biased
        torch.testing.assert_close(expectation, divergence)


def test_expected_gradient_of_abs_is_that_of_the_l1_distance():
    torch.testing.assert_close(expected_gradient("abs"), gradient_of(lambda policy: (policy - REFERENCE).abs().sum()))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_value_is_the_estimators(estimator):
    generator = torch.Generator().manual_seed(0)
    logprobs, ref_logprobs = -3 * torch.rand(2, 5, 6, generator=generator)
    mask = torch.rand(5, 6, generator=generator) < 0.6
    loss, metrics = kl_loss(logprobs, ref_logprobs, mask, estimator=estimator)
    expected = kl(logprobs, ref_logprobs, estimator=estimator)[mask].mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(metrics["kl"], expected)


def test_hand_computed():
    # d = ln 0.5 - ln 0.25 = 0.693147 and -0.693147. Mean of k3: (0.193147 + 0.306853) / 2 = 0.25.
    # Gradient of k2's mean: d / 2.
    logprobs = torch.tensor([[0.5, 0.25]]).log().requires_grad_()
    loss, _ = kl_loss(logprobs, torch.tensor([[0.25, 0.5]]).log(), torch.ones(1, 2), estimator="k3")
    loss.backward()
    assert loss.item() == pytest.approx(0.25, rel=1e-5)
    assert logprobs.grad[0].tolist() == pytest.approx([0.346574, -0.346574], rel=1e-5)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_gradient_at_each_token_is_that_of_k2_whatever_the_value(estimator):
    # d = ln 4, 0 and -ln 2 over three tokens, and one masked: gradient d / 3. That of k1 itself would be 1 / 3 at each,
    # that of k3 (1 - exp(-d)) / 3 = 0.25, 0 and -1 / 3.
    logprobs = torch.tensor([[0.8, 0.5, 0.25, math.nan]]).log().requires_grad_()
    reference = torch.tensor([[0.2, 0.5, 0.5, 0.9]]).log().requires_grad_()
    loss, _ = kl_loss(logprobs, reference, torch.tensor([[1, 1, 1, 0]]), estimator=estimator)
    loss.backward()
    assert logprobs.grad[0].tolist() == pytest.approx([math.log(4) / 3, 0.0, -math.log(2) / 3, 0.0])
    assert reference.grad is None


def test_gradient_of_abs_at_each_token_is_the_sign():
    logprobs = torch.tensor([[0.8, 0.5, 0.25]]).log().requires_grad_()
    loss, _ = kl_loss(logprobs, torch.tensor([[0.2, 0.5, 0.5]]).log(), torch.ones(1, 3), estimator="abs")
    loss.backward()
    assert loss.item() == pytest.approx((math.log(4) + math.log(2)) / 3)
    assert logprobs.grad[0].tolist() == pytest.approx([1 / 3, 0.0, -1 / 3])


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_zero_loss_and_gradient_at_the_reference(estimator):
    logprobs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    loss, _ = kl_loss(logprobs, logprobs.detach().clone(), torch.ones(1, 2), estimator=estimator)
    loss.backward()
    assert loss.item() == 0.0
    assert logprobs.grad.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
@pytest.mark.parametrize("difference", [1e4, -1e4])
def test_huge_difference_stays_finite(estimator, difference):
    logprobs = torch.tensor([[difference]], requires_grad=True)
    loss, _ = kl_loss(logprobs, torch.zeros(1, 1), torch.ones(1, 1), estimator=estimator)
    loss.backward()
    assert math.isfinite(loss.item())
    assert math.isfinite(logprobs.grad.item())
    assert logprobs.grad.item() * difference > 0


def test_unknown_estimator_is_refused():
    row = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="unknown KL estimator"):
        kl_loss(row, row, row, estimator="forward")


def test_the_table_of_the_grpo_page():
    page = (Path(__file__).parents[2] / "docs/algorithms/grpo.md").read_text()
    table = page.partition("<!-- k3 gradient -->")[2].partition("<!-- /k3 gradient -->")[0]
    rows = [[float(cell) for cell in line.strip("| ").split("|")] for line in table.strip().splitlines()[2:]]
    assert len(rows) == 5
    reference, mask = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1)
    for d, value, original, ours in rows:
        for result, factor in (
            (lambda x: kl(x, reference, estimator="k3").sum(), original),
            (lambda x: kl_loss(x, reference, mask, estimator="k3")[0], ours),
        ):
            logprobs = torch.tensor([[d]], dtype=torch.float64, requires_grad=True)
            result(logprobs).backward()
            assert result(logprobs).item() == pytest.approx(value, abs=5e-5)
            assert logprobs.grad.item() == pytest.approx(factor, abs=5e-5)


def test_the_two_directions_of_the_grpo_page():
    logit = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    logprobs = torch.log_softmax(torch.cat([logit, torch.zeros(1)]), dim=0)
    policy, reference = logprobs.exp(), torch.tensor([0.9, 0.1], dtype=torch.float64)

    def derivative(x):
        return torch.autograd.grad(x, logit, retain_graph=True)[0].item()

    def expectation(of_tokens):
        return (policy.detach() * of_tokens).sum()

    mask = torch.ones(1, 2)
    ours = 2 * kl_loss(logprobs[None], reference.log()[None], mask, estimator="k3")[0]  # Two tokens of weight 1/2.
    original = expectation(kl(logprobs, reference.log(), estimator="k3"))
    forward = (policy * (logprobs - reference.log())).sum()
    backward = (reference * (reference.log() - logprobs)).sum()
    assert derivative(ours) / 2 == pytest.approx(derivative(forward), abs=1e-12) == pytest.approx(-0.5493, abs=5e-5)
    assert derivative(original) == pytest.approx(derivative(backward), abs=1e-12) == pytest.approx(-0.4, abs=1e-12)
