import math

import pytest
import torch

from rlhf_ray.losses import token_entropy, token_logprobs, token_logprobs_and_entropy


def random_logits(scale=3.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(4, 5, 50, generator=generator)
    return logits.to(dtype), torch.randint(50, (4, 5), generator=generator)


def test_hand_computed():
    # softmax(ln 1, ln 1, ln 2) = 1/4, 1/4, 1/2: ln(1/2) = -0.693147; entropy 2 * ln(4) / 4 + ln(2) / 2 = 1.039721.
    # At temperature 1/2 the weights are 1, 1, 4: ln(4 / 6) = -0.405465.
    logits, targets = torch.tensor([[1.0, 1.0, 2.0]]).log(), torch.tensor([2])
    logprobs, entropy = token_logprobs_and_entropy(logits, targets)
    torch.testing.assert_close(logprobs, torch.tensor([-0.693147]), rtol=0, atol=1e-6)
    torch.testing.assert_close(entropy, torch.tensor([1.039721]), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        token_logprobs(logits, targets, temperature=0.5), torch.tensor([-0.405465]), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_equal_to_log_softmax_in_value_and_gradient(temperature):
    logits, targets = random_logits()
    logits.requires_grad_()
    full = torch.log_softmax(logits / temperature, dim=-1)
    expected = full.gather(-1, targets[..., None])[..., 0], -(full.exp() * full).sum(-1)
    got = token_logprobs_and_entropy(logits, targets, temperature=temperature)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        gradients = [torch.autograd.grad(x.square().sum(), logits, retain_graph=True)[0] for x in (ours, theirs)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_one_call_equals_two():
    logits, targets = random_logits()
    logprobs, entropy = token_logprobs_and_entropy(logits, targets, temperature=0.8)
    assert torch.equal(logprobs, token_logprobs(logits, targets, temperature=0.8))
    assert torch.equal(entropy, token_entropy(logits, temperature=0.8))


def test_entropy_only_on_demand():
    logits, targets = random_logits()
    logprobs, entropy = token_logprobs_and_entropy(logits, targets, with_entropy=False)
    assert entropy is None
    assert torch.equal(logprobs, token_logprobs(logits, targets))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_float32(dtype):
    logits, targets = random_logits(dtype=dtype)
    for half, full in zip(
        token_logprobs_and_entropy(logits, targets),
        token_logprobs_and_entropy(logits.float(), targets),
        strict=True,
    ):
        assert half.dtype == torch.float32
        assert torch.equal(half, full)


def test_entropy_lies_between_zero_and_that_of_the_uniform_distribution():
    logits, _ = random_logits()
    assert token_entropy(torch.zeros(50)).item() == pytest.approx(math.log(50), rel=1e-6)
    assert token_entropy(1e4 * torch.eye(50)).abs().max() < 1e-3
    entropies = token_entropy(logits)
    assert (entropies > 0).all()
    assert (entropies < math.log(50)).all()


def test_large_logits_do_not_overflow():
    logprobs = token_logprobs(torch.tensor([1e4, 1e4, -1e4]), torch.tensor(0))
    assert logprobs.item() == pytest.approx(-math.log(2), abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_extreme_half_precision_logits_stay_finite_and_near_the_exact(dtype):
    logits = torch.tensor([[6e4, 6e4, -6e4], [6e4, -6e4, 0.0], [-6e4, -6e4, -6e4]], dtype=dtype).requires_grad_()
    logprobs, entropy = token_logprobs_and_entropy(logits, torch.tensor([0, 1, 2]))
    (logprobs.sum() + entropy.sum()).backward()
    # A float32 near 6e4 has a spacing of 1/256.
    expected = [-math.log(2), -2 * logits[0, 0].item(), -math.log(3)]
    assert logprobs.tolist() == pytest.approx(expected, rel=0, abs=1 / 256)
    assert entropy.tolist() == pytest.approx([math.log(2), 0.0, math.log(3)], rel=0, abs=1 / 256)
    by_hand = [[0.5, -0.5, 0.0], [-1.0, 1.0, 0.0], [-1 / 3, -1 / 3, 2 / 3]]
    torch.testing.assert_close(logits.grad.float(), torch.tensor(by_hand), rtol=0, atol=4e-3)


def test_forbidden_ids_have_no_probability_and_no_gradient():
    # Minus infinity on the ids that pad the vocabulary; the rest is a distribution of two equal ids.
    logits = torch.tensor([[0.0, 0.0, -math.inf]], requires_grad=True)
    logprobs, entropy = token_logprobs_and_entropy(logits, torch.tensor([0]), temperature=0.9)
    assert logprobs.item() == pytest.approx(-math.log(2))
    assert entropy.item() == pytest.approx(math.log(2))
    (logprobs + entropy).sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[0, 2] == 0.0


def test_misuse_is_refused():
    logits, targets = random_logits()
    with pytest.raises(ValueError, match=r"targets \(4, 4\) do not fit logits \(4, 5, 50\)"):
        token_logprobs(logits, targets[:, 1:])
    with pytest.raises(ValueError, match=r"targets \(4,\)"):
        token_logprobs_and_entropy(logits, targets[:, 0])
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="temperature = "):
            token_entropy(logits, temperature=temperature)


def test_an_offset_of_all_logits_costs_the_entropy_no_digits() -> None:
    # As real models have it: a vocabulary of 49,152, logits around 20.
    logits = 4.0 * torch.randn(8, 49152, generator=torch.Generator().manual_seed(0)) + 20.0
    expected = torch.distributions.Categorical(logits=logits.double()).entropy()
    assert torch.allclose(token_entropy(logits).double(), expected, rtol=0.0, atol=5e-5)
