import pytest
import torch

from rlhf_ray.losses.policy_metrics import policy_metrics

MASK = torch.tensor([[True, True, False]])


def test_hand_computed():
    # Log-ratios ln 2 and 0: k3 of the old policy is 2 - 1 - ln 2 = 0.306853 and 0.
    logprobs = torch.tensor([[2.0, 1.0, 1.0]]).log().requires_grad_()
    metrics = policy_metrics(logprobs, torch.zeros(1, 3), logprobs.exp() * torch.tensor([1.0, 1.0, 99.0]), MASK)
    assert not any(metric.requires_grad for metric in metrics.values())
    assert {name: metric.item() for name, metric in metrics.items()} == pytest.approx(
        {"approx_kl": 0.153426, "ratio_mean": 1.5, "ratio_max": 2.0}, rel=1e-5
    )


def test_clip_fractions_count_unmasked_tokens():
    row = torch.zeros(1, 3)
    metrics = policy_metrics(
        row,
        row,
        row,
        MASK,
        clipped_low=torch.tensor([[True, False, True]]),
        clipped_high=torch.tensor([[False, True, True]]),
    )
    assert [metrics[f"clip_fraction{side}"].item() for side in ("", "_low", "_high")] == [1.0, 0.5, 0.5]


@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0)])
def test_nothing_unmasked_is_zero(shape):
    row, mask = torch.ones(shape), torch.zeros(shape, dtype=torch.bool)
    metrics = policy_metrics(row, row, row, mask, clipped_low=mask, clipped_high=mask)
    assert all(metric.item() == 0.0 for metric in metrics.values())
