from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from rlhf_ray.config.settings import RewardSettings
from rlhf_ray.learner.batch import SequenceBatch
from rlhf_ray.rewards.shaping import shaped

# Two groups of two; the second completion and the last are truncated.
REWARDS = [4.0, 1.0, 0.0, 2.0]
GREEDY = [1.0, 1.0, -9.0, -9.0]
TRUNCATED = [False, True, False, True]
GROUPS = [8, 8, 3, 3]


def read_only(values: Any, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    array = np.asarray(values, dtype=dtype)
    array.setflags(write=False)
    return array


def batch(**changes: Any) -> SequenceBatch:
    """One token of prompt and one of completion each; arrays as Ray's object store hands them out."""
    given = {
        "rewards": REWARDS,
        "greedy_rewards": GREEDY,
        "truncated": TRUNCATED,
        "group_ids": GROUPS,
        "loss_mask": [True] * len(changes.get("rewards", REWARDS)),
    } | changes
    size = len(given["rewards"])
    return SequenceBatch(
        token_ids=read_only(range(2 * size), np.int32),
        prompt_lengths=read_only([1] * size, np.int32),
        completion_lengths=read_only([1] * size, np.int32),
        turn_ids=read_only([0] * size, np.int32),
        follower_ids=read_only([-1] * size, np.int32),
        loss_mask=read_only(given["loss_mask"], np.bool_),
        sampling_logprobs=read_only([-0.5] * size, np.float32),
        staleness=read_only([0] * size, np.int32),
        token_rewards=read_only(given["rewards"], np.float64),
        on_policy=read_only([True] * size, np.bool_),
        truncated=read_only(given["truncated"], np.bool_),
        trajectory_ids=read_only(range(size), np.int64),
        group_ids=read_only(given["group_ids"], np.int64),
        greedy_rewards=read_only(given["greedy_rewards"], np.float32),
        successful=read_only([False] * size, np.bool_),
    )


def shape(settings: dict[str, Any], *, mask_truncated: bool = False, **changes: Any) -> SequenceBatch:
    return shaped(batch(**changes), RewardSettings(**settings), mask_truncated=mask_truncated)


def arrays(sequences: SequenceBatch) -> dict[str, list[Any]]:
    return {item.name: getattr(sequences, item.name).tolist() for item in fields(sequences)}


def test_the_defaults_change_nothing() -> None:
    assert arrays(shape({})) == arrays(batch())


@pytest.mark.parametrize(
    ("settings", "rewards", "greedy"),
    [
        ({"truncated_reward": -3.0}, [4, -3, 0, -3], GREEDY),
        ({"truncated_reward": 0.0}, [4, 0, 0, 0], GREEDY),
        ({"bias": -1.5}, [2.5, -0.5, -1.5, 0.5], [-0.5, -0.5, -10.5, -10.5]),
        ({"scale": -2.0}, [-8, -2, 0, -4], [-2, -2, 18, 18]),
        ({"clip": 1.5}, [1.5, 1, 0, 1.5], [1, 1, -1.5, -1.5]),
        # Means 2.5 and 1.
        ({"normalize": "group", "normalize_std": False}, [1.5, -1.5, -1, 1], GREEDY),
        # Mean 7 / 4.
        ({"normalize": "batch", "normalize_std": False}, [2.25, -0.75, -1.75, 0.25], GREEDY),
        # Of the other: 1, 4, 2, 0.
        ({"normalize": "group", "normalize_std": False, "leave_one_out": True}, [3, -3, -2, 2], GREEDY),
        # Deviations times 4 / 3.
        ({"normalize": "batch", "normalize_std": False, "leave_one_out": True}, [3, -1, -7 / 3, 1 / 3], GREEDY),
    ],
)
def test_each_setting_by_hand(settings: dict[str, Any], rewards: list[float], greedy: list[float]) -> None:
    result = shape(settings)
    np.testing.assert_allclose(result.rewards, rewards, rtol=1e-6)
    assert result.greedy_rewards.tolist() == greedy


def test_normalizing_divides_by_the_standard_deviation_unless_told_not_to() -> None:
    # Of two values it is their distance over the square root of 2, so both are as far from the mean as 1 / sqrt(2).
    half = 0.5**0.5
    np.testing.assert_allclose(shape({"normalize": "group"}).rewards, [half, -half, -half, half], rtol=1e-5)
    # Squared deviations 5.0625 + 0.5625 + 3.0625 + 0.0625 = 8.75, divided by 3.
    expected = np.asarray([2.25, -0.75, -1.75, 0.25]) / (8.75 / 3) ** 0.5
    np.testing.assert_allclose(shape({"normalize": "batch"}).rewards, expected, rtol=1e-5)


def test_the_order_is_truncated_bias_scale_clip_normalize() -> None:
    # -3 for the truncated: 4, -3, 0, -3; plus 1: 5, -2, 1, -2; twice: 10, -4, 2, -4; clipped at 5: 5, -4, 2, -4.
    before = {"truncated_reward": -3.0, "bias": 1.0, "scale": 2.0, "clip": 5.0}
    assert shape(before).rewards.tolist() == [5, -4, 2, -4]
    # Means 0.5 and -1.
    by_group = shape(before | {"normalize": "group", "normalize_std": False})
    assert by_group.rewards.tolist() == [4.5, -4.5, 3, -3]
    # Mean -0.25.
    by_batch = shape(before | {"normalize": "batch", "normalize_std": False})
    assert by_batch.rewards.tolist() == [5.25, -3.75, 2.25, -3.75]


@pytest.mark.parametrize("normalize", ["none", "group", "batch"])
def test_greedy_rewards_keep_the_scale_of_the_others_but_not_their_mean(normalize: str) -> None:
    settings = {"truncated_reward": -3.0, "bias": 1.0, "scale": 2.0, "clip": 5.0, "normalize": normalize}
    # (1 + 1) * 2 = 4 and (-9 + 1) * 2 = -16, clipped. Whether they were truncated is not known.
    assert shape(settings).greedy_rewards.tolist() == [4, 4, -5, -5]


def test_groups_are_told_apart_by_id_wherever_they_lie() -> None:
    result = shape({"normalize": "group", "normalize_std": False}, group_ids=[8, 3, 8, 3])
    # Groups 4, 0 and 1, 2.
    assert result.rewards.tolist() == [2, -0.5, -2, 0.5]


@pytest.mark.parametrize(("mask_truncated", "loss_mask"), [(True, [1, 0, 0, 0]), (False, [1, 1, 0, 0])])
def test_truncated_completions_leave_the_losses_where_asked(mask_truncated: bool, loss_mask: list[int]) -> None:
    # What was left out stays out.
    result = shape({}, mask_truncated=mask_truncated, loss_mask=[1, 1, 0, 0])
    assert result.loss_mask.tolist() == loss_mask
    assert result.loss_mask.dtype == np.bool_
    assert result.truncated.tolist() == TRUNCATED
    assert result.rewards.tolist() == REWARDS


def test_completions_left_out_of_the_losses_still_count_in_the_mean() -> None:
    settings = {"normalize": "group", "normalize_std": False}
    assert shape(settings, mask_truncated=True).rewards.tolist() == [1.5, -1.5, -1, 1]


def test_only_rewards_and_the_losses_mask_change() -> None:
    settings = {"truncated_reward": -3.0, "bias": 1.0, "scale": 2.0, "clip": 5.0, "normalize": "group"}
    old, new = arrays(batch()), arrays(shape(settings, mask_truncated=True))
    assert {name for name in old if old[name] != new[name]} == {"token_rewards", "greedy_rewards", "loss_mask"}


def test_the_given_batch_is_untouched_where_it_could_be_written() -> None:
    given = batch()
    before = arrays(given)
    for item in fields(given):
        getattr(given, item.name).setflags(write=True)
    settings = RewardSettings(truncated_reward=-3.0, bias=1.0, scale=2.0, clip=5.0, normalize="group")
    shaped(given, settings, mask_truncated=True)
    assert arrays(given) == before


@pytest.mark.filterwarnings("error")
def test_rewards_stay_float32_and_read_only_arrays_are_read_without_complaint() -> None:
    for settings in ({}, {"truncated_reward": 0.1}, {"bias": 0.1, "clip": 0.3}, {"normalize": "batch"}):
        result = shape(settings)
        assert result.rewards.dtype == result.greedy_rewards.dtype == np.float32


def test_a_group_without_spread_gives_zero() -> None:
    result = shape({"normalize": "group"}, rewards=[0.1, 0.1, 0.0, 2.0])
    np.testing.assert_allclose(result.rewards, [0, 0, -(0.5**0.5), 0.5**0.5], rtol=1e-5)
