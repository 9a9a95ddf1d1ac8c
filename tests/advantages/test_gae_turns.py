import pytest
import torch

from rlhf_ray.advantages import gae, turn_gae

# A turn of two tokens, an observation, a turn of one, an observation, a turn of two; a turn of three and padding.
MASK = torch.tensor([[1, 1, 0, 1, 0, 1, 1], [1, 1, 1, 0, 0, 0, 0]], dtype=torch.bool)
TURN_IDS = torch.tensor([[0, 0, -1, 1, -1, 2, 2], [0, 0, 0, 0, 0, 0, 0]])
REWARDS = torch.tensor([[0.5, 1.0, 70.0, -1.0, 70.0, 0.25, 2.0], [0.0, 0.0, 3.0, 70.0, 70.0, 70.0, 70.0]])
VALUES = torch.tensor([[2.0, 60.0, 70.0, 4.0, 70.0, 1.0, 60.0], [8.0, 60.0, 60.0, 70.0, 70.0, 70.0, 70.0]])
BOOTSTRAP = torch.tensor([6.0, 0.0])


def test_hand_computed():
    advantages, returns = turn_gae(REWARDS, VALUES, MASK, TURN_IDS, gamma=0.5, lam=0.5, bootstrap=BOOTSTRAP)
    # Turns backward: 2.25 + 0.5 * 6 - 1 = 4.25; -1 + 0.5 * 1 - 4 + 4.25 / 4 = -3.4375;
    # 1.5 + 0.5 * 4 - 2 - 3.4375 / 4 = 0.640625. Of the other row 3 - 8.
    assert advantages.tolist() == [
        [0.640625, 0.640625, 0, -3.4375, 0, 4.25, 4.25],
        [-5, -5, -5, 0, 0, 0, 0],
    ]
    # Plus the turn's first value, at each of its tokens.
    assert returns.tolist() == [[2.640625, 2.640625, 0, 0.5625, 0, 5.25, 5.25], [3, 3, 3, 0, 0, 0, 0]]


def test_without_bootstrap_nothing_follows():
    without = turn_gae(REWARDS, VALUES, MASK, TURN_IDS, gamma=0.5, lam=0.5)
    zero = turn_gae(REWARDS, VALUES, MASK, TURN_IDS, gamma=0.5, lam=0.5, bootstrap=torch.zeros(2))
    assert all(map(torch.equal, without, zero))
    assert without[0][0, -1].item() == 2.25 - 1


@pytest.mark.parametrize("seed", range(5))
def test_turns_of_one_token_are_steps_of_gae(seed):
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(4, 9, generator=generator), torch.randn(4, 9, generator=generator)
    mask = torch.rand(4, 9, generator=generator) < 0.6
    bootstrap = torch.randn(4, generator=generator)
    # Two turns may also follow each other without an observation between them.
    turn_ids = (mask.cumsum(1) - 1).masked_fill(~mask, -1)
    coefficients = {"gamma": 0.9, "lam": 0.8, "bootstrap": bootstrap}
    by_turn = turn_gae(rewards, values, mask, turn_ids, **coefficients)
    by_token = gae(rewards, values, mask, **coefficients)
    assert all(map(torch.equal, by_turn, by_token))


def test_lambda_1_is_return_minus_the_turns_first_value():
    advantages, _ = turn_gae(REWARDS, VALUES, MASK, TURN_IDS, gamma=1.0, lam=1.0)
    assert advantages[0, [0, 3, 5]].tolist() == [2.75 - 2, 1.25 - 4, 2.25 - 1]


@pytest.mark.parametrize("garbage", [1e6, float("nan"), float("inf")])
def test_what_is_masked_changes_nothing(garbage):
    wanted = turn_gae(REWARDS, VALUES, MASK, TURN_IDS, gamma=0.9, lam=0.8, bootstrap=BOOTSTRAP)
    rewards, values = (x.masked_fill(~MASK, garbage) for x in (REWARDS, VALUES))
    turn_ids = TURN_IDS.masked_fill(~MASK, 99)
    found = turn_gae(rewards, values, MASK, turn_ids, gamma=0.9, lam=0.8, bootstrap=BOOTSTRAP)
    assert all(map(torch.equal, found, wanted))


def test_a_turn_that_is_left_out_is_no_step():
    mask = MASK.clone()
    mask[0, 3] = False
    advantages, _ = turn_gae(REWARDS, VALUES, mask, TURN_IDS, gamma=0.5, lam=0.5, bootstrap=BOOTSTRAP)
    # 1.5 + 0.5 * 1 - 2 + 4.25 / 4.
    assert advantages[0].tolist() == [1.0625, 1.0625, 0, 0, 0, 4.25, 4.25]
    # A turn whose first token is left out begins at its next one.
    mask[0, 5] = False
    values = VALUES.clone()
    values[0, 6] = 3.0
    advantages, _ = turn_gae(REWARDS, values, mask, TURN_IDS, gamma=0.5, lam=0.5, bootstrap=BOOTSTRAP)
    assert advantages[0, 6].item() == 2 + 3 - 3


def test_empty_rows_and_no_rows():
    for shape in ((0, 3), (2, 0), (2, 3)):
        empty = torch.zeros(shape)
        turn_ids = torch.zeros(shape, dtype=torch.int32)
        advantages, returns = turn_gae(empty, empty, empty, turn_ids, gamma=1.0, lam=1.0)
        assert advantages.shape == returns.shape == shape
        assert not advantages.any()


def test_half_precision_is_computed_in_float32_and_carries_no_gradient():
    values = VALUES.to(torch.bfloat16).requires_grad_()
    advantages, returns = turn_gae(REWARDS, values, MASK, TURN_IDS, gamma=0.5, lam=0.5)
    assert advantages.dtype == returns.dtype == torch.float32
    assert not advantages.requires_grad
    assert turn_gae(REWARDS, VALUES.double(), MASK, TURN_IDS, gamma=0.5, lam=0.5)[0].dtype == torch.float64


def test_refusals():
    with pytest.raises(ValueError, match=r"shapes differ: .*turn_ids \(2, 6\)"):
        turn_gae(REWARDS, VALUES, MASK, TURN_IDS[:, :6], gamma=1.0, lam=1.0)
    with pytest.raises(ValueError, match=r"gamma = 1.5: must lie in \[0, 1\]"):
        turn_gae(REWARDS, VALUES, MASK, TURN_IDS, gamma=1.5, lam=1.0)
    with pytest.raises(ValueError, match="bootstrap"):
        turn_gae(REWARDS, VALUES, MASK, TURN_IDS, gamma=1.0, lam=1.0, bootstrap=torch.zeros(3))


def test_returns_of_another_lambda():
    rewards, values = torch.tensor([[0.0, 0.25, 0.0, 1.0]]), torch.tensor([[0.5, 9.0, 0.5, 9.0]])
    turn_ids = torch.tensor([[0, 0, 1, 1]])
    # delta_1 = 1 - 0.5, delta_0 = 0.25 + 0.5 - 0.5; A_0 = 0.25 + 0.5 * 0.5, and with a lambda of 0 R_0 = 0.25 + 0.5.
    advantages, returns = turn_gae(rewards, values, torch.ones(1, 4), turn_ids, gamma=1.0, lam=0.5, critic_lam=0.0)
    assert advantages.tolist() == [[0.5, 0.5, 0.5, 0.5]]
    assert returns.tolist() == [[0.75, 0.75, 1.0, 1.0]]
