from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest

from rlhf_ray.learner import packing as module
from rlhf_ray.learner.packing import UpdatePlan, attention_length, plan_update


def lengths_of(n: int, seed: int = 0) -> tuple[list[int], list[int]]:
    """Random prompt plus completion lengths, and the completion lengths within them."""
    rng = np.random.default_rng(seed)
    completions = rng.geometric(0.2, size=n)
    return (completions + rng.integers(1, 9, size=n)).tolist(), completions.tolist()


def plan_of(lengths: list[int], completions: list[int] | None = None, **overrides: Any) -> UpdatePlan:
    arguments: dict[str, Any] = {
        "num_minibatches": 2,
        "num_epochs": 1,
        "num_ranks": 1,
        "max_tokens": 32,
        "attention_length": 100.0,
        "packed": False,
        "seed": 7,
    }
    return plan_update(lengths, completions or lengths, **arguments | overrides)


def minibatch_members(plan: UpdatePlan, index: int) -> set[int]:
    """Indices into the batch that any rank reads in one minibatch."""
    return {
        plan.sequences[rank][local]
        for rank, share in enumerate(plan.ranks)
        for microbatch in share.minibatches[index].microbatches
        for local in microbatch
    }


SPLITS = [
    (n, ranks, minibatches)
    for n in (1, 5, 16, 37)
    for ranks in (1, 2, 3)
    for minibatches in (1, 2, 5)
    if minibatches <= n
]


@pytest.mark.parametrize(("n", "ranks", "minibatches"), SPLITS)
@pytest.mark.parametrize("packed", [False, True])
def test_every_sequence_is_read_once_an_epoch_in_minibatches_of_even_size(
    n: int, ranks: int, minibatches: int, packed: bool
) -> None:
    lengths, completions = lengths_of(n)
    plan = plan_of(lengths, completions, num_ranks=ranks, num_minibatches=minibatches, packed=packed)

    held = Counter(index for share in plan.sequences for index in share)
    assert held == Counter(range(n))
    for rank, share in enumerate(plan.ranks):
        read = [local for m in share.minibatches for microbatch in m.microbatches for local in microbatch]
        assert sorted(read) == list(range(len(plan.sequences[rank])))
    members = [minibatch_members(plan, index) for index in range(minibatches)]
    assert set.union(*members) == set(range(n))
    sizes = [len(m) for m in members]
    assert sum(sizes) == n
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_minibatches_and_their_denominators_do_not_depend_on_the_number_of_ranks(ranks: int) -> None:
    lengths, completions = lengths_of(23)
    one = plan_of(lengths, completions, num_minibatches=4)
    many = plan_of(lengths, completions, num_minibatches=4, num_ranks=ranks)

    for index in range(4):
        assert minibatch_members(one, index) == minibatch_members(many, index)
        for share in many.ranks:
            assert share.minibatches[index].completion_lengths == one.ranks[0].minibatches[index].completion_lengths


def test_denominators_are_the_completion_lengths_of_the_minibatch() -> None:
    lengths, completions = lengths_of(11)
    plan = plan_of(lengths, completions, num_minibatches=3, num_ranks=2)

    for index in range(3):
        wanted = sorted(completions[i] for i in minibatch_members(plan, index))
        assert sorted(plan.ranks[0].minibatches[index].completion_lengths) == wanted


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
def test_microbatches_keep_the_token_budget_unless_a_sequence_is_longer_by_itself(packed: bool, ranks: int) -> None:
    lengths, completions = lengths_of(60)
    budget = 24
    assert max(lengths) > budget, "the case of a longer sequence must occur"
    plan = plan_of(lengths, completions, num_ranks=ranks, max_tokens=budget, packed=packed)

    for rank, share in enumerate(plan.ranks):
        for microbatch in (m for minibatch in share.minibatches for m in minibatch.microbatches):
            own = [lengths[plan.sequences[rank][local]] for local in microbatch]
            tokens = sum(own) if packed else max(own, default=0) * len(own)
            assert tokens <= budget or len(own) == 1


def test_budget_is_used_up_padded_and_packed_by_hand() -> None:
    lengths = [4, 2, 3, 3]

    padded = plan_of(lengths, num_minibatches=1, max_tokens=8)
    packed = plan_of(lengths, num_minibatches=1, max_tokens=9, packed=True)

    # Longest first: 4, 3, 3, 2. Padded to width 4 two fit into 8 tokens; then two of width 3.
    assert [len(m) for m in padded.ranks[0].minibatches[0].microbatches] == [2, 2]
    # 4 + 3 = 7, one more of 3 would make 10; then 3 + 2.
    assert [len(m) for m in packed.ranks[0].minibatches[0].microbatches] == [2, 2]
    assert padded.sequences == packed.sequences == ((0, 2, 3, 1),)


def test_padding_fraction_by_hand() -> None:
    lengths = [4, 2, 3, 3]

    # Rectangles of 2 x 4 and 2 x 3 hold 14 tokens for 12 real ones.
    assert plan_of(lengths, num_minibatches=1, max_tokens=8).padding_fraction == pytest.approx(2 / 14)
    # One rectangle of 4 x 4.
    assert plan_of(lengths, num_minibatches=1, max_tokens=16).padding_fraction == pytest.approx(4 / 16)
    assert plan_of(lengths, num_minibatches=1, max_tokens=1).padding_fraction == 0.0
    assert plan_of(lengths, num_minibatches=1, max_tokens=9, packed=True).padding_fraction == 0.0


@pytest.mark.parametrize("seed", range(20))
def test_padded_rows_are_cut_where_it_costs_least(seed: int) -> None:
    """Against every way to cut a short row of sequences."""
    rng = np.random.default_rng(seed)
    lengths = sorted(rng.integers(1, 400, size=8).tolist(), reverse=True)
    budget = int(rng.integers(200, 1500))

    def cost(cuts: tuple[int, ...]) -> float:
        parts = [lengths[start:end] for start, end in itertools.pairwise((0, *cuts, len(lengths)))]
        if any(len(part) > 1 and max(part) * len(part) > budget for part in parts):
            return math.inf
        return sum(max(part) * len(part) + module._PASS_TOKENS for part in parts)

    every = (cuts for size in range(len(lengths)) for cuts in itertools.combinations(range(1, len(lengths)), size))
    found = plan_of(lengths, num_minibatches=1, max_tokens=budget).ranks[0].minibatches[0].microbatches

    ends = tuple(itertools.accumulate(len(part) for part in found))[:-1]
    assert cost(ends) == min(map(cost, every))


def test_a_sequence_longer_than_the_budget_is_alone() -> None:
    lengths = [2, 50, 2, 2]

    microbatches = plan_of(lengths, num_minibatches=1, max_tokens=6).ranks[0].minibatches[0].microbatches

    assert [len(m) for m in microbatches] == [1, 3]


def test_ranks_have_the_same_number_of_microbatches_and_empty_ones_where_they_lack_work() -> None:
    # Longest first, back and forth: rank 0 gets one sequence, rank 1 two.
    plan = plan_of([5, 4, 3], num_minibatches=1, num_ranks=2, max_tokens=1)

    assert plan.ranks[0].minibatches[0].microbatches == ((0,), ())
    assert plan.ranks[1].minibatches[0].microbatches == ((0,), (1,))
    assert plan.sequences == ((0,), (1, 2))


@pytest.mark.parametrize(("n", "ranks", "minibatches"), SPLITS)
def test_ranks_stay_in_step(n: int, ranks: int, minibatches: int) -> None:
    lengths, completions = lengths_of(n)
    plan = plan_of(lengths, completions, num_ranks=ranks, num_minibatches=minibatches, max_tokens=16)

    for index in range(minibatches):
        counts = {len(share.minibatches[index].microbatches) for share in plan.ranks}
        assert len(counts) == 1
        assert counts.pop() > 0
    assert len({share.epochs for share in plan.ranks}) == 1


def test_ranks_hold_about_the_same_tokens() -> None:
    lengths, completions = lengths_of(64)
    plan = plan_of(lengths, completions, num_ranks=2, num_minibatches=1)

    tokens = [sum(lengths[i] for i in share) for share in plan.sequences]
    assert abs(tokens[0] - tokens[1]) <= max(lengths)


def test_each_epoch_is_a_permutation_of_the_minibatches_and_the_first_is_in_order() -> None:
    lengths, completions = lengths_of(30)
    epochs = plan_of(lengths, completions, num_minibatches=6, num_epochs=5).ranks[0].epochs

    assert epochs[0] == (0, 1, 2, 3, 4, 5)
    assert all(sorted(epoch) == [0, 1, 2, 3, 4, 5] for epoch in epochs)
    assert len(set(epochs)) > 1, "later epochs are shuffled"


def test_the_seed_alone_decides_the_partition() -> None:
    lengths, completions = lengths_of(20)
    arguments = {"num_minibatches": 3, "num_epochs": 3, "num_ranks": 2}

    assert plan_of(lengths, completions, seed=1, **arguments) == plan_of(lengths, completions, seed=1, **arguments)
    first, other = (plan_of(lengths, completions, seed=seed, **arguments) for seed in (1, 2))
    assert minibatch_members(first, 0) != minibatch_members(other, 0)


def test_more_epochs_do_not_change_the_partition() -> None:
    lengths, completions = lengths_of(20)

    assert plan_of(lengths, completions).sequences == plan_of(lengths, completions, num_epochs=4).sequences


def work_of(plan: UpdatePlan, lengths: list[int], attention_length: float) -> list[float]:
    """Operations of each rank, in those of one token without attention."""
    return [sum(lengths[i] * (1 + lengths[i] / attention_length) for i in share) for share in plan.sequences]


def test_ranks_get_the_same_operations_and_not_the_same_tokens() -> None:
    # Attention of 400 tokens costs 4 times the rest: 2,000 in all, as much as 1,600 tokens in rows of 25.
    lengths = [400] + [25] * 80
    by_work = plan_of(lengths, num_ranks=2, num_minibatches=1, max_tokens=400, attention_length=100.0)
    by_tokens = plan_of(lengths, num_ranks=2, num_minibatches=1, max_tokens=400, attention_length=math.inf)

    assert work_of(by_work, lengths, 100.0) == [2250.0, 2250.0]
    tokens = [sum(lengths[i] for i in share) for share in by_tokens.sequences]
    assert tokens == [1200, 1200]
    assert work_of(by_tokens, lengths, 100.0) == [3000.0, 1500.0]


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_no_rank_has_a_long_sequence_more_to_do_than_another(ranks: int) -> None:
    lengths, completions = lengths_of(200, seed=3)
    plan = plan_of(lengths, completions, num_ranks=ranks, num_minibatches=1, attention_length=20.0)

    work = work_of(plan, lengths, 20.0)
    longest = max(lengths) * (1 + max(lengths) / 20.0)
    assert max(work) - min(work) <= longest


def test_attention_costs_what_the_rest_does_at_twelve_hidden_sizes() -> None:
    assert attention_length(128) == 1536.0


def of_trajectories(n: int, seed: int = 0) -> list[int]:
    """Trajectory of each of ``n`` sequences: runs of 1 to 4."""
    rng = np.random.default_rng(seed)
    return np.repeat(np.arange(n), rng.integers(1, 5, size=n))[:n].tolist()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("ranks", "minibatches"), [(1, 1), (2, 3), (3, 2)])
def test_sequences_of_a_trajectory_stay_together_in_order(ranks: int, minibatches: int, packed: bool) -> None:
    lengths, completions = lengths_of(40)
    of = of_trajectories(40)
    plan = plan_of(lengths, completions, num_ranks=ranks, num_minibatches=minibatches, packed=packed, of_trajectory=of)

    held = [index for share in plan.sequences for index in share]
    assert sorted(held) == list(range(40))
    # Adjacent and in order, as they are in the batch.
    for share in plan.sequences:
        runs = [list(own) for _, own in itertools.groupby(share, key=lambda i: of[i])]
        assert all(run == [i for i in range(40) if of[i] == of[run[0]]] for run in runs)
    members = [{of[i] for i in minibatch_members(plan, index)} for index in range(minibatches)]
    assert sum(map(len, members)) == len(set(of)) == len(set.union(*members))
    assert max(map(len, members)) - min(map(len, members)) <= 1
    for index in range(minibatches):
        wanted = sorted(sum(n for n, t in zip(completions, of, strict=True) if t == own) for own in members[index])
        for share in plan.ranks:
            assert sorted(share.minibatches[index].completion_lengths) == wanted
    for rank, share in enumerate(plan.ranks):
        for microbatch in (m for minibatch in share.minibatches for m in minibatch.microbatches):
            own = [lengths[plan.sequences[rank][local]] for local in microbatch]
            assert (sum(own) if packed else max(own, default=0) * len(own)) <= 32 or len(own) == 1


def test_a_trajectory_may_be_longer_than_a_microbatch() -> None:
    plan = plan_of([8, 3, 8, 5], num_minibatches=1, max_tokens=8, packed=True, of_trajectory=[0, 0, 0, 1])

    assert plan.sequences == ((0, 1, 2, 3),)
    # Longest first: 8, 8, then 5 with 3.
    assert plan.ranks[0].minibatches[0].microbatches == ((0,), (2,), (3, 1))
    assert plan.ranks[0].minibatches[0].completion_lengths in ((19, 5), (5, 19))


def test_ranks_get_the_same_work_where_trajectories_differ_in_sequences() -> None:
    # One trajectory of three sequences of 10 against three of one.
    plan = plan_of([10] * 6, num_minibatches=1, num_ranks=2, of_trajectory=[0, 1, 1, 1, 2, 3])

    assert plan.sequences == ((1, 2, 3), (0, 4, 5))


@pytest.mark.parametrize(("n", "ranks", "minibatches"), SPLITS)
def test_trajectories_of_one_sequence_are_planned_as_sequences(n: int, ranks: int, minibatches: int) -> None:
    lengths, completions = lengths_of(n)
    arguments = {"num_ranks": ranks, "num_minibatches": minibatches, "num_epochs": 2}

    assert plan_of(lengths, completions, of_trajectory=list(range(n)), **arguments) == plan_of(
        lengths, completions, **arguments
    )
