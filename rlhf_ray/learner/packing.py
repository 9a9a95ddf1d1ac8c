"""Plans an update on the driver: which trajectory is in which minibatch on which rank, in which microbatches.

Consumes lengths only. A sequence keeps its minibatch, rank and microbatch for the whole update, so that old and new
log-probabilities are computed in the same packing and the first ratio is exactly 1. Sequences of one trajectory share
minibatch and rank, where credit passes between them, but not always the microbatch.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Minibatch", "RankPlan", "UpdatePlan", "attention_length", "plan_update"]

Indices = tuple[int, ...]

# What a forward and backward pass costs whatever it holds, in tokens. With the quickstart's model on two cores, values
# from 30 to 200 take the same time within 2 %; 35 passes where 18 would do take 4 % more.
_PASS_TOKENS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Minibatch:
    """What one optimizer step reads."""

    microbatches: tuple[Indices, ...]
    """Indices into the rank's own sequences; an empty entry keeps ranks in step where one has less to do."""
    completion_lengths: tuple[int, ...]
    """Tokens in the losses, of every trajectory of the minibatch over *all* ranks: the global denominator."""
    successful_tokens: int = 0
    """Those of successful trajectories."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPlan:
    """One rank's share."""

    sequences: Indices
    """Which sequences of the batch it holds, in its local order: those of a trajectory are adjacent, in order."""
    minibatches: tuple[Minibatch, ...]
    epochs: tuple[Indices, ...]
    """Order of the minibatches in each epoch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdatePlan:
    """The whole update."""

    ranks: tuple[RankPlan, ...]
    padding_fraction: float
    """Share of the planned tokens that is padding."""

    @property
    def sequences(self) -> tuple[Indices, ...]:
        """Per rank: which sequences of the batch it holds, in its local order."""
        return tuple(rank.sequences for rank in self.ranks)


def attention_length(hidden_size: int) -> float:
    """Length at which causal attention costs as many operations as the linear layers of a transformer, in tokens.

    With ``d`` the hidden size, a layer's linear parts have about ``12 d^2`` parameters: ``24 d^2`` operations per
    token. Attention over ``L / 2`` earlier tokens on average takes ``2 d L``. They are equal at ``L = 12 d``.
    """
    return 12.0 * hidden_size


def plan_update(
    lengths: Sequence[int],
    completion_lengths: Sequence[int],
    *,
    num_minibatches: int,
    num_epochs: int,
    num_ranks: int,
    max_tokens: int,
    attention_length: float,
    packed: bool,
    seed: int,
    of_trajectory: Sequence[int] | None = None,
    successful: Sequence[bool] | None = None,
) -> UpdatePlan:
    """Split a batch.

    Minibatches are a seeded random partition of trajectories (sizes differ by at most one) and do not depend on the
    number of ranks. Within one, trajectories are dealt to ranks so that all compute about the same number of
    operations, attention included, then their sequences are cut into microbatches of at most ``max_tokens``: the padded
    rectangle, or the sum of lengths where rows are ``packed``.

    Args:
        lengths: ``[N]`` prompt plus completion tokens.
        completion_lengths: ``[N]`` tokens that enter the losses.
        num_minibatches: Optimizer steps per epoch.
        num_epochs: Passes over the batch; the order of minibatches is drawn again for each after the first.
        num_ranks: Learners.
        max_tokens: Tokens in a microbatch; a longer sequence is alone in its own.
        attention_length: Length at which a sequence's attention costs what the rest of the model does, in tokens: see
            :func:`attention_length`. Infinity counts tokens alone.
        packed: Whether rows are packed instead of padded.
        seed: Of the partition.
        of_trajectory: ``[N]`` index of each sequence's trajectory, from 0; unset: each sequence is one.
        successful: ``[N]``, which sequences are of successful trajectories; unset: none.
    """
    of_trajectory = range(len(lengths)) if of_trajectory is None else of_trajectory
    members: list[list[int]] = [[] for _ in range(max(of_trajectory, default=-1) + 1)]
    for index, trajectory in enumerate(of_trajectory):
        members[trajectory].append(index)
    work = [sum(lengths[i] * (1.0 + lengths[i] / attention_length) for i in own) for own in members]
    rng = np.random.default_rng(seed)
    parts = np.array_split(rng.permutation(len(members)), num_minibatches)
    epochs = tuple(
        tuple(range(num_minibatches)) if epoch == 0 else tuple(int(i) for i in rng.permutation(num_minibatches))
        for epoch in range(num_epochs)
    )
    local: list[list[int]] = [[] for _ in range(num_ranks)]
    minibatches: list[list[Minibatch]] = [[] for _ in range(num_ranks)]
    planned = 0
    for part in parts:
        shares = _deal([int(i) for i in part], work, num_ranks)
        longest_first = [
            sorted((i for each in share for i in members[each]), key=lambda i: (-lengths[i], i)) for share in shares
        ]
        split = [_microbatches(own, lengths, max_tokens, packed=packed) for own in longest_first]
        count = max(len(microbatches) for microbatches in split)
        totals = tuple(sum(int(completion_lengths[i]) for i in members[each]) for each in part)
        imitated = sum(
            int(completion_lengths[i]) for each in part for i in members[each] if successful and successful[i]
        )
        for rank, microbatches in enumerate(split):
            planned += sum(_cost([lengths[i] for i in m], packed=packed) for m in microbatches)
            side_by_side = [i for each in shares[rank] for i in members[each]]
            start = {index: len(local[rank]) + k for k, index in enumerate(side_by_side)}
            local[rank].extend(side_by_side)
            renumbered = [tuple(start[i] for i in m) for m in microbatches]
            renumbered += [()] * (count - len(renumbered))
            minibatches[rank].append(
                Minibatch(microbatches=tuple(renumbered), completion_lengths=totals, successful_tokens=imitated)
            )
    return UpdatePlan(
        ranks=tuple(
            RankPlan(sequences=tuple(indices), minibatches=tuple(m), epochs=epochs)
            for indices, m in zip(local, minibatches, strict=True)
        ),
        padding_fraction=1.0 - sum(lengths) / planned if planned else 0.0,
    )


def _deal(trajectories: list[int], work: Sequence[float], num_ranks: int) -> list[list[int]]:
    """Most work first, each to the rank that has least to do so far: each share stays in order of work."""
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    dealt = [0.0] * num_ranks
    for trajectory in sorted(trajectories, key=lambda each: (-work[each], each)):
        rank = min(range(num_ranks), key=lambda r: (dealt[r], r))
        shares[rank].append(trajectory)
        dealt[rank] += work[trajectory]
    return shares


def _microbatches(ordered: list[int], lengths: Sequence[int], max_tokens: int, *, packed: bool) -> list[list[int]]:
    """Cut a share, longest first, into pieces of at most ``max_tokens``."""
    own = np.asarray([lengths[index] for index in ordered], dtype=np.int64)
    cuts = _cuts_packed(own, max_tokens) if packed else _cuts_padded(own, max_tokens)
    return [ordered[start:end] for start, end in itertools.pairwise(cuts)]


def _cuts_packed(lengths: npt.NDArray[np.int64], max_tokens: int) -> list[int]:
    """Fill one after the other: nothing is padded."""
    cuts, tokens = [0], 0
    for index, length in enumerate(lengths):
        if tokens + length > max_tokens and index > cuts[-1]:
            cuts.append(index)
            tokens = 0
        tokens += length
    return [*cuts, len(lengths)] if len(lengths) else cuts


def _cuts_padded(lengths: npt.NDArray[np.int64], max_tokens: int) -> list[int]:
    """Cuts of least cost, padding against the number of passes, by dynamic programming.

    The first of a microbatch, its longest, sets the width of the rectangle.
    """
    count = len(lengths)
    cost = np.zeros(count + 1)
    cut_before = np.zeros(count + 1, dtype=np.int64)
    first = 0
    for end in range(1, count + 1):
        while first < end - 1 and lengths[first] * (end - first) > max_tokens:
            first += 1
        starts = np.arange(first, end)
        costs = cost[first:end] + lengths[first:end] * (end - starts) + _PASS_TOKENS
        best = int(costs.argmin())
        cost[end], cut_before[end] = costs[best], first + best
    cuts = [count]
    while cuts[-1] > 0:
        cuts.append(int(cut_before[cuts[-1]]))
    return cuts[::-1]


def _cost(lengths: list[int], *, packed: bool) -> int:
    return sum(lengths) if packed else max(lengths) * len(lengths)
