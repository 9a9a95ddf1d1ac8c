import math

import pytest
import torch

from rlhf_ray.losses.policy_inputs import check_clip, policy_inputs

MASK = torch.tensor([[1, 0]])


def row(*values, dtype=torch.float32):
    return torch.tensor([values], dtype=dtype, requires_grad=True)


def test_masked_positions_are_blank_and_the_mask_is_bool():
    *tensors, mask = policy_inputs(row(1.0, math.nan), row(2.0, math.inf), row(3.0, 9.0), MASK, row(4.0, -math.inf))
    assert [tensor.tolist() for tensor in tensors] == [[[1.0, 0.0]], [[2.0, 0.0]], [[3.0, 0.0]], [[4.0, 0.0]]]
    assert mask.tolist() == [[True, False]]


def test_only_logprobs_keep_a_gradient():
    *tensors, _ = policy_inputs(row(1.0, 2.0), row(1.0, 2.0), row(1.0, 2.0), MASK, row(1.0, 2.0))
    assert [tensor.requires_grad for tensor in tensors] == [True, False, False, False]


def test_no_weights_are_weights_of_one():
    assert policy_inputs(row(1.0, 2.0), row(1.0, 2.0), row(5.0, 5.0), MASK, None)[3].tolist() == [[1.0, 0.0]]


def test_misuse_is_refused():
    with pytest.raises(ValueError, match=r"logprobs \(1, 2\), old_logprobs \(1, 1\), advantages \(1, 2\), mask"):
        policy_inputs(row(1.0, 2.0), row(1.0), row(1.0, 2.0), MASK, None)
    with pytest.raises(ValueError, match=r"behavior_weights \(1, 1\)"):
        policy_inputs(row(1.0, 2.0), row(1.0, 2.0), row(1.0, 2.0), MASK, row(1.0))
    for clip in ((-0.1, 0.2), (0.2, -0.1), (math.nan, 0.2), (0.2, math.nan)):
        with pytest.raises(ValueError, match="must not be negative"):
            check_clip(*clip)
