"""Rewards, inside a Ray actor: a scorer and the two ways to call it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import cast

from rlhf_ray.rewards.arguments import TrainingProgress
from rlhf_ray.rewards.scoring import RewardScorer, Scores, ScoringError, Tokenizer
from rlhf_ray.rewards.shipping import unpack, unpack_rewards
from rlhf_ray.types import RewardFailure, RolloutGroup

__all__ = ["LONG_CALL_S", "ConcurrentRewardWorker", "SequentialRewardWorker", "load_tokenizer"]

LONG_CALL_S = 0.2
"""A call for several groups answers after so many seconds with those that it has."""


class SequentialRewardWorker:
    """One group at a time, on the actor's main thread.

    Python delivers signals to the main thread only, so a function that limits its own time with ``signal.alarm``, as
    math-verify does, works here and would not in a thread.

    Args:
        parcels: From ``pack_rewards``.
        tokenizer: A folder or hub id, or a tokenizer from ``pack``.
        trust_remote_code: Run code that ships with the tokenizer.
        part_of_sum: As :class:`RewardScorer`'s.
    """

    def __init__(
        self, parcels: Sequence[bytes], tokenizer: str | bytes, trust_remote_code: bool, part_of_sum: bool = False
    ) -> None:
        self._scorer = RewardScorer(
            unpack_rewards(parcels),
            load_tokenizer(tokenizer, trust_remote_code),
            threaded=False,
            part_of_sum=part_of_sum,
        )
        # One loop for the worker's life: async functions may keep sessions and locks that belong to it.
        self._loop = asyncio.new_event_loop()

    def ready(self) -> None:
        """Answer once the worker stands."""

    def score(
        self, groups: Sequence[RolloutGroup], progress: TrainingProgress | None = None
    ) -> list[Scores | RewardFailure]:
        """Score the first of ``groups``, those that ``LONG_CALL_S`` allows; a failure is an answer, no exception."""
        started = time.perf_counter()
        outcomes: list[Scores | RewardFailure] = []
        for group in groups:
            outcomes.append(self._loop.run_until_complete(_score(self._scorer, group, progress)))
            if time.perf_counter() - started > LONG_CALL_S:
                break
        return outcomes


class ConcurrentRewardWorker:
    """Several groups at once, for functions that are all async; arguments as :class:`SequentialRewardWorker`."""

    def __init__(
        self, parcels: Sequence[bytes], tokenizer: str | bytes, trust_remote_code: bool, part_of_sum: bool = False
    ) -> None:
        loaded = load_tokenizer(tokenizer, trust_remote_code)
        self._scorer = RewardScorer(unpack_rewards(parcels), loaded, part_of_sum=part_of_sum)

    async def ready(self) -> None:
        """Answer once the worker stands."""

    async def score(
        self, groups: Sequence[RolloutGroup], progress: TrainingProgress | None = None
    ) -> list[Scores | RewardFailure]:
        """Score ``groups`` at once; a failure is an answer, not an exception."""
        return list(await asyncio.gather(*(_score(self._scorer, group, progress) for group in groups)))


async def _score(
    scorer: RewardScorer, group: RolloutGroup, progress: TrainingProgress | None
) -> Scores | RewardFailure:
    try:
        return await scorer.scores(group, progress)
    except ScoringError as error:
        return RewardFailure(group_id=group.group_id, kind=error.kind, message=error.message)


def load_tokenizer(source: str | bytes, trust_remote_code: bool) -> Tokenizer:
    """The policy's tokenizer, from a folder, a hub id or ``pack``."""
    if isinstance(source, bytes):
        return cast(Tokenizer, unpack(source))
    # Here, because most workers are sent the tokenizer itself and need not import what loads one.
    from rlhf_ray.prompts import tokenizer

    return cast(Tokenizer, tokenizer.load_tokenizer(source, trust_remote_code=trust_remote_code))
