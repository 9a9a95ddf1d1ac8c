import math

import pytest
import torch

from rlhf_ray.advantages import Moments, whiten


def random_batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 9, generator=generator) * 4 + 3
    return x, torch.rand(8, 9, generator=generator) < 0.7


def test_hand_computed():
    # 1, 3, 5: mean 3; variance (4 + 0 + 4) / 2 = 4, so divide by 2; biased 8 / 3, so divide by sqrt(8 / 3).
    x, mask = torch.tensor([[1.0, 3.0], [5.0, 77.0]]), torch.tensor([[1, 1], [1, 0]])
    torch.testing.assert_close(whiten(x, mask), torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
    edge = 2 / math.sqrt(8 / 3)
    torch.testing.assert_close(whiten(x, mask, unbiased=False), torch.tensor([[-edge, 0.0], [edge, 0.0]]))


def test_equals_published_numbers():
    # SkyRL (github.com/NovaSky-AI/SkyRL), test_ppo_utils.py: advantages 5.5, 4 and 1.5, of which the second is masked.
    # Mean 3.5, variance (2^2 + 2^2) / 1 = 8. What SkyRL leaves at the masked position is 0 here.
    whitened = whiten(torch.tensor([[5.5, 4.0, 1.5]]), torch.tensor([[1, 0, 1]]))
    torch.testing.assert_close(whitened, torch.tensor([[0.7071, 0.0, -0.7071]]), rtol=0, atol=1e-4)


def test_eps_is_added_to_the_variance():
    # variance of 1, 3, 5 is 4; (5 - 3) / sqrt(4 + 12) = 0.5
    assert whiten(torch.tensor([1.0, 3.0, 5.0]), torch.ones(3), eps=12.0).tolist() == [-0.5, 0.0, 0.5]


@pytest.mark.parametrize("unbiased", [True, False])
def test_mean_is_zero_and_std_is_one(unbiased):
    x, mask = random_batch()
    kept = whiten(x, mask, unbiased=unbiased)[mask].double()
    assert kept.mean().item() == pytest.approx(0.0, abs=1e-7)
    assert kept.std(correction=int(unbiased)).item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("garbage", [1e30, math.nan, math.inf])
def test_garbage_under_the_mask_changes_nothing(garbage):
    x, mask = random_batch()
    clean = whiten(x, mask)
    dirty = x.masked_fill(~mask, garbage).requires_grad_()
    whitened = whiten(dirty, mask)
    assert torch.equal(whitened, clean)
    assert (whitened[~mask] == 0).all()
    whitened.sum().backward()
    assert torch.isfinite(dirty.grad).all()
    assert (dirty.grad[~mask] == 0).all()


def test_shards_with_merged_moments_equal_the_whole():
    x, mask = random_batch()
    whole = whiten(x, mask)
    # Rank 2 has nothing unmasked; the moments travel as the tensors of an all-gather.
    shards = [(x[:3], mask[:3]), (x[3:], mask[3:]), (x[:1], torch.zeros_like(mask[:1]))]
    moments = sum((Moments.of(*shard) for shard in shards), Moments())
    whitened = torch.cat([whiten(*shard, moments=moments) for shard in shards[:2]])
    torch.testing.assert_close(whitened, whole, rtol=1e-6, atol=1e-7)
    assert (whiten(*shards[2], moments=moments) == 0).all()


def test_gradient_of_shards_equals_that_of_the_whole_and_takes_mean_and_scale_as_constants():
    # Variance of 1, 3, 5 is 4: each number's own derivative is 1 / 2, and no other number enters it.
    x, mask = torch.tensor([1.0, 3.0, 5.0, 77.0]).requires_grad_(), torch.tensor([1, 1, 1, 0])
    upstream = torch.tensor([2.0, -1.0, 4.0, 8.0])
    (whole,) = torch.autograd.grad((whiten(x, mask) * upstream).sum(), x)
    assert whole.tolist() == pytest.approx([1.0, -0.5, 2.0, 0.0])
    moments = Moments.of(x, mask)
    for part in (slice(0, 1), slice(1, 4)):
        (whiten(x[part], mask[part], moments=moments) * upstream[part]).sum().backward()
    torch.testing.assert_close(x.grad, whole)


def test_a_single_number_gives_zero():
    assert whiten(torch.tensor([[7.0, math.nan]]), torch.tensor([[1, 0]])).tolist() == [[0.0, 0.0]]


def test_equal_numbers_give_zero():
    assert whiten(torch.full((2, 3), 0.7), torch.ones(2, 3)).tolist() == [[0.0] * 3] * 2


def test_large_mean_does_not_eat_the_digits():
    # In float32 the numbers near 2^24 are whole; mean 2^24 + 2/3 is not one of them.
    x = torch.tensor([0.0, 0.0, 2.0]) + 2**24
    torch.testing.assert_close(whiten(x, torch.ones(3)), whiten(x - 2**24, torch.ones(3)))


def test_nothing_unmasked_gives_zeros():
    assert whiten(torch.full((2,), math.nan), torch.zeros(2)).tolist() == [0.0, 0.0]


def test_dtype_is_kept():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert whiten(torch.tensor([1.0, 2.0], dtype=dtype), torch.ones(2)).dtype == dtype


def test_wrong_shape_is_refused():
    with pytest.raises(ValueError, match="shapes differ"):
        whiten(torch.zeros(3), torch.ones(2))
