import math

import torch

from rlhf_ray.losses.sequence_mean import sequence_mean

MASK = torch.tensor([[True, False, True], [False, False, False]])


def test_hand_computed():
    assert sequence_mean(torch.tensor([[1.0, 50.0, 4.0], [7.0, 7.0, 7.0]]), MASK).tolist() == [[2.5], [0.0]]


def test_mean_of_logarithms_is_that_of_the_geometric_mean():
    ratios = torch.tensor([[2.0, 8.0]])
    torch.testing.assert_close(sequence_mean(ratios.log(), torch.ones(1, 2).bool()).exp(), torch.tensor([[4.0]]))


def test_garbage_under_the_mask_changes_nothing():
    x = torch.tensor([[1.0, math.nan, 4.0], [math.inf, math.nan, 0.0]], requires_grad=True)
    mean = sequence_mean(x, MASK)
    mean.sum().backward()
    assert mean.tolist() == [[2.5], [0.0]]
    assert x.grad.tolist() == [[0.5, 0.0, 0.5], [0.0, 0.0, 0.0]]
