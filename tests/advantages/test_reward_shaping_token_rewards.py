import math

import pytest
import torch

from rlhf_ray.advantages import gae, kl_penalized_rewards

MASK = torch.tensor([[1, 1, 1, 0], [0, 1, 0, 1], [0, 0, 0, 0]], dtype=torch.bool)


def test_reward_lies_on_the_last_unmasked_token():
    # Row 2 has no token: its reward has no place.
    token_rewards = kl_penalized_rewards(torch.tensor([1.0, -2.0, 5.0]), MASK)
    assert token_rewards.tolist() == [[0, 0, 1, 0], [0, 0, 0, -2], [0, 0, 0, 0]]


def test_penalty_hand_computed():
    # 1 - 0.5 * 0.4 = 0.8 on the last token, -0.5 * 0.2 = -0.1 and -0.5 * -0.6 = 0.3 before; 3 - 0.5 * 2 = 2.
    kl = torch.tensor([[0.2, -0.6, 0.4, 8.0], [8.0, 1.0, 8.0, 2.0], [8.0, 8.0, 8.0, 8.0]])
    token_rewards = kl_penalized_rewards(torch.tensor([1.0, 3.0, 5.0]), MASK, kl=kl, coef=0.5)
    expected = torch.tensor([[-0.1, 0.3, 0.8, 0.0], [0.0, -0.5, 0.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(token_rewards, expected)


def test_a_single_token_carries_reward_and_penalty():
    # 3 - 0.5 * 2
    assert kl_penalized_rewards(torch.tensor([3.0]), torch.ones(1, 1), kl=torch.tensor([[2.0]]), coef=0.5).item() == 2.0


def test_rows_do_not_depend_on_each_other_or_on_their_padding():
    rewards, kl = torch.tensor([1.0, 3.0, 5.0]), torch.arange(12.0).view(3, 4)
    whole = kl_penalized_rewards(rewards, MASK, kl=kl, coef=0.5)
    for row, width in enumerate((3, 4, 0)):
        rows = slice(row, row + 1)
        alone = kl_penalized_rewards(rewards[rows], MASK[rows, :width], kl=kl[rows, :width], coef=0.5)
        assert torch.equal(alone, whole[rows, :width])


@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0)])
def test_nothing_unmasked_gives_zeros(shape):
    rewards, kl = torch.full(shape[:1], math.nan), torch.full(shape, math.nan)
    assert torch.equal(kl_penalized_rewards(rewards, torch.zeros(shape), kl=kl, coef=0.5), torch.zeros(shape))


def test_sum_over_tokens_is_reward_minus_penalty():
    generator = torch.Generator().manual_seed(0)
    kl, rewards = torch.randn(2, 4, generator=generator), torch.randn(2, generator=generator)
    token_rewards = kl_penalized_rewards(rewards, MASK[:2], kl=kl, coef=0.3)
    torch.testing.assert_close(token_rewards.sum(1), rewards - 0.3 * (kl * MASK[:2]).sum(1))


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_garbage_under_the_mask_changes_nothing(garbage):
    kl = torch.ones(3, 4)
    rewards = torch.tensor([1.0, 2.0, 3.0])
    clean = kl_penalized_rewards(rewards, MASK, kl=kl, coef=0.1)
    rewards[2] = garbage
    assert torch.equal(clean, kl_penalized_rewards(rewards, MASK, kl=kl.masked_fill(~MASK, garbage), coef=0.1))


def test_undiscounted_return_of_the_first_token_is_the_reward():
    token_rewards = kl_penalized_rewards(torch.tensor([1.0, -2.0, 0.0]), MASK)
    _, returns = gae(token_rewards, torch.zeros(3, 4), MASK, gamma=1.0, lam=1.0)
    assert returns.tolist() == [[1, 1, 1, 0], [0, -2, 0, -2], [0, 0, 0, 0]]


def test_rewards_of_two_turns_keep_their_places_and_observed_tokens_have_none():
    rewards = torch.tensor([[0.0, 0.25, 9.0, 1.0]])
    kl = torch.tensor([[0.5, 0.5, 7.0, 0.5]])
    found = kl_penalized_rewards(rewards, torch.tensor([[1, 1, 0, 1]]), kl=kl, coef=0.5)
    assert found.tolist() == [[-0.25, 0, 0, 0.75]]


def test_result_is_a_target_without_gradient():
    kl = torch.ones(3, 4, requires_grad=True)
    assert not kl_penalized_rewards(torch.zeros(3, requires_grad=True), MASK, kl=kl, coef=1.0).requires_grad


def test_misuse_is_refused():
    with pytest.raises(ValueError, match=r"coef = 0.1 needs kl"):
        kl_penalized_rewards(torch.zeros(3), MASK, coef=0.1)
    with pytest.raises(ValueError, match=r"rewards \(3, 5\) do not fit mask \(3, 4\); expected \[B\] or \[B, T\]"):
        kl_penalized_rewards(torch.zeros(3, 5), MASK)
    with pytest.raises(ValueError, match=r"kl \(3, 5\), mask \(3, 4\)"):
        kl_penalized_rewards(torch.zeros(3), MASK, kl=torch.zeros(3, 5), coef=0.1)
