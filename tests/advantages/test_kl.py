import math

import numpy as np
import pytest
import torch

from rlhf_ray.advantages import kl
from rlhf_ray.advantages.ratio import MAX_LOG_RATIO

POLICY = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
REFERENCE = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)


def random_logprobs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(-3 * torch.rand(4, 50, generator=generator) for _ in range(2))


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        # d = ln 0.5 - ln 0.25 = ln 2 = 0.693147, and d = ln 0.25 - ln 0.5 = -ln 2
        ("k1", [0.693147, -0.693147]),
        # d^2 / 2 = 0.480453 / 2
        ("k2", [0.240227, 0.240227]),
        # exp(-d) - 1 + d: 0.5 - 1 + 0.693147, and 2 - 1 - 0.693147
        ("k3", [0.193147, 0.306853]),
        ("abs", [0.693147, 0.693147]),
    ],
)
def test_hand_computed(estimator, expected):
    policy, reference = torch.tensor([0.5, 0.25]).log(), torch.tensor([0.25, 0.5]).log()
    got = kl(policy, reference, estimator=estimator)
    torch.testing.assert_close(got, torch.tensor(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_unbiased_on_a_categorical_distribution(estimator):
    # The expectation under the policy is a finite sum here, so this is exact.
    estimates = kl(POLICY.log(), REFERENCE.log(), estimator=estimator)
    exact = sum(p * math.log(p / q) for p, q in zip(POLICY.tolist(), REFERENCE.tolist(), strict=True))
    assert (POLICY * estimates).sum().item() == pytest.approx(exact, rel=1e-12)


def test_k2_is_biased_on_the_same_distribution():
    # So that the test above could fail: k2's expectation, 0.3553, is not the KL, 0.3601.
    expectation = (POLICY * kl(POLICY.log(), REFERENCE.log(), estimator="k2")).sum().item()
    exact = (POLICY * (POLICY / REFERENCE).log()).sum().item()
    assert abs(expectation - exact) > 1e-3


@pytest.mark.parametrize(
    ("shift", "estimator", "bias", "spread"),
    [
        (0.1, "k1", 0.0, 20.0),
        (0.1, "k2", 0.002, 1.42),
        (0.1, "k3", 0.0, 1.42),
        (1.0, "k1", 0.0, 2.0),
        (1.0, "k2", 0.25, 1.73),
        (1.0, "k3", 0.0, 1.7),
    ],
)
def test_equals_the_published_bias_and_spread(shift, estimator, bias, spread):
    # joschu.net/blog/kl-approx.html, its two tables: samples of N(0, 1), a reference N(shift, 1), bias and standard
    # deviation as shares of the KL, shift^2 / 2. Sums over Gauss-Hermite nodes stand for the expectations.
    nodes, weights = (torch.from_numpy(x) for x in np.polynomial.hermite_e.hermegauss(80))
    weights = weights / weights.sum()
    estimates = kl(-nodes.square() / 2, -(nodes - shift).square() / 2, estimator=estimator)
    mean = (weights * estimates).sum().item()
    deviation = math.sqrt((weights * (estimates - mean).square()).sum().item())
    exact = shift**2 / 2
    # The tables round: to the last digit that they give.
    assert mean / exact - 1 == pytest.approx(bias, abs=1e-3)
    assert deviation / exact == pytest.approx(spread, abs=0.02)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_garbage_stays_at_its_own_token(estimator):
    logprobs, ref_logprobs = random_logprobs()
    dirty = logprobs.clone()
    dirty[1, 2], dirty[3, 4] = math.nan, 1e9
    kept = torch.ones_like(logprobs, dtype=torch.bool)
    kept[1, 2] = kept[3, 4] = False
    clean = kl(logprobs, ref_logprobs, estimator=estimator)
    assert torch.equal(kl(dirty, ref_logprobs, estimator=estimator)[kept], clean[kept])


def test_relations_between_the_estimators():
    logprobs, ref_logprobs = random_logprobs()
    k1, k2, k3, distance = (kl(logprobs, ref_logprobs, estimator=name) for name in ("k1", "k2", "k3", "abs"))
    torch.testing.assert_close(k2, k1.square() / 2)
    torch.testing.assert_close(distance, k1.abs())
    torch.testing.assert_close(k3 - k1, (-k1).exp() - 1, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(kl(ref_logprobs, logprobs, estimator="k1"), -k1)
    assert (k3 >= 0).all()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_zero_where_the_policies_agree(estimator):
    logprobs, _ = random_logprobs()
    assert (kl(logprobs, logprobs.clone(), estimator=estimator) == 0).all()


def test_k3_keeps_its_digits_near_zero():
    # k3 is d^2 / 2 to first order: 5e-9 at d = 1e-4, where exp(-d) - 1 + d in float32 would be off by 1e-8.
    difference = torch.tensor([1e-4, -1e-4])
    torch.testing.assert_close(
        kl(difference, torch.zeros(2), estimator="k3"), torch.full((2,), 5e-9), rtol=1e-2, atol=0
    )


def test_k3_is_never_negative_in_float32():
    differences = torch.cat([torch.logspace(-12, 1, 4000), -torch.logspace(-12, 1, 4000)])
    assert (kl(differences, torch.zeros_like(differences), estimator="k3") >= 0).all()


@pytest.mark.parametrize("difference", [25.0, 1e4, math.inf])
def test_k3_is_bounded_where_the_reference_is_far_likelier(difference):
    logprobs = torch.tensor([-difference], requires_grad=True)
    estimate = kl(logprobs, torch.zeros(1), estimator="k3")
    estimate.sum().backward()
    assert estimate.item() == pytest.approx(math.exp(MAX_LOG_RATIO) - 1 - MAX_LOG_RATIO, rel=1e-5)
    assert logprobs.grad.item() == 0.0


def test_k3_is_exact_where_the_policy_is_far_likelier():
    # exp(-1000) - 1 + 1000
    assert kl(torch.tensor([0.0]), torch.tensor([-1000.0]), estimator="k3").item() == 999.0


def test_unknown_estimator_and_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="unknown KL estimator 'k4'; use k1, k2, k3 or abs"):
        kl(torch.zeros(1), torch.zeros(1), estimator="k4")
    with pytest.raises(ValueError, match=r"logprobs \(2,\), ref_logprobs \(1,\)"):
        kl(torch.zeros(2), torch.zeros(1), estimator="k1")
