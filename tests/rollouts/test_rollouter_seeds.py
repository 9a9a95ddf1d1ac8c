from __future__ import annotations

import itertools

from rlhf_ray.rollouts.rollouter import group_seed

GOLDEN = (379770258895461793, 1058162205549500084)


def test_seed_is_the_same_in_every_process_and_release() -> None:
    # Changing these would change what a resumed run samples.
    assert group_seed(0, 0, 0) == GOLDEN[0]
    assert group_seed(1, 7, 123) == GOLDEN[1]


def test_every_part_changes_the_seed() -> None:
    seeds = {group_seed(run, version, prompt) for run in range(4) for version in range(6) for prompt in range(50)}

    assert len(seeds) == 4 * 6 * 50


def test_parts_are_kept_apart() -> None:
    assert group_seed(1, 11, 1) != group_seed(11, 1, 1) != group_seed(1, 1, 11)


def test_groups_of_samples_do_not_overlap() -> None:
    """The i-th completion's seed is the group's plus i: two groups of 64 must not share one."""
    seeds = sorted(group_seed(0, 0, prompt) for prompt in range(2000))

    assert min(after - before for before, after in itertools.pairwise(seeds)) > 64


def test_seed_leaves_room_in_a_signed_64_bit_integer() -> None:
    assert all(0 <= group_seed(run, 3, 5) < 2**62 for run in range(200))
