import math
import statistics

import pytest
import torch

from rlhf_ray.advantages import group_advantages, whiten

METHODS = ["grpo", "dr_grpo", "rloo", "opo", "maxrl"]

# Group 8 holds 0, 1, 5 and group 3 holds 2, 6, interleaved.
REWARDS = torch.tensor([0.0, 2.0, 1.0, 6.0, 5.0])
IDS = torch.tensor([8, 3, 8, 3, 8])
LENGTHS = torch.tensor([2, 3, 4, 1, 4])


def one_by_one(rewards, ids, lengths, method):
    """The formulas as they stand in the papers, group by group, in Python floats."""
    advantages = [0.0] * len(rewards)
    for group in set(ids):
        rows = [row for row, row_id in enumerate(ids) if row_id == group]
        r, total = [rewards[row] for row in rows], math.fsum(rewards[row] for row in rows)
        if len(rows) == 1:
            continue
        for row in rows:
            match method:
                case "grpo":
                    advantages[row] = (rewards[row] - total / len(r)) / (statistics.stdev(r) + 1e-6)
                case "dr_grpo":
                    advantages[row] = rewards[row] - total / len(r)
                case "rloo":
                    advantages[row] = rewards[row] - math.fsum(rewards[i] for i in rows if i != row) / (len(r) - 1)
                case "opo":
                    weighted = math.fsum(lengths[i] * rewards[i] for i in rows)
                    advantages[row] = rewards[row] - weighted / sum(lengths[i] for i in rows)
                case "maxrl":
                    advantages[row] = (rewards[row] - total / len(r)) / (total / len(r))
    return advantages


def random_batch(seed, rows=40, num_groups=9):
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.rand(rows, generator=generator, dtype=torch.float64)
    ids = torch.randint(-4, num_groups - 4, (rows,), generator=generator)
    return rewards, ids, torch.randint(1, 200, (rows,), generator=generator)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        # Means 2 and 4, so deviations -2, -2, -1, 2, 3; variances (4 + 1 + 9) / 2 = 7 and (4 + 4) / 1 = 8.
        ("grpo", [-2 / 7**0.5, -2 / 8**0.5, -1 / 7**0.5, 2 / 8**0.5, 3 / 7**0.5]),
        ("dr_grpo", [-2.0, -2.0, -1.0, 2.0, 3.0]),
        # Means of the others: (1 + 5) / 2 = 3, 6, (0 + 5) / 2 = 2.5, 2, (0 + 1) / 2 = 0.5
        ("rloo", [-3.0, -4.0, -1.5, 4.0, 4.5]),
        # Baselines (0 + 4 + 20) / (2 + 4 + 4) = 2.4 and (6 + 6) / (3 + 1) = 3
        ("opo", [-2.4, -1.0, -1.4, 3.0, 2.6]),
        ("maxrl", [-1.0, -0.5, -0.5, 0.5, 1.5]),
    ],
)
def test_hand_computed(method, expected):
    advantages = group_advantages(REWARDS, IDS, method=method, lengths=LENGTHS, eps=0.0)
    torch.testing.assert_close(advantages, torch.tensor(expected))


def test_eps_is_added_to_the_standard_deviation():
    # 0 and 2: deviations -1 and 1, standard deviation sqrt(2); -1 / (sqrt(2) + 0.5)
    advantages = group_advantages(torch.tensor([0.0, 2.0]), torch.tensor([1, 1]), method="grpo", eps=0.5)
    edge = 1 / (math.sqrt(2) + 0.5)
    torch.testing.assert_close(advantages, torch.tensor([-edge, edge]))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_formulas_on_random_groups(method, seed):
    rewards, ids, lengths = random_batch(seed)
    advantages = group_advantages(rewards, ids, method=method, lengths=lengths)
    expected = one_by_one(rewards.tolist(), ids.tolist(), lengths.tolist(), method)
    torch.testing.assert_close(advantages, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("method", "rewards", "ids", "expected"),
    [
        # SkyRL (github.com/NovaSky-AI/SkyRL), test_ppo_utils.py: RLOO, GRPO without the standard deviation, MaxRL.
        ("rloo", [6, 3, 9, 12, 1], [0, 0, 1, 1, 2], [3, -3, -3, 3, 0]),
        ("dr_grpo", [6, 3, 9, 12], [0, 0, 1, 1], [1.5, -1.5, -1.5, 1.5]),
        ("maxrl", [6, 3, 9, 12], [0, 0, 1, 1], [1.5 / 4.5, -1.5 / 4.5, -1.5 / 10.5, 1.5 / 10.5]),
        # Twinkle (twinkle-kit.readthedocs.io), GRPOAdvantage, before its normalization.
        ("dr_grpo", [0, 1, 0, 1, 1, 0, 0, 0], [0] * 4 + [1] * 4, [-0.5, 0.5, -0.5, 0.5, 0.75, -0.25, -0.25, -0.25]),
    ],
)
def test_equals_published_numbers(method, rewards, ids, expected):
    advantages = group_advantages(torch.tensor(rewards, dtype=torch.float32), torch.tensor(ids), method=method)
    torch.testing.assert_close(advantages, torch.tensor(expected, dtype=torch.float32))


def test_grpo_equals_the_published_numbers():
    # Hugging Face, LLM Course, the chapter on GRPO in DeepSeekMath: 4 of 8 correct, a standard deviation of 0.53 (so it
    # divides by n - 1), advantages of 0.94 and -0.94.
    rewards = torch.tensor([1.0, 0.0] * 4)
    advantages = group_advantages(rewards, torch.zeros(8, dtype=torch.int64), method="grpo")
    torch.testing.assert_close(advantages, 0.94 * (2 * rewards - 1), rtol=0, atol=0.005)


@pytest.mark.parametrize("method", METHODS)
def test_groups_in_separate_calls_equal_one_call(method):
    rewards, ids, lengths = random_batch(5)
    whole = group_advantages(rewards, ids, method=method, lengths=lengths)
    for part in (ids < -1, (ids >= -1) & (ids < 3), ids >= 3):
        assert part.any()
        alone = group_advantages(rewards[part], ids[part], method=method, lengths=lengths[part])
        torch.testing.assert_close(alone, whole[part], rtol=1e-12, atol=1e-12)


def test_rloo_is_dr_grpo_times_n_over_n_minus_one():
    rewards, ids, _ = random_batch(0)
    size = (ids[:, None] == ids).sum(1)
    rloo, dr_grpo = (group_advantages(rewards, ids, method=method) for method in ("rloo", "dr_grpo"))
    torch.testing.assert_close(rloo * (size - 1), dr_grpo * size)


def test_opo_with_equal_lengths_is_dr_grpo():
    rewards, ids, lengths = random_batch(1)
    opo = group_advantages(rewards, ids, method="opo", lengths=torch.full_like(lengths, 17))
    torch.testing.assert_close(opo, group_advantages(rewards, ids, method="dr_grpo"))


@pytest.mark.parametrize("method", ["grpo", "dr_grpo", "rloo", "maxrl"])
def test_advantages_of_a_group_sum_to_zero(method):
    rewards, ids, _ = random_batch(2)
    advantages = group_advantages(rewards, ids, method=method)
    sums = [advantages[ids == group].sum().item() for group in ids.unique()]
    assert sums == pytest.approx([0.0] * len(sums), abs=1e-12)


def test_opo_advantages_of_a_group_weighted_by_length_sum_to_zero():
    rewards, ids, lengths = random_batch(3)
    weighted = group_advantages(rewards, ids, method="opo", lengths=lengths) * lengths
    assert [weighted[ids == group].sum().item() for group in ids.unique()] == pytest.approx([0.0] * 9, abs=1e-10)


def test_maxrl_weights_a_rare_success_by_its_rarity():
    # One success of 4: (1 - 1/4) / (1/4) = 3 against 4 / 3 - 1 = 1/3 for three of 4; a failure is -1 either way.
    rewards = torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 0])
    advantages = group_advantages(rewards, torch.tensor([0] * 4 + [1] * 4), method="maxrl")
    torch.testing.assert_close(advantages, torch.tensor([3.0, -1, -1, -1, 1 / 3, 1 / 3, 1 / 3, -1]))


def test_maxrl_without_success_is_zero():
    assert group_advantages(torch.zeros(3), torch.zeros(3, dtype=torch.int64), method="maxrl").tolist() == [0, 0, 0]


@pytest.mark.parametrize("method", METHODS)
def test_group_of_one_is_zero(method):
    rewards, ids, lengths = torch.tensor([0.7, 1.0, 3.0]), torch.tensor([5, 6, 5]), torch.tensor([1, 1, 1])
    advantages = group_advantages(rewards, ids, method=method, lengths=lengths, eps=0.0)
    assert advantages[1].item() == 0.0
    assert advantages[0].item() < 0.0 < advantages[2].item()


@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_equal_rewards_give_exactly_zero(method, dtype, eps):
    # 0.1 three times is 0.30000000000000004 in floats; the mean of group sizes that do not divide has residue too.
    rewards = torch.tensor([0.1, 0.7, 1e4 / 3, 0.3], dtype=dtype).repeat(7)[:25]
    ids = torch.tensor([0, 1, 2, 3]).repeat(7)[:25]
    lengths = torch.arange(25)
    advantages = group_advantages(rewards, ids, method=method, lengths=lengths, eps=eps)
    assert advantages.dtype == dtype
    assert (advantages == 0).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(3))
def test_finite_for_extreme_rewards(method, seed):
    generator = torch.Generator().manual_seed(seed)
    limits = torch.finfo(torch.float32)
    values = torch.tensor([0.0, 1e-45, limits.tiny, 1.0, 1.0 + limits.eps, limits.max])
    rewards = values[torch.randint(0, len(values), (60,), generator=generator)]
    ids, lengths = (torch.randint(0, high, (60,), generator=generator) for high in (20, 3))
    if method != "maxrl":
        rewards = rewards * torch.where(torch.rand(60, generator=generator) < 0.5, 1.0, -1.0)
    for eps in (0.0, 1e-6):
        assert torch.isfinite(group_advantages(rewards, ids, method=method, lengths=lengths, eps=eps)).all()


def test_large_mean_does_not_eat_the_digits():
    # In float32 the numbers near 2^24 are whole; mean 2^24 + 2/3 is not one of them.
    rewards, ids = torch.tensor([0.0, 0.0, 2.0]), torch.zeros(3, dtype=torch.int64)
    far = group_advantages(rewards + 2**24, ids, method="grpo")
    torch.testing.assert_close(far, group_advantages(rewards, ids, method="grpo"))


def test_opo_ignores_the_reward_of_a_completion_without_tokens():
    # All masked: length 0. Baseline (3 * 1 + 1 * 5 + 0 * 100) / 4 = 2 with one completion of a single token.
    rewards, lengths = torch.tensor([1.0, 5.0, 100.0]), torch.tensor([3, 1, 0])
    advantages = group_advantages(rewards, torch.zeros(3, dtype=torch.int64), method="opo", lengths=lengths)
    assert advantages.tolist() == [-1.0, 3.0, 98.0]


def test_opo_of_a_group_without_tokens_is_zero():
    rewards, ids, lengths = torch.tensor([1.0, 5.0, 2.0, 4.0]), torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1, 1])
    assert group_advantages(rewards, ids, method="opo", lengths=lengths).tolist() == [0.0, 0.0, -1.0, 1.0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_only_the_partition_counts_not_ids_or_order(method, dtype):
    rewards, ids, lengths = random_batch(4)
    expected = group_advantages(rewards, ids, method=method, lengths=lengths)
    order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(0))
    renamed = (1000 - 7 * ids).to(dtype)
    shuffled = group_advantages(rewards[order], renamed[order], method=method, lengths=lengths[order])
    torch.testing.assert_close(shuffled, expected[order], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_garbage_in_another_group_changes_nothing(method, garbage):
    clean = group_advantages(REWARDS, IDS, method=method, lengths=LENGTHS)
    dirty_rewards = REWARDS.masked_fill(IDS == 3, garbage)
    dirty = group_advantages(dirty_rewards, IDS, method=method, lengths=LENGTHS)
    assert torch.equal(clean[IDS == 8], dirty[IDS == 8])


def test_reinforce_plus_plus_with_a_group_baseline_as_documented():
    # Deviations -2, -2, -1, 2, 3, each as often as its completion has tokens, then whitened over all tokens.
    mask = torch.arange(4) < LENGTHS[:, None]
    advantages = group_advantages(REWARDS, IDS, method="dr_grpo")[:, None].expand(mask.shape)
    tokens = torch.tensor([-2.0] * 2 + [-2.0] * 3 + [-1.0] * 4 + [2.0] + [3.0] * 4)
    torch.testing.assert_close(whiten(advantages, mask)[mask], (tokens - tokens.mean()) / tokens.std())


def test_result_is_a_target_without_gradient():
    for method in METHODS:
        rewards = REWARDS.clone().requires_grad_()
        assert not group_advantages(rewards, IDS, method=method, lengths=LENGTHS).requires_grad


@pytest.mark.parametrize("method", METHODS)
def test_inputs_are_not_written_to(method):
    inputs = REWARDS.double(), IDS.clone(), LENGTHS.double()
    before = [tensor.clone() for tensor in inputs]
    group_advantages(*inputs[:2], method=method, lengths=inputs[2])
    assert all(torch.equal(tensor, kept) for tensor, kept in zip(inputs, before, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_empty_batch(method):
    ids = torch.zeros(0, dtype=torch.int64)
    assert group_advantages(torch.zeros(0), ids, method=method, lengths=ids).shape == (0,)


def test_misuse_is_refused():
    with pytest.raises(ValueError, match="method = 'ppo': use grpo, dr_grpo, rloo, opo or maxrl"):
        group_advantages(REWARDS, IDS, method="ppo")
    with pytest.raises(ValueError, match=r"rewards \(5,\), group_ids \(4,\)"):
        group_advantages(REWARDS, IDS[:4], method="grpo")
    with pytest.raises(ValueError, match="method = 'opo' needs lengths"):
        group_advantages(REWARDS, IDS, method="opo")
    with pytest.raises(ValueError, match=r"lengths \(4,\) do not fit rewards \(5,\); expected \[B\]"):
        group_advantages(REWARDS, IDS, method="opo", lengths=LENGTHS[:4])
    with pytest.raises(ValueError, match="lengths hold -3; they must be 0 or more"):
        group_advantages(REWARDS, IDS, method="opo", lengths=LENGTHS - 4)
    with pytest.raises(ValueError, match=r"rewards hold -1\.0; method = 'maxrl' needs rewards of 0 or more"):
        group_advantages(REWARDS - 1, IDS, method="maxrl")
    with pytest.raises(ValueError, match=r"eps = -1e-06"):
        group_advantages(REWARDS, IDS, method="grpo", eps=-1e-6)
