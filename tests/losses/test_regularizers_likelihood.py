from __future__ import annotations

import pytest
import torch

from rlhf_ray.losses import likelihood_loss

LOGPROBS = torch.tensor([[-0.5, -1.5, -9.0], [-2.0, -9.0, -9.0]])
MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])


def test_hand_computed():
    loss, metrics = likelihood_loss(LOGPROBS, MASK)
    assert loss.item() == metrics["nll"].item() == pytest.approx(4.0 / 3.0)


def test_parts_add_up_to_the_whole_with_its_gradient():
    whole, parts = LOGPROBS.clone().requires_grad_(), LOGPROBS.clone().requires_grad_()
    likelihood_loss(whole, MASK)[0].backward()
    losses = [likelihood_loss(parts[i : i + 1], MASK[i : i + 1], normalizer=3)[0] for i in range(2)]
    sum(losses).backward()
    assert sum(losses).item() == pytest.approx(4.0 / 3.0)
    assert whole.grad.tolist() == parts.grad.tolist() == (-MASK / 3).tolist()


def test_nothing_unmasked_has_no_gradient():
    logprobs = LOGPROBS.clone().requires_grad_()
    loss, _ = likelihood_loss(logprobs, torch.zeros(2, 3))
    loss.backward()
    assert loss.item() == 0.0
    assert not logprobs.grad.any()
