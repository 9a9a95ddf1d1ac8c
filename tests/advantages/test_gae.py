import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_ray.advantages import gae

EVERYTHING = torch.ones(1, 3, dtype=torch.bool)


def brute_force(rewards, values, mask, gamma, lam, bootstrap):
    """The definition as a double sum over the unmasked tokens alone: A_t = sum_l (gamma lam)^l delta_(t+l)."""
    advantages = torch.zeros(mask.shape, dtype=torch.float64)
    for row in range(mask.shape[0]):
        steps = [t for t in range(mask.shape[1]) if mask[row, t]]
        state_values = [values[row, t].item() for t in steps] + [bootstrap[row].item()]
        deltas = [rewards[row, t].item() + gamma * state_values[i + 1] - state_values[i] for i, t in enumerate(steps)]
        for i, t in enumerate(steps):
            advantages[row, t] = math.fsum((gamma * lam) ** (j - i) * deltas[j] for j in range(i, len(steps)))
    return advantages


def random_batch(seed, rows=6, width=11):
    generator = torch.Generator().manual_seed(seed)
    rewards, values = (torch.randn(rows, width, generator=generator, dtype=torch.float64) for _ in range(2))
    bootstrap = torch.randn(rows, generator=generator, dtype=torch.float64)
    mask = torch.rand(rows, width, generator=generator) < 0.6
    mask[0] = False
    mask[1] = True
    return rewards, values, mask, bootstrap


def test_hand_computed():
    # gamma 0.5, lambda 0.5, so gamma * lambda = 0.25, from the last token backwards:
    #   delta_2 = 4 + 0.5 * 0 - 2 = 2      A_2 = 2                       R_2 = 2 + 2 = 4
    #   delta_1 = 0 + 0.5 * 2 - 3 = -2     A_1 = -2 + 0.25 * 2 = -1.5    R_1 = -1.5 + 3 = 1.5
    #   delta_0 = 1 + 0.5 * 3 - 1 = 1.5    A_0 = 1.5 - 0.375 = 1.125     R_0 = 1.125 + 1 = 2.125
    rewards, values = torch.tensor([[1.0, 0.0, 4.0]]), torch.tensor([[1.0, 3.0, 2.0]])
    advantages, returns = gae(rewards, values, EVERYTHING, gamma=0.5, lam=0.5)
    torch.testing.assert_close(advantages, torch.tensor([[1.125, -1.5, 2.0]]))
    torch.testing.assert_close(returns, torch.tensor([[2.125, 1.5, 4.0]]))


def test_truncated_row_bootstraps_and_finished_row_does_not():
    # gamma 0.5, lambda 1. Row 0 is cut with a value of 8 to come:
    #   delta_1 = 0 + 0.5 * 8 - 2 = 2, delta_0 = 0 + 0.5 * 2 - 4 = -3, A_0 = -3 + 0.5 * 2 = -2
    # Row 1 finished: delta_1 = 0 + 0 - 2 = -2, delta_0 = -3, A_0 = -3 + 0.5 * -2 = -4
    rewards, values = torch.zeros(2, 2), torch.tensor([[4.0, 2.0], [4.0, 2.0]])
    advantages, returns = gae(rewards, values, torch.ones(2, 2), gamma=0.5, lam=1.0, bootstrap=torch.tensor([8.0, 0.0]))
    torch.testing.assert_close(advantages, torch.tensor([[-2.0, 2.0], [-4.0, -2.0]]))
    torch.testing.assert_close(returns, torch.tensor([[2.0, 4.0], [0.0, 0.0]]))


def test_bootstrap_follows_the_last_unmasked_token_not_the_last_column():
    # Row of 1 token and 2 columns of padding: A_0 = 0 + 0.5 * 8 - 3 = 1, whatever the padding's width.
    advantages, _ = gae(
        torch.zeros(1, 3),
        torch.tensor([[3.0, 7.0, 7.0]]),
        torch.tensor([[1, 0, 0]]),
        gamma=0.5,
        lam=0.9,
        bootstrap=torch.tensor([8.0]),
    )
    assert advantages.tolist() == [[1.0, 0.0, 0.0]]


def test_masked_middle_is_as_if_it_were_not_there():
    # Policy tokens at 0 and 3, tool output at 1 and 2.
    rewards, values = torch.tensor([[0.0, 9.0, 9.0, 1.0]]), torch.tensor([[0.5, 7.0, 7.0, 0.25]])
    with_gap = gae(rewards, values, torch.tensor([[1, 0, 0, 1]]), gamma=0.9, lam=0.8)
    without = gae(rewards[:, [0, 3]], values[:, [0, 3]], torch.ones(1, 2), gamma=0.9, lam=0.8)
    for gapped, dense in zip(with_gap, without, strict=True):
        assert gapped[:, [0, 3]].tolist() == dense.tolist()
        assert gapped[:, [1, 2]].tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7), (0.99, 1.0), (1.0, 0.0), (0.0, 0.5)])
def test_equals_the_double_sum_on_random_masks(seed, gamma, lam):
    rewards, values, mask, bootstrap = random_batch(seed)
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam, bootstrap=bootstrap)
    torch.testing.assert_close(advantages, brute_force(rewards, values, mask, gamma, lam, bootstrap))
    torch.testing.assert_close(returns, (advantages + values) * mask)


@pytest.mark.parametrize(
    ("lam", "expected"),
    [
        (1.0, [-1.45118, -4.4557, 2.5396, 0.5249, -0.49]),
        (0.7, [-0.676979, -5.248167, 2.4846, 0.6704, -0.49]),
        (0.4, [0.56731, -6.042, 2.3431, 0.815, -0.49]),
    ],
)
def test_equals_the_published_numbers_of_a_truncated_row(lam, expected):
    # rlax (github.com/google-deepmind/rlax), multistep_test.py, TruncatedGeneralizedAdvantageEstimationTest.
    rewards, values = torch.tensor([[0.0, 0.0, 1.0, 0.0, -0.5]]), torch.tensor([[1.0, 4.0, -3.0, -2.0, -1.0]])
    bootstrap = torch.tensor([-1.0])
    advantages, returns = gae(rewards, values, torch.ones(1, 5), gamma=0.99, lam=lam, bootstrap=bootstrap)
    torch.testing.assert_close(advantages, torch.tensor([expected]), rtol=0, atol=1e-3)
    torch.testing.assert_close(returns, torch.tensor([expected]) + values, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("lam", "expected"),
    [(1.0, [3.0, 2.0, 1.0, 0.0]), (0.7, [2.2899, 1.73, 1.0, 0.0]), (0.4, [1.725, 1.46, 1.0, 0.0])],
)
def test_equals_the_published_numbers_of_a_finished_and_a_one_token_row(lam, expected):
    # The second batch of the same test, whose discount of 0 after the fourth step separates two episodes.
    values = torch.tensor([[-3.0, -2.0, -1.0, 0.0], [5.0, 8.0, 8.0, 8.0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    rewards = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 8.0, 8.0, 8.0]])
    advantages, _ = gae(rewards, values, mask, gamma=0.9, lam=lam, bootstrap=torch.tensor([0.0, -1.0]))
    assert advantages[0].tolist() == pytest.approx(expected, abs=1e-3)
    assert advantages[1].tolist() == pytest.approx([-4.9, 0.0, 0.0, 0.0])


def test_lambda_one_gamma_one_is_return_to_go_minus_value():
    rewards, values, mask, bootstrap = random_batch(0)
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=1.0, bootstrap=bootstrap)
    to_go = (rewards * mask).flip(1).cumsum(1).flip(1) + bootstrap[:, None]
    torch.testing.assert_close(advantages, (to_go - values) * mask)
    torch.testing.assert_close(returns, to_go * mask)


def test_lambda_zero_is_the_td_error():
    rewards, values, _, bootstrap = random_batch(1)
    advantages, _ = gae(rewards, values, torch.ones_like(rewards), gamma=0.9, lam=0.0, bootstrap=bootstrap)
    next_values = torch.cat([values[:, 1:], bootstrap[:, None]], dim=1)
    torch.testing.assert_close(advantages, rewards + 0.9 * next_values - values)


@pytest.mark.parametrize("garbage", [1e30, math.nan, math.inf])
def test_garbage_under_the_mask_changes_nothing(garbage):
    rewards, values, mask, bootstrap = random_batch(2)
    clean = gae(rewards, values, mask, gamma=0.9, lam=0.8, bootstrap=bootstrap)
    dirty_rewards, dirty_values = rewards.masked_fill(~mask, garbage), values.masked_fill(~mask, garbage)
    dirty_bootstrap = bootstrap.masked_fill(~mask.any(1), garbage)
    dirty = gae(dirty_rewards, dirty_values, mask, gamma=0.9, lam=0.8, bootstrap=dirty_bootstrap)
    for expected, got in zip(clean, dirty, strict=True):
        assert torch.equal(expected, got)


def test_rows_do_not_depend_on_each_other_or_on_their_padding():
    rewards, values, mask, bootstrap = random_batch(4)
    whole = gae(rewards, values, mask, gamma=0.9, lam=0.8, bootstrap=bootstrap)
    for row in range(len(mask)):
        width = int(mask[row].nonzero().max()) + 1 if mask[row].any() else 0
        part = [tensor[row : row + 1, :width] for tensor in (rewards, values, mask)]
        alone = gae(*part, gamma=0.9, lam=0.8, bootstrap=bootstrap[row : row + 1])
        for of_row, of_batch in zip(alone, whole, strict=True):
            assert torch.equal(of_row, of_batch[row : row + 1, :width])


def test_nothing_unmasked_gives_zeros():
    garbage = torch.full((2, 3), math.nan)
    for result in gae(garbage, garbage, torch.zeros(2, 3), gamma=0.9, lam=0.8, bootstrap=torch.full((2,), math.nan)):
        assert torch.equal(result, torch.zeros(2, 3))


def test_results_are_targets_without_gradient():
    rewards, values = (torch.zeros(1, 3, requires_grad=True) for _ in range(2))
    bootstrap = torch.zeros(1, requires_grad=True)
    advantages, returns = gae(rewards, values, EVERYTHING, gamma=1.0, lam=1.0, bootstrap=bootstrap)
    assert not advantages.requires_grad
    assert not returns.requires_grad


def test_inputs_are_not_written_to():
    rewards, values, mask, bootstrap = random_batch(3)
    before = rewards.clone(), values.clone()
    gae(rewards, values, mask, gamma=0.9, lam=0.8, bootstrap=bootstrap)
    assert torch.equal(rewards, before[0])
    assert torch.equal(values, before[1])


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_empty_batch(shape):
    empty = torch.zeros(shape)
    advantages, returns = gae(empty, empty, empty, gamma=1.0, lam=1.0)
    assert advantages.shape == returns.shape == shape


def test_wrong_shapes_and_coefficients_are_refused():
    row = torch.zeros(1, 3)
    with pytest.raises(ValueError, match=r"rewards \(1, 3\), values \(1, 2\), mask \(1, 3\)"):
        gae(row, torch.zeros(1, 2), EVERYTHING, gamma=1.0, lam=1.0)
    with pytest.raises(ValueError, match=r"bootstrap \(1, 1\)"):
        gae(row, row, EVERYTHING, gamma=1.0, lam=1.0, bootstrap=torch.zeros(1, 1))
    with pytest.raises(ValueError, match=r"gamma = 1\.5"):
        gae(row, row, EVERYTHING, gamma=1.5, lam=1.0)
    with pytest.raises(ValueError, match=r"lam = -0\.1"):
        gae(row, row, EVERYTHING, gamma=1.0, lam=-0.1)


class Kernels(TorchDispatchMode):
    """Counts what is dispatched within."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("lam", [0.5, 0.95, 1.0])
def test_a_longer_row_takes_no_more_kernels(lam):
    counts = []
    for width in (16, 4096):
        row = torch.zeros(2, width)
        with Kernels() as kernels:
            gae(row, row, torch.ones_like(row), gamma=1.0, lam=lam, bootstrap=torch.zeros(2))
        counts.append(kernels.count)

    assert counts[0] == counts[1] < 100


# With a factor of 0.9 a row of 16,384 is made of eight blocks, with 0.01 of 328, with 1e-60 of one for each token.
@pytest.mark.parametrize(
    ("gamma", "lam"), [(1.0, 1.0), (1.0, 0.95), (0.999, 1.0), (0.9, 1.0), (0.1, 0.1), (1e-30, 1e-30), (0.0, 1.0)]
)
def test_long_rows_are_exact_to_float32(gamma, lam):
    generator = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(2, 16384, generator=generator) for _ in range(2))
    mask = torch.rand(2, 16384, generator=generator) < 0.9
    mask[1, 9000:] = False
    bootstrap = torch.tensor([8.0, -3.0])
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam, bootstrap=bootstrap)

    for row in range(2):
        tokens = mask[row].nonzero()[:, 0].tolist()
        advantage, value = 0.0, bootstrap[row].item()
        wanted = []
        for token in reversed(tokens):
            now = values[row, token].item()
            advantage = rewards[row, token].item() + gamma * value - now + gamma * lam * advantage
            value = now
            wanted.append(advantage)
        by_recursion = torch.tensor(wanted[::-1], dtype=torch.float64)
        largest = by_recursion.abs().max().item()
        torch.testing.assert_close(advantages[row, tokens].double(), by_recursion, rtol=2e-7, atol=1e-7 * largest)
        torch.testing.assert_close(returns[row, tokens], advantages[row, tokens] + values[row, tokens])


@pytest.mark.parametrize("size", [1e-38, 1e30])
@pytest.mark.parametrize("lam", [0.01, 0.5, 1.0])
def test_numbers_of_any_size_neither_overflow_nor_vanish(size, lam):
    # One reward at the end, which a value of 0 everywhere hands on: A_t = size * lam^(T - 1 - t).
    rewards = torch.zeros(1, 600)
    rewards[0, -1] = size
    advantages, _ = gae(rewards, torch.zeros(1, 600), torch.ones(1, 600), gamma=1.0, lam=lam)

    wanted = torch.tensor([size * lam ** (599 - t) for t in range(600)], dtype=torch.float64).float()
    torch.testing.assert_close(advantages[0], wanted, rtol=1e-6, atol=1e-45)


# A lambda of the critic's own, and one of each row's length.


def test_returns_of_another_lambda_hand_computed():
    # As in test_hand_computed, and for the returns gamma * lambda = 0.5:
    #   A_2 = 2, A_1 = -2 + 0.5 * 2 = -1, A_0 = 1.5 + 0.5 * -1 = 1, each plus its value.
    rewards, values = torch.tensor([[1.0, 0.0, 4.0]]), torch.tensor([[1.0, 3.0, 2.0]])
    advantages, returns = gae(rewards, values, EVERYTHING, gamma=0.5, lam=0.5, critic_lam=1.0)
    torch.testing.assert_close(advantages, torch.tensor([[1.125, -1.5, 2.0]]))
    torch.testing.assert_close(returns, torch.tensor([[2.0, 2.0, 4.0]]))


def test_lambda_of_a_rows_length_hand_computed():
    # alpha 0.5. Three tokens: lambda = 1 - 1 / 1.5 = 1/3; a single one: 1 - 1 / 0.5 < 0, so 0. gamma 0.6:
    #   delta_2 = 4 - 2 = 2, delta_1 = 0.6 * 2 - 3 = -1.8, delta_0 = 1 + 0.6 * 3 - 1 = 1.8
    #   A_2 = 2, A_1 = -1.8 + 0.2 * 2 = -1.4, A_0 = 1.8 + 0.2 * -1.4 = 1.52; R = A + V of the same lambda.
    rewards, values = torch.tensor([[1.0, 0.0, 4.0], [7.0, 0.0, 1.0]]), torch.tensor([[1.0, 3.0, 2.0], [7.0, 0.5, 7.0]])
    mask = torch.tensor([[1, 1, 1], [0, 1, 0]])
    advantages, returns = gae(rewards, values, mask, gamma=0.6, lam=0.9, length_alpha=0.5)
    torch.testing.assert_close(advantages, torch.tensor([[1.52, -1.4, 2.0], [0.0, -0.5, 0.0]]))
    torch.testing.assert_close(returns, torch.tensor([[2.52, 1.6, 4.0], [0.0, 0.0, 0.0]]))


@pytest.mark.parametrize("seed", range(3))
def test_each_row_has_the_lambda_of_its_length(seed):
    rewards, values, mask, bootstrap = random_batch(seed)
    found, returns = gae(
        rewards, values, mask, gamma=0.97, lam=0.3, critic_lam=1.0, length_alpha=0.4, bootstrap=bootstrap
    )
    for row in range(len(mask)):
        lam = max(0.0, 1.0 - 1.0 / (0.4 * max(1, int(mask[row].sum()))))
        one = slice(row, row + 1)
        wanted = brute_force(rewards[one], values[one], mask[one], 0.97, lam, bootstrap[one])
        torch.testing.assert_close(found[one], wanted)
    wanted = brute_force(rewards, values, mask, 0.97, 1.0, bootstrap) + values * mask
    torch.testing.assert_close(returns, wanted)


@pytest.mark.parametrize("coefficients", [{"critic_lam": 1.1}, {"length_alpha": 0.0}, {"length_alpha": float("nan")}])
def test_wrong_lambdas_are_refused(coefficients):
    with pytest.raises(ValueError, match="must"):
        gae(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2), gamma=1.0, lam=1.0, **coefficients)
