import math

import torch

from rlhf_ray.losses import entropy_bonus, token_entropy


def test_hand_computed():
    # Sequences of 2 and 1 tokens. Token mean (1 + 2 + 6) / 3 = 3; sequence mean (1.5 + 6) / 2 = 3.75.
    entropies, mask = torch.tensor([[1.0, 2.0], [6.0, 50.0]]), torch.tensor([[1, 1], [1, 0]])
    assert entropy_bonus(entropies, mask)[0].item() == 3.0
    bonus, metrics = entropy_bonus(entropies, mask, aggregation="seq_mean_token_mean")
    assert bonus.item() == 3.75
    # The metric is the mean over tokens whatever the aggregation.
    assert metrics["entropy"].item() == 3.0


def test_gradient_is_the_share_of_each_token():
    # Means of 2 tokens and of 1, averaged over 2 sequences; nothing passes where the mask is 0.
    entropies = torch.tensor([[1.0, 2.0], [6.0, math.nan]], requires_grad=True)
    entropy_bonus(entropies, torch.tensor([[1, 1], [1, 0]]), aggregation="seq_mean_token_mean")[0].backward()
    assert entropies.grad.tolist() == [[0.25, 0.25], [0.5, 0.0]]


def test_normalizer_is_the_global_denominator():
    assert entropy_bonus(torch.tensor([[1.0, 2.0]]), torch.ones(1, 2), normalizer=6.0)[0].item() == 0.5


def test_maximizing_the_bonus_flattens_the_distribution():
    logits = torch.tensor([[[2.0, 0.0, -1.0]]], requires_grad=True)
    before = token_entropy(logits)
    (-entropy_bonus(before, torch.ones(1, 1))[0]).backward()
    after = token_entropy(logits.detach() - 0.1 * logits.grad)
    assert after.item() > before.item()
