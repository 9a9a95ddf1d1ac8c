import math

import pytest
import torch

from rlhf_ray.losses.policy_tokens import PolicyTokens

MASK = torch.tensor([[1, 0]])


def row(*values, dtype=torch.float32):
    return torch.tensor([values], dtype=dtype, requires_grad=True)


def tensors(tokens):
    return [tokens.logprobs, tokens.old_logprobs, tokens.advantages, tokens.weights]


def tokens_of(logprobs, mask, old_logprobs=None):
    old_logprobs = torch.zeros_like(logprobs) if old_logprobs is None else old_logprobs
    return PolicyTokens.of(logprobs, old_logprobs, torch.ones_like(logprobs), mask, None)


def test_masked_positions_are_blank_and_the_mask_is_bool():
    tokens = PolicyTokens.of(row(1.0, math.nan), row(2.0, math.inf), row(3.0, 9.0), MASK, row(4.0, -math.inf))
    assert [tensor.tolist() for tensor in tensors(tokens)] == [[[1.0, 0.0]], [[2.0, 0.0]], [[3.0, 0.0]], [[4.0, 0.0]]]
    assert tokens.mask.tolist() == [[True, False]]


def test_only_logprobs_keep_a_gradient():
    tokens = PolicyTokens.of(row(1.0, 2.0), row(1.0, 2.0), row(1.0, 2.0), MASK, row(1.0, 2.0))
    assert [tensor.requires_grad for tensor in tensors(tokens)] == [True, False, False, False]


def test_no_weights_are_weights_of_one():
    tokens = PolicyTokens.of(row(1.0, 2.0), row(1.0, 2.0), row(5.0, 5.0), MASK, None)
    assert tokens.weights.tolist() == [[1.0, 0.0]]


def test_misuse_is_refused():
    with pytest.raises(ValueError, match=r"logprobs \(1, 2\), old_logprobs \(1, 1\), advantages \(1, 2\), mask"):
        PolicyTokens.of(row(1.0, 2.0), row(1.0), row(1.0, 2.0), MASK, None)
    with pytest.raises(ValueError, match=r"behavior_weights \(1, 1\)"):
        PolicyTokens.of(row(1.0, 2.0), row(1.0, 2.0), row(1.0, 2.0), MASK, row(1.0))
    for clip in ((-0.1, 0.2), (0.2, -0.1), (math.nan, 0.2), (0.2, math.nan)):
        with pytest.raises(ValueError, match="must not be negative"):
            PolicyTokens.of(row(1.0, 2.0), row(1.0, 2.0), row(1.0, 2.0), MASK, None, clip=clip)


def test_metrics_hand_computed():
    # Log-ratios ln 2 and 0: k3 of the old policy is 2 - 1 - ln 2 = 0.306853 and 0.
    logprobs = torch.tensor([[2.0, 1.0, 1.0]]).log().requires_grad_()
    tokens = tokens_of(logprobs, torch.tensor([[True, True, False]]))
    metrics = tokens.metrics(logprobs.exp() * torch.tensor([1.0, 1.0, 99.0]))
    assert not any(metric.requires_grad for metric in metrics.values())
    assert {name: metric.item() for name, metric in metrics.items()} == pytest.approx(
        {"approx_kl": 0.153426, "ratio_mean": 1.5, "ratio_max": 2.0}, rel=1e-5
    )


def test_clip_fractions_count_unmasked_tokens():
    zeros = torch.zeros(1, 3)
    metrics = tokens_of(zeros, torch.tensor([[True, True, False]])).metrics(
        zeros,
        clipped_low=torch.tensor([[True, False, True]]),
        clipped_high=torch.tensor([[False, True, True]]),
    )
    assert [metrics[f"clip_fraction{side}"].item() for side in ("", "_low", "_high")] == [1.0, 0.5, 0.5]


@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0)])
def test_metrics_of_nothing_unmasked_are_zero(shape):
    ones, mask = torch.ones(shape), torch.zeros(shape, dtype=torch.bool)
    metrics = tokens_of(ones, mask, ones).metrics(ones, clipped_low=mask, clipped_high=mask)
    assert all(metric.item() == 0.0 for metric in metrics.values())


def test_sequence_mean_hand_computed_whatever_lies_under_the_mask():
    tokens = tokens_of(torch.zeros(2, 3), torch.tensor([[True, False, True], [False, False, False]]))
    x = torch.tensor([[1.0, math.nan, 4.0], [math.inf, math.nan, 0.0]], requires_grad=True)
    mean = tokens.sequence_mean(x)
    mean.sum().backward()
    assert mean.tolist() == [[2.5], [0.0]]
    assert x.grad.tolist() == [[0.5, 0.0, 0.5], [0.0, 0.0, 0.0]]
