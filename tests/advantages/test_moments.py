import pytest
import torch

from rlhf_ray.advantages import Moments


def test_hand_computed():
    # 1, 2, 6: mean 9 / 3 = 3, squared deviations 4 + 1 + 9 = 14, variance 14 / 2 = 7 or 14 / 3.
    moments = Moments.of(torch.tensor([[1.0, 2.0], [6.0, 99.0]]), torch.tensor([[1, 1], [1, 0]]))
    assert moments == Moments(count=3, mean=3.0, m2=14.0)
    assert moments.variance() == 7.0
    assert moments.variance(unbiased=False) == pytest.approx(14 / 3)


def test_merge_hand_computed():
    # {1, 3}: mean 2, m2 2.  {8}: mean 8, m2 0.  Together mean 4, m2 = 2 + 0 + 6^2 * 2 * 1 / 3 = 26 = 9 + 1 + 16.
    merged = Moments(count=2, mean=2.0, m2=2.0) + Moments(count=1, mean=8.0, m2=0.0)
    assert merged == Moments(count=3, mean=4.0, m2=26.0)


@pytest.mark.parametrize("num_parts", [1, 2, 7])
def test_merged_parts_equal_the_whole(num_parts):
    generator = torch.Generator().manual_seed(num_parts)
    x = torch.randn(50, generator=generator) * 3 + 5
    mask = torch.rand(50, generator=generator) < 0.7
    parts = [Moments.of(part, kept) for part, kept in zip(x.chunk(num_parts), mask.chunk(num_parts), strict=True)]
    merged = sum(parts, Moments())
    kept = x[mask].double()
    assert merged.count == kept.numel()
    assert merged.mean == pytest.approx(kept.mean().item(), rel=1e-12)
    assert merged.variance() == pytest.approx(kept.var().item(), rel=1e-12)
    assert merged.variance(unbiased=False) == pytest.approx(kept.var(correction=0).item(), rel=1e-12)


def test_no_cancellation_beside_a_large_mean():
    # A sum of squares would need 16 digits more than the mean's: 1e8^2 + 1 is 1e16 in double precision.
    x = torch.tensor([1e8, 1e8 + 1, 1e8 + 2], dtype=torch.float64)
    parts = [Moments.of(value, torch.ones(1)) for value in x.split(1)]
    assert sum(parts, Moments()).variance() == pytest.approx(1.0, rel=1e-7)


def test_empty_set_is_neutral_and_defined():
    empty = Moments.of(torch.tensor([float("nan")]), torch.tensor([False]))
    assert empty == Moments()
    assert (empty.mean, empty.variance(), empty.variance(unbiased=False)) == (0.0, 0.0, 0.0)
    some = Moments(count=2, mean=2.0, m2=2.0)
    assert empty + some == some + empty == some


def test_one_number_has_no_unbiased_variance():
    assert Moments.of(torch.tensor([3.0]), torch.tensor([True])).variance() == 0.0


def test_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"x \(3,\), mask \(2,\)"):
        Moments.of(torch.zeros(3), torch.ones(2))
