import math

import pytest
import torch

from rlhf_ray.advantages import group_advantages, normalize_rewards, shape_rewards

# Group 8 holds 0, 1, 5 and group 3 holds 2, 6, interleaved.
REWARDS = torch.tensor([0.0, 2.0, 1.0, 6.0, 5.0])
IDS = torch.tensor([8, 3, 8, 3, 8])


def random_batch(seed, rows=40):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, generator=generator) * 3 + 1, torch.randint(0, 9, (rows,), generator=generator)


def test_shaping_hand_computed():
    # (0 - 1) * 2 = -2, (2 - 1) * 2 = 2, 0, 10 -> 3, 8 -> 3
    assert shape_rewards(REWARDS, bias=-1.0, scale=2.0, clip=3.0).tolist() == [-2, 2, 0, 3, 3]
    assert shape_rewards(REWARDS, bias=-1.0, scale=2.0).tolist() == [-2, 2, 0, 10, 8]
    assert shape_rewards(-REWARDS, clip=3.0).tolist() == [0, -2, -1, -3, -3]


def test_shaping_of_right_and_wrong_as_in_areal():
    # The GSM8K configurations of AReaL (github.com/inclusionAI/AReaL): reward_bias -0.5, reward_scaling 10; its code
    # adds before it multiplies, so that 0 and 1 become -5 and 5.
    rewards = torch.tensor([0.0, 1.0])
    assert shape_rewards(rewards, bias=-0.5, scale=10.0).tolist() == [-5.0, 5.0]
    assert shape_rewards(rewards, bias=-0.5, scale=10.0, clip=2.0).tolist() == [-2.0, 2.0]


def test_shaping_changes_nothing_unless_asked():
    assert torch.equal(shape_rewards(REWARDS), REWARDS)


def test_shaping_within_the_clip_leaves_grpo_as_it_is():
    shaped = shape_rewards(REWARDS, bias=0.5, scale=3.0, clip=100.0)
    expected = group_advantages(REWARDS, IDS, method="grpo", eps=0.0)
    torch.testing.assert_close(group_advantages(shaped, IDS, method="grpo", eps=0.0), expected)


@pytest.mark.parametrize(
    ("level", "mean", "std", "leave_one_out", "expected"),
    [
        # Means 2 and 4, variances 7 and 8.
        ("group", True, False, False, [-2.0, -2.0, -1.0, 2.0, 3.0]),
        ("group", True, True, False, [-2 / 7**0.5, -2 / 8**0.5, -1 / 7**0.5, 2 / 8**0.5, 3 / 7**0.5]),
        ("group", False, True, False, [0.0, 2 / 8**0.5, 1 / 7**0.5, 6 / 8**0.5, 5 / 7**0.5]),
        # Means of the others: 3, 6, 2.5, 2, 0.5
        ("group", True, False, True, [-3.0, -4.0, -1.5, 4.0, 4.5]),
        ("group", True, True, True, [-3 / 7**0.5, -4 / 8**0.5, -1.5 / 7**0.5, 4 / 8**0.5, 4.5 / 7**0.5]),
        # Mean 14 / 5 = 2.8; squared deviations 7.84 + 0.64 + 3.24 + 10.24 + 4.84 = 26.8, variance 26.8 / 4 = 6.7.
        ("batch", True, False, False, [-2.8, -0.8, -1.8, 3.2, 2.2]),
        ("batch", True, True, False, [x / 6.7**0.5 for x in (-2.8, -0.8, -1.8, 3.2, 2.2)]),
        ("batch", False, True, False, [x / 6.7**0.5 for x in (0, 2, 1, 6, 5)]),
        # Deviations times 5 / 4.
        ("batch", True, False, True, [-3.5, -1.0, -2.25, 4.0, 2.75]),
    ],
)
def test_normalizing_hand_computed(level, mean, std, leave_one_out, expected):
    normalized = normalize_rewards(REWARDS, IDS, level=level, mean=mean, std=std, leave_one_out=leave_one_out, eps=0.0)
    torch.testing.assert_close(normalized, torch.tensor(expected))


def test_eps_is_added_to_the_standard_deviation():
    # 0 and 2: standard deviation sqrt(2); 2 / (sqrt(2) + 0.5)
    rewards, ids = torch.tensor([0.0, 2.0]), torch.tensor([1, 1])
    normalized = normalize_rewards(rewards, ids, level="group", mean=False, std=True, eps=0.5)
    torch.testing.assert_close(normalized, torch.tensor([0.0, 2 / (math.sqrt(2) + 0.5)]))


@pytest.mark.parametrize(
    ("method", "std", "leave_one_out"), [("grpo", True, False), ("dr_grpo", False, False), ("rloo", False, True)]
)
def test_group_level_holds_three_methods_of_group_advantages(method, std, leave_one_out):
    rewards, ids = random_batch(0)
    normalized = normalize_rewards(rewards, ids, level="group", mean=True, std=std, leave_one_out=leave_one_out)
    torch.testing.assert_close(normalized, group_advantages(rewards, ids, method=method))


def test_batch_level_is_group_level_with_one_group():
    rewards, ids = random_batch(1)
    batch = normalize_rewards(rewards, ids, level="batch", mean=True, std=True)
    assert torch.equal(batch, normalize_rewards(rewards, ids * 0, level="group", mean=True, std=True))
    assert batch.double().mean().item() == pytest.approx(0.0, abs=1e-7)
    assert batch.double().std().item() == pytest.approx(1.0, abs=1e-6)


def test_groups_in_separate_calls_equal_one_call():
    rewards, ids = random_batch(3)
    settings = {"level": "group", "mean": True, "std": True, "leave_one_out": True}
    whole = normalize_rewards(rewards, ids, **settings)
    for part in (ids < 3, (ids >= 3) & (ids < 5), ids >= 5):
        assert part.any()
        torch.testing.assert_close(normalize_rewards(rewards[part], ids[part], **settings), whole[part])


def test_removing_nothing_changes_nothing():
    rewards, ids = random_batch(2)
    assert torch.equal(normalize_rewards(rewards, ids, level="group", mean=False, std=False), rewards)


@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("level", ["group", "batch"])
@pytest.mark.parametrize("rewards", [[0.1], [0.1] * 3])
def test_without_spread_the_mean_goes_and_the_scale_stays(rewards, level, eps):
    rewards = torch.tensor(rewards)
    ids = torch.full(rewards.shape, 4)
    for leave_one_out in (False, True):
        for std in (False, True):
            centered = normalize_rewards(
                rewards, ids, level=level, mean=True, std=std, leave_one_out=leave_one_out, eps=eps
            )
            assert (centered == 0).all()
    assert torch.equal(normalize_rewards(rewards, ids, level=level, mean=False, std=True, eps=eps), rewards)


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_garbage_in_another_group_changes_nothing(garbage):
    dirty = REWARDS.masked_fill(IDS == 3, garbage)
    kept = IDS == 8
    clean = normalize_rewards(REWARDS, IDS, level="group", mean=True, std=True)
    assert torch.equal(clean[kept], normalize_rewards(dirty, IDS, level="group", mean=True, std=True)[kept])


def test_results_are_targets_without_gradient_in_the_dtype_of_the_rewards():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        rewards = REWARDS.to(dtype).requires_grad_()
        normalized = normalize_rewards(rewards, IDS, level="group", mean=False, std=True)
        for result in (shape_rewards(rewards, bias=1.0, scale=2.0, clip=3.0), normalized):
            assert not result.requires_grad
            assert result.dtype == dtype


def test_empty_batch():
    rewards, ids = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    assert shape_rewards(rewards, clip=1.0).shape == (0,)
    for level in ("group", "batch"):
        assert normalize_rewards(rewards, ids, level=level, mean=True, std=True).shape == (0,)


def test_misuse_is_refused():
    with pytest.raises(ValueError, match=r"rewards \(5, 1\) do not fit; expected \[B\]"):
        shape_rewards(REWARDS[:, None])
    for clip in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=f"clip = {clip}: must be positive"):
            shape_rewards(REWARDS, clip=clip)
    with pytest.raises(ValueError, match="level = 'prompt': use group or batch"):
        normalize_rewards(REWARDS, IDS, level="prompt", mean=True, std=True)
    with pytest.raises(ValueError, match="leave_one_out = True needs mean = True"):
        normalize_rewards(REWARDS, IDS, level="group", mean=False, std=True, leave_one_out=True)
    with pytest.raises(ValueError, match=r"eps = -1\.0"):
        normalize_rewards(REWARDS, IDS, level="group", mean=True, std=True, eps=-1.0)
    for level in ("group", "batch"):
        with pytest.raises(ValueError, match=r"rewards \(5,\), group_ids \(4,\)"):
            normalize_rewards(REWARDS, IDS[:4], level=level, mean=True, std=True)
