import math

import pytest
import torch

from rlhf_ray.advantages.groups import Groups, narrow, quotient

# Group 7 holds 1, 3, 8 and group -2 holds 4, 4, interleaved; 5 stands alone.
IDS = torch.tensor([7, -2, 7, 5, -2, 7])
X = torch.tensor([1.0, 4.0, 3.0, 9.0, 4.0, 8.0], dtype=torch.float64)


def test_hand_computed():
    groups = Groups.of(IDS, rewards=X)
    assert groups.count == 3
    assert groups.size.tolist() == [3, 2, 3, 1, 2, 3]
    assert groups.total(X).tolist() == [12, 8, 12, 9, 8, 12]
    assert (X - groups.above_smallest(X)).tolist() == [1, 4, 1, 9, 4, 1]
    # Mean of 1, 3, 8: 4. Deviations -3, -1, 4; variance (9 + 1 + 16) / 2 = 13.
    assert groups.deviations(X).tolist() == [-3, 0, -1, 0, 0, 4]
    edge = math.sqrt(13)
    torch.testing.assert_close(groups.std(X), torch.tensor([edge, 0, edge, 0, 0, edge], dtype=torch.float64))


def test_above_smallest_is_double_and_exactly_zero_for_equal_rewards():
    rewards = torch.tensor([0.1, 0.3, 0.1, 0.1, 0.4]).requires_grad_()
    above = Groups.of(torch.tensor([0, 1, 0, 0, 1]), rewards=rewards).above_smallest(rewards)
    assert above.dtype == torch.float64
    assert not above.requires_grad
    assert above[[0, 1, 2, 3]].tolist() == [0, 0, 0, 0]
    assert above[4].item() == pytest.approx(0.1, abs=1e-7)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_ids_of_any_integer_dtype(dtype):
    groups = Groups.of(torch.tensor([3, 1, 3], dtype=dtype), rewards=X[:3])
    assert groups.size.tolist() == [2, 1, 2]


def test_ids_far_apart():
    ids = torch.tensor([2**62, -(2**62), 2**62])
    assert Groups.of(ids, rewards=X[:3]).total(X[:3]).tolist() == [4, 4, 4]


def test_empty_batch():
    empty = torch.zeros(0)
    groups = Groups.of(torch.zeros(0, dtype=torch.int64), rewards=empty)
    assert groups.count == 0
    for result in (groups.size, groups.total(empty), groups.above_smallest(empty), groups.std(empty)):
        assert result.shape == (0,)


def test_quotient_is_zero_where_the_denominator_is():
    quotients = quotient(torch.tensor([3.0, 3.0, 0.0]), torch.tensor([2.0, 0.0, 0.0]))
    assert quotients.tolist() == [1.5, 0.0, 0.0]


def test_narrow_saturates():
    wide = torch.tensor([1e39, -1e39, 0.5], dtype=torch.float64)
    largest = torch.finfo(torch.float32).max
    narrowed = narrow(wide, torch.float32)
    assert narrowed.dtype == torch.float32
    assert narrowed.tolist() == [largest, -largest, 0.5]


def test_wrong_shapes_and_dtypes_are_refused():
    ids = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"rewards \(2,\), group_ids \(3,\); expected \[B\]"):
        Groups.of(ids, rewards=torch.zeros(2))
    with pytest.raises(ValueError, match=r"rewards \(3, 1\), group_ids \(3, 1\)"):
        Groups.of(ids[:, None], rewards=torch.zeros(3, 1))
    with pytest.raises(ValueError, match=r"rewards are torch\.int64; expected floating point"):
        Groups.of(ids, rewards=ids)
    with pytest.raises(ValueError, match=r"group_ids are torch\.float32; expected integers"):
        Groups.of(torch.zeros(3), rewards=torch.zeros(3))
