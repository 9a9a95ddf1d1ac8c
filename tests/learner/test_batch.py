from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from rlhf_ray.advantages import gae
from rlhf_ray.learner.batch import SequenceBatch
from rlhf_ray.learner.trajectory_rows import TrajectoryRows
from rlhf_ray.types import FurtherSequence, Prompt, RolloutGroup, ScoredGroup, Trajectory, Turn, VersionSpan


def scored_group(group_id: int, prompt: list[int], completions: list[tuple[list[int], str]]) -> ScoredGroup:
    """A group whose log-probabilities and rewards tell where they came from."""
    written = tuple(
        Trajectory.single_turn(
            token_ids=np.asarray(ids, dtype=np.int32),
            sampling_logprobs=np.asarray([-(group_id + i / 10 + t / 100) for t in range(len(ids))], dtype=np.float32),
            # All tokens but the last of the version before.
            asked_version=0,
            version_spans=(
                VersionSpan(version=group_id, start=0, end=len(ids) - 1),
                VersionSpan(version=group_id + 1, start=len(ids) - 1, end=len(ids)),
            ),
            finish_reason=reason,
        )
        for i, (ids, reason) in enumerate(completions)
    )
    row = Prompt(prompt_id=group_id, token_ids=np.asarray(prompt, dtype=np.int32), text="")
    return ScoredGroup(
        group=RolloutGroup(group_id=group_id, prompt=row, trajectories=written, replica_id="r"),
        rewards=np.asarray([group_id + i / 10 for i in range(len(written))], dtype=np.float32),
        rewards_by_function={},
        texts=("",) * len(written),
        reward_s=0.0,
    )


def two_groups() -> SequenceBatch:
    return SequenceBatch.from_groups(
        [
            scored_group(1, [1, 2], [([3], "stop"), ([4, 5, 6], "length")]),
            scored_group(2, [7], [([8, 9], "stop")]),
        ],
        version=5,
        max_staleness=4,
    )


def test_from_groups_lays_the_completions_out_in_order_each_after_its_prompt() -> None:
    batch = two_groups()

    assert len(batch) == 3
    assert batch.token_ids.tolist() == [1, 2, 3, 1, 2, 4, 5, 6, 7, 8, 9]
    assert batch.prompt_lengths.tolist() == [2, 2, 1]
    assert batch.completion_lengths.tolist() == [1, 3, 2]
    assert batch.lengths.tolist() == [3, 5, 3]
    assert batch.truncated.tolist() == [False, True, False]
    np.testing.assert_allclose(batch.rewards, [1.0, 1.1, 2.0], rtol=1e-6)
    np.testing.assert_allclose(batch.sampling_logprobs, [-1.0, -1.1, -1.11, -1.12, -2.0, -2.01], rtol=1e-6)
    assert batch.staleness.tolist() == [3, 4, 4, 3, 3, 2]
    assert batch.on_policy.tolist() == [False, False, False]


def test_on_policy_is_what_was_asked_and_written_under_the_policy_that_is_trained() -> None:
    def completion(asked: int, *written: int) -> Trajectory:
        spans = tuple(VersionSpan(version=v, start=i, end=i + 1) for i, v in enumerate(written))
        return Trajectory.single_turn(
            token_ids=np.zeros(len(written), dtype=np.int32),
            sampling_logprobs=np.zeros(len(written), dtype=np.float32),
            asked_version=asked,
            version_spans=spans,
            finish_reason="stop",
        )

    group = scored_group(1, [1], [([3], "stop")] * 3)
    completions = (completion(5, 5, 5), completion(4, 5, 5), completion(4, 4, 5))
    group = replace(group, group=replace(group.group, trajectories=completions))

    batch = SequenceBatch.from_groups([group], version=5, max_staleness=1)

    assert batch.on_policy.tolist() == [True, False, False], "the second waited for the weights with an older prefix"
    assert batch.staleness.tolist() == [0, 0, 0, 0, 1, 0]


def test_tokens_that_are_too_stale_do_not_enter_the_losses() -> None:
    groups = [
        scored_group(1, [1, 2], [([3], "stop"), ([4, 5, 6], "length")]),
        scored_group(2, [7], [([8, 9], "stop")]),
    ]

    batch = SequenceBatch.from_groups(groups, version=5, max_staleness=3)

    # Of the second completion only the last token was written by version 2.
    assert batch.loss_lengths.tolist() == [1, 1, 2]
    assert batch.sampled_lengths.tolist() == [1, 3, 2]
    assert batch.loss_mask.tolist() == [True, False, False, True, True, True]
    assert batch.padded(batch.loss_mask).tolist() == [[True, False, False], [False, False, True], [True, True, False]]
    assert batch.staleness[batch.loss_mask].max() == 3
    assert batch.select([1]).loss_mask.tolist() == [False, False, True]
    nothing = SequenceBatch.from_groups(groups[:1], version=9, max_staleness=3)
    assert nothing.loss_lengths.tolist() == [0, 0]


def test_from_groups_keeps_the_narrow_types_that_travel() -> None:
    batch = two_groups()

    assert batch.token_ids.dtype == batch.prompt_lengths.dtype == batch.completion_lengths.dtype == np.int32
    assert batch.lengths.dtype == batch.sampled_lengths.dtype == batch.loss_lengths.dtype == np.int32
    assert batch.turn_ids.dtype == batch.staleness.dtype == np.int32
    assert batch.sampling_logprobs.dtype == batch.rewards.dtype == batch.greedy_rewards.dtype == np.float32
    assert batch.loss_mask.dtype == np.bool_
    # Wide: rewards of turns add up to a float32 reward exactly.
    assert batch.token_rewards.dtype == np.float64


def test_select_takes_ragged_pieces_in_the_order_asked_for() -> None:
    picked = two_groups().select([2, 0])

    assert picked.token_ids.tolist() == [7, 8, 9, 1, 2, 3]
    assert picked.prompt_lengths.tolist() == [1, 2]
    assert picked.completion_lengths.tolist() == [2, 1]
    assert picked.truncated.tolist() == [False, False]
    np.testing.assert_allclose(picked.rewards, [2.0, 1.0])
    np.testing.assert_allclose(picked.sampling_logprobs, [-2.0, -2.01, -1.0], rtol=1e-6)


def test_select_all_in_order_changes_nothing_and_selections_compose() -> None:
    batch = two_groups()

    same = batch.select(range(3))
    twice = batch.select([2, 1, 0]).select([1, 2])
    once = batch.select([1, 0])

    for name in SequenceBatch.__slots__:
        np.testing.assert_array_equal(getattr(same, name), getattr(batch, name))
        np.testing.assert_array_equal(getattr(twice, name), getattr(once, name))


def test_a_rank_without_work_gets_an_empty_batch_of_the_same_types() -> None:
    batch = two_groups()
    empty = batch.select([])

    assert len(empty) == 0
    for name in SequenceBatch.__slots__:
        assert getattr(empty, name).shape == (0,)
        assert getattr(empty, name).dtype == getattr(batch, name).dtype


def two_turns() -> ScoredGroup:
    """``3 4``, observed ``5 6 7``, ``8``, with a reward of 0.25 for the first turn; and a completion of one turn.

    The environment's weight is 2.
    """
    trajectory = Trajectory(
        token_ids=np.asarray([3, 4, 5, 6, 7, 8], dtype=np.int32),
        sampling_logprobs=np.asarray([-1, -2, 0, 0, 0, -3], dtype=np.float32),
        turns=(Turn(start=0, end=2, reward=0.25), Turn(start=5, end=6)),
        version_spans=(
            VersionSpan(version=3, start=0, end=1),
            VersionSpan(version=4, start=1, end=2),
            VersionSpan(version=5, start=5, end=6),
        ),
        asked_version=3,
        finish_reason="stop",
    )
    group = scored_group(1, [1, 2], [([], "stop"), ([9, 9], "stop")])
    trajectories = (trajectory, group.group.trajectories[1])
    return replace(
        group,
        group=replace(group.group, trajectories=trajectories),
        rewards=np.asarray([1.5, 2.0], dtype=np.float32),
        environment_weight=2.0,
    )


def test_observed_tokens_enter_no_loss_and_have_no_reward_and_no_staleness() -> None:
    batch = SequenceBatch.from_groups([two_turns()], version=5, max_staleness=1).select([0])

    assert batch.completion_lengths.tolist() == [6]
    assert batch.turn_ids.tolist() == [0, 0, -1, -1, -1, 1]
    assert batch.sampled.tolist() == [True, True, False, False, False, True]
    assert batch.loss_mask.tolist() == [False, True, False, False, False, True]
    assert batch.staleness.tolist() == [2, 1, 0, 0, 0, 0]
    assert batch.token_rewards.tolist() == [0, 0.5, 0, 0, 0, 1]
    assert (batch.sampled_lengths.tolist(), batch.loss_lengths.tolist()) == ([3], [2])
    assert batch.rewards.tolist() == [1.5]
    assert batch.on_policy.tolist() == [False]


def test_new_rewards_of_whole_trajectories_leave_those_of_turns_where_they_are() -> None:
    batch = SequenceBatch.from_groups([two_turns()], version=5, max_staleness=1)

    shaped = batch.with_rewards(np.asarray([5.0, 7.0], dtype=np.float32), scale=2.0)

    assert shaped.token_rewards.tolist() == [0, 1, 0, 0, 0, 4, 0, 7]
    assert shaped.rewards.tolist() == [5, 7]
    assert batch.rewards.tolist() == [1.5, 2]


def test_a_completion_of_one_turn_has_its_reward_at_its_last_token_bit_for_bit() -> None:
    rewards = np.asarray([0.1, -1e-30, np.nan], dtype=np.float32)
    batch = SequenceBatch.single_turn(
        token_ids=np.arange(9, dtype=np.int32),
        prompt_lengths=np.ones(3, dtype=np.int32),
        completion_lengths=np.asarray([3, 1, 2], dtype=np.int32),
        rewards=rewards,
    )

    assert batch.rewards.tobytes() == rewards.tobytes()
    assert batch.token_rewards[[2, 3, 5]].astype(np.float32).tobytes() == rewards.tobytes()
    assert batch.select([2, 0]).rewards.tobytes() == rewards[[2, 0]].tobytes()


def rewritten_history() -> ScoredGroup:
    """The first trajectory goes on after ``7``: it samples ``8``, observes ``5``, samples ``4``, and is cut then."""
    further = Trajectory(
        token_ids=np.asarray([8, 5, 4], dtype=np.int32),
        sampling_logprobs=np.asarray([-4, 0, -5], dtype=np.float32),
        turns=(Turn(start=0, end=1, reward=0.5), Turn(start=2, end=3, reward=-1.0)),
        version_spans=(VersionSpan(version=5, start=0, end=1), VersionSpan(version=5, start=2, end=3)),
        asked_version=5,
        finish_reason="stop",
    )
    group = two_turns()
    first, second = group.group.trajectories
    sequence = FurtherSequence(prompt_token_ids=np.asarray([7], dtype=np.int32), trajectory=further)
    first = replace(first, finish_reason="turns", further=(sequence,))
    return replace(group, group=replace(group.group, trajectories=(first, second)))


def test_a_trajectory_has_a_row_for_each_of_its_sequences() -> None:
    batch = SequenceBatch.from_groups([rewritten_history(), two_turns()], version=5, max_staleness=2)

    assert batch.select([0, 1, 2]).token_ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 7, 8, 5, 4, 1, 2, 9, 9]
    assert batch.prompt_lengths.tolist() == [2, 1, 2, 2, 2]
    assert batch.completion_lengths.tolist() == [6, 3, 2, 6, 2]
    assert batch.trajectory_ids.tolist() == batch.of_trajectory.tolist() == [0, 0, 1, 2, 3]
    assert batch.last_sequences.tolist() == [1, 2, 3, 4]
    assert batch.turn_ids.tolist()[:11] == [0, 0, -1, -1, -1, 1, 2, -1, 3, 0, 0]
    # The continuation of the first sequence is the second, which is where the limit cut.
    assert batch.truncated.tolist() == [False, True, False, False, False]
    assert batch.on_policy.tolist() == [False, True, False, False, False]
    # Twice 0.25 and 0.5 for turns; of 1.5 in all that leaves 0, whatever the last turn had.
    assert batch.token_rewards.tolist()[:11] == [0, 0.5, 0, 0, 0, 0, 1, 0, 0, 0, 2]
    assert batch.rewards.tolist() == [1.5, 2, 1.5, 2]
    assert batch.per_trajectory(batch.sampled_lengths).tolist() == [5, 2, 3, 2]


def test_new_rewards_are_left_to_the_last_sequence_of_a_trajectory() -> None:
    batch = SequenceBatch.from_groups([rewritten_history()], version=5, max_staleness=2)

    shaped = batch.with_rewards(np.asarray([5.0, 7.0], dtype=np.float32), scale=2.0)

    assert shaped.token_rewards.tolist() == [0, 1, 0, 0, 0, 0, 2, 0, 2, 0, 7]
    assert shaped.rewards.tolist() == [5, 7]


def test_a_last_sequence_without_a_sampled_token_leaves_the_reward_to_the_one_before() -> None:
    batch = SequenceBatch.from_groups([rewritten_history()], version=5, max_staleness=2)
    batch = replace(batch, turn_ids=np.where(np.arange(11) < 6, batch.turn_ids, -1), token_rewards=np.zeros(11))

    assert batch.with_rewards(np.asarray([5.0, 7.0], dtype=np.float32)).token_rewards.tolist()[5] == 5
    assert batch.with_rewards(np.asarray([5.0, 7.0], dtype=np.float32)).rewards.tolist() == [5, 0]


def test_the_reward_of_a_turn_without_tokens_is_left_to_the_end() -> None:
    group = two_turns()
    first = group.group.trajectories[0]
    turns = (first.turns[0], Turn(start=3, end=3, reward=9.0), first.turns[1])
    trajectories = (replace(first, turns=turns), group.group.trajectories[1])

    batch = SequenceBatch.from_groups(
        [replace(group, group=replace(group.group, trajectories=trajectories))], version=5, max_staleness=2
    )

    assert batch.token_rewards.tolist() == [0, 0.5, 0, 0, 0, 1, 0, 2]


def test_rewards_of_turns_that_cancel_leave_exactly_the_reward() -> None:
    group = rewritten_history()
    first = group.group.trajectories[0]
    turns = tuple(replace(turn, reward=reward) for turn, reward in zip(first.turns, (0.1, 0.7), strict=True))
    for reward in (0.0, 0.3, -1.1):
        changed = replace(
            group,
            group=replace(group.group, trajectories=(replace(first, turns=turns), group.group.trajectories[1])),
            rewards=np.asarray([reward, 2.0], dtype=np.float32),
            environment_weight=1 / 3,
        )
        batch = SequenceBatch.from_groups([changed], version=5, max_staleness=2)
        assert batch.rewards.tolist() == [np.float32(reward), 2.0]


def back_and_forth(finish_reason: str = "stop") -> ScoredGroup:
    """An agent asks, has a part of it answered in a conversation of its own, and goes on in the first one."""
    first = Trajectory(
        token_ids=np.asarray([1, 2, 9, 3], dtype=np.int32),
        sampling_logprobs=np.asarray([-1, -1, 0, -1], dtype=np.float32),
        turns=(Turn(start=0, end=2, number=0, reward=0.5), Turn(start=3, end=4, number=4)),
        version_spans=(VersionSpan(version=5, start=0, end=2), VersionSpan(version=5, start=3, end=4)),
        asked_version=5,
        finish_reason=finish_reason,
    )
    between = replace(
        first,
        token_ids=np.asarray([6, 7], dtype=np.int32),
        sampling_logprobs=np.asarray([-1, -1], dtype=np.float32),
        turns=(Turn(start=0, end=2, number=2),),
        version_spans=(VersionSpan(version=5, start=0, end=2),),
    )
    further = FurtherSequence(prompt_token_ids=np.asarray([8], dtype=np.int32), trajectory=between)
    group = two_turns()
    return replace(
        group,
        group=replace(group.group, trajectories=(replace(first, further=(further,)),)),
        rewards=np.asarray([2.0], dtype=np.float32),
        environment_weight=1.0,
    )


def test_turns_of_a_trajectory_are_in_the_order_in_which_they_were_asked() -> None:
    batch = SequenceBatch.from_groups([back_and_forth("length")], version=5, max_staleness=2)

    assert batch.turn_ids.tolist() == [0, 0, -1, 2, 1, 1]
    assert batch.in_time.tolist() == [0, 1, 2, 4, 5, 3]
    assert batch.last_sequences.tolist() == [0]
    assert batch.truncated.tolist() == [True, False], "what follows is asked after the last turn"
    assert batch.token_rewards.tolist() == [0, 0.5, 0, 1.5, 0, 0]
    assert batch.rewards.tolist() == [2]


def test_credit_reaches_a_turn_of_another_sequence_that_was_asked_between() -> None:
    batch = SequenceBatch.from_groups([back_and_forth()], version=5, max_staleness=2)
    rows = TrajectoryRows(batch, torch.device("cpu"))
    rewards, mask = torch.from_numpy(batch.padded(batch.token_rewards)), torch.from_numpy(batch.padded(batch.loss_mask))
    values = torch.tensor([[0.0, 1.0, 77.0, 4.0], [2.0, 3.0, 0.0, 0.0]])

    assert rows.join(values).tolist() == [[0, 1, 77, 2, 3, 4]]
    advantages, _ = gae(rows.join(rewards.float()), rows.join(values), rows.join(mask), gamma=1.0, lam=1.0)

    # The rewards that are still to come, 0.5 after the second token and 1.5 after the last, less the value.
    assert rows.split(advantages).tolist() == [[2.0, 1.0, 0.0, -2.5], [-0.5, -1.5, 0.0, 0.0]]


def test_a_trajectory_is_successful_from_a_reward_on() -> None:
    groups = [rewritten_history(), two_turns()]
    batch = SequenceBatch.from_groups(groups, version=5, max_staleness=2, min_success=2.0)
    assert batch.rewards.tolist() == [1.5, 2, 1.5, 2]
    assert batch.successful.tolist() == [False, False, True, False, True]
    assert not SequenceBatch.from_groups(groups, version=5, max_staleness=2).successful.any()


def with_helpers(finish_reason: str = "stop", *, waits: bool = True) -> ScoredGroup:
    """An agent asks, has two helpers at once, and goes on in the first conversation, or returns when all three did."""

    def sequence(tokens: list[int], *turns: Turn) -> Trajectory:
        logprobs = np.zeros(len(tokens), dtype=np.float32)
        for turn in turns:
            logprobs[turn.start : turn.end] = -1
        return Trajectory(
            token_ids=np.asarray(tokens, dtype=np.int32),
            sampling_logprobs=logprobs,
            turns=turns,
            version_spans=tuple(VersionSpan(version=5, start=turn.start, end=turn.end) for turn in turns),
            asked_version=5,
            finish_reason=finish_reason,
        )

    after = (1, 5, 5, 5) if waits else (5, 1, 2, 5)
    first = sequence(
        [1, 2, 9, 3], Turn(start=0, end=2, number=0, follower=after[0]), Turn(start=3, end=4, number=5, follower=5)
    )
    helpers = (
        sequence([4], Turn(start=0, end=1, number=1, follower=after[1])),
        sequence([6, 7], Turn(start=0, end=2, number=2, follower=after[2])),
    )
    prompt = np.asarray([8], dtype=np.int32)
    further = tuple(FurtherSequence(prompt_token_ids=prompt, trajectory=each) for each in helpers)
    group = two_turns()
    return replace(
        group,
        group=replace(group.group, trajectories=(replace(first, further=further),)),
        rewards=np.asarray([1.0], dtype=np.float32),
    )


# Of the tokens 1 2 . 3, then 4, then 6 7.
HELPED_VALUES = torch.tensor([[0.5, 0.5, 77.0, 0.7], [0.4, 0.0, 0.0, 0.0], [0.2, 0.6, 0.0, 0.0]])
HELPED_BOOTSTRAP = torch.tensor([0.25, 0.75, 0.5])


def gae_of(group: ScoredGroup, *, lam: float, values: torch.Tensor = HELPED_VALUES) -> list[list[float]]:
    batch = SequenceBatch.from_groups([group], version=5, max_staleness=2)
    rows = TrajectoryRows(batch, torch.device("cpu"))
    rewards = torch.from_numpy(batch.padded(batch.token_rewards)).float()
    advantages, _ = gae(
        rows.join_rewards(rewards, rewards),
        rows.join(values),
        rows.join(torch.from_numpy(batch.padded(batch.loss_mask))),
        gamma=1.0,
        lam=lam,
        bootstrap=(HELPED_BOOTSTRAP * torch.from_numpy(batch.truncated))[rows.ends],
    )
    return [[round(value, 6) for value in row] for row in rows.split(advantages).tolist()]


def test_turns_in_parallel_pass_credit_on_to_what_waited_for_both() -> None:
    # Of 3: 1 - 0.7. Of 4: 0.7 - 0.4, and half of that. Of 7: 0.7 - 0.6, and half of the first; of 6: 0.6 - 0.2, and
    # half of 7's. Of 2, by way of 4: 0.4 - 0.5, and half of 4's; of 1: half of 2's.
    assert gae_of(with_helpers(), lam=0.5) == [[0.0625, 0.125, 0.0, 0.3], [0.45, 0, 0, 0], [0.525, 0.25, 0, 0]]
    # Return minus value.
    assert gae_of(with_helpers(), lam=1.0) == [[0.5, 0.5, 0.0, 0.3], [0.6, 0, 0, 0], [0.8, 0.4, 0, 0]]


def test_turns_that_nothing_comes_after_have_the_reward_of_the_end() -> None:
    group = with_helpers(waits=False)
    # Of 4: 1 - 0.4. Of 7: 1 - 0.6. Of 2, by way of 3: 0.7 - 0.5, and half of 3's.
    assert gae_of(group, lam=0.5) == [[0.175, 0.35, 0.0, 0.3], [0.6, 0, 0, 0], [0.6, 0.4, 0, 0]]
    assert gae_of(group, lam=1.0) == [[0.5, 0.5, 0.0, 0.3], [0.6, 0, 0, 0], [0.8, 0.4, 0, 0]]


def test_each_last_turn_of_a_truncated_trajectory_bootstraps_by_itself() -> None:
    batch = SequenceBatch.from_groups([with_helpers("length")], version=5, max_staleness=2)
    assert batch.truncated.tolist() == [True, False, False]
    apart = with_helpers("length", waits=False)
    assert SequenceBatch.from_groups([apart], version=5, max_staleness=2).truncated.tolist() == [True, True, True]
    # The reward, and 0.25, 0.75 or 0.5 of what would follow, less the values.
    assert gae_of(apart, lam=1.0) == [[0.75, 0.75, 0.0, 0.55], [1.35, 0, 0, 0], [1.3, 0.9, 0, 0]]


def test_values_of_one_turn_are_of_no_consequence_for_another_in_parallel() -> None:
    values = HELPED_VALUES.clone()
    values[2] = torch.tensor([50.0, -30.0, 0.0, 0.0])
    for waits in (True, False):
        group = with_helpers(waits=waits)
        assert gae_of(group, lam=0.5, values=values)[:2] == gae_of(group, lam=0.5)[:2]
