import math

import pytest
import torch

from rlhf_ray.advantages import gae, kl_penalized_rewards, reinforce_plus_plus


def random_batch(seed, rows=6, width=11):
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    mask = torch.rand(rows, width, generator=generator) < 0.6
    mask[0] = False
    mask[1] = True
    return rewards, mask


def test_hand_computed():
    # gamma 0.5, backwards: 4; 2 + 0.5 * 4 = 4; 1 + 0.5 * 4 = 3. The second row has a single token.
    rewards, mask = torch.tensor([[1.0, 2.0, 4.0], [3.0, 8.0, 8.0]]), torch.tensor([[1, 1, 1], [1, 0, 0]])
    assert reinforce_plus_plus(rewards, mask, gamma=0.5).tolist() == [[3, 4, 4], [3, 0, 0]]


@pytest.mark.parametrize(("gamma", "expected"), [(0.5, [2.75, 3.5, 3.0]), (1.0, [6.0, 5.0, 3.0])])
def test_equals_published_numbers(gamma, expected):
    # SkyRL (github.com/NovaSky-AI/SkyRL), test_ppo_utils.py: returns of REINFORCE++ and of GAE with lambda 1.
    rewards = torch.tensor([[1.0, 2.0, 3.0]])
    assert reinforce_plus_plus(rewards, torch.ones(1, 3), gamma=gamma).tolist() == [expected]


def test_masked_middle_is_as_if_it_were_not_there():
    # 1 + 0.5 * 4 = 3: one step, not three.
    rewards = torch.tensor([[1.0, 9.0, 9.0, 4.0]])
    assert reinforce_plus_plus(rewards, torch.tensor([[1, 0, 0, 1]]), gamma=0.5).tolist() == [[3, 0, 0, 4]]


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_discounted_sum_on_random_masks(seed, gamma):
    rewards, mask = random_batch(seed)
    expected = torch.zeros_like(rewards)
    for row, kept in enumerate(mask):
        steps = kept.nonzero().flatten().tolist()
        for i, t in enumerate(steps):
            expected[row, t] = math.fsum(gamma**k * rewards[row, s].item() for k, s in enumerate(steps[i:]))
    torch.testing.assert_close(reinforce_plus_plus(rewards, mask, gamma=gamma), expected)


def test_equals_the_returns_of_gae_with_lambda_one_whatever_the_critic():
    rewards, mask = random_batch(0)
    values = torch.randn(rewards.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    _, returns = gae(rewards, values, mask, gamma=0.9, lam=1.0)
    torch.testing.assert_close(reinforce_plus_plus(rewards, mask, gamma=0.9), returns)


def test_reward_less_the_kl_still_to_come():
    # coef 0.5: 1 - 0.5 * (0.2 + 0.4 + 0.6) = 0.4, 1 - 0.5 * (0.4 + 0.6) = 0.5, 1 - 0.5 * 0.6 = 0.7
    mask = torch.ones(1, 3)
    rewards = kl_penalized_rewards(torch.tensor([1.0]), mask, kl=torch.tensor([[0.2, 0.4, 0.6]]), coef=0.5)
    torch.testing.assert_close(reinforce_plus_plus(rewards, mask, gamma=1.0), torch.tensor([[0.4, 0.5, 0.7]]))


@pytest.mark.parametrize("garbage", [1e30, math.nan, math.inf])
def test_garbage_under_the_mask_changes_nothing(garbage):
    rewards, mask = random_batch(2)
    clean = reinforce_plus_plus(rewards, mask, gamma=0.9)
    dirty = reinforce_plus_plus(rewards.masked_fill(~mask, garbage), mask, gamma=0.9)
    assert torch.equal(clean, dirty)
    assert (clean[~mask] == 0).all()


def test_rows_do_not_depend_on_each_other_or_on_their_padding():
    rewards, mask = random_batch(3)
    whole = reinforce_plus_plus(rewards, mask, gamma=0.9)
    for row in range(len(mask)):
        width = int(mask[row].nonzero().max()) + 1 if mask[row].any() else 0
        alone = reinforce_plus_plus(rewards[row : row + 1, :width], mask[row : row + 1, :width], gamma=0.9)
        assert torch.equal(alone, whole[row : row + 1, :width])


def test_nothing_unmasked_gives_zeros():
    advantages = reinforce_plus_plus(torch.full((2, 3), math.nan), torch.zeros(2, 3), gamma=0.9)
    assert torch.equal(advantages, torch.zeros(2, 3))


def test_result_is_a_target_without_gradient_in_the_dtype_of_the_rewards():
    rewards = torch.zeros(1, 3, requires_grad=True)
    advantages = reinforce_plus_plus(rewards, torch.ones(1, 3), gamma=1.0)
    assert not advantages.requires_grad
    assert advantages.dtype == torch.float32


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_empty_batch(shape):
    assert reinforce_plus_plus(torch.zeros(shape), torch.zeros(shape), gamma=1.0).shape == shape


def test_wrong_shapes_and_coefficients_are_refused():
    with pytest.raises(ValueError, match=r"shapes differ: rewards \(1, 3\), mask \(1, 2\)"):
        reinforce_plus_plus(torch.zeros(1, 3), torch.ones(1, 2), gamma=1.0)
    with pytest.raises(ValueError, match=r"mask has shape \(3,\); expected 2 dimensions"):
        reinforce_plus_plus(torch.zeros(3), torch.ones(3), gamma=1.0)
    with pytest.raises(ValueError, match=r"gamma = 1\.5"):
        reinforce_plus_plus(torch.zeros(1, 3), torch.ones(1, 3), gamma=1.5)
