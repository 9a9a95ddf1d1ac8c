"""Reward workers, each in a Ray actor: rollout groups in; scores, or what is wrong with them, out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias, cast

import numpy as np

from rlhf_ray.actor_pool import LONG_CALL_S
from rlhf_ray.errors import DataError, RewardError
from rlhf_ray.pickling import deserialize
from rlhf_ray.rewards.arguments import TrainerState, messages_of
from rlhf_ray.rewards.functions import NamedReward
from rlhf_ray.rewards.reward_model.reward import RewardModelReward
from rlhf_ray.rewards.scoring import RewardScorer, Scores, ScoringError, Tokenizer, checked_answer, decoded_texts
from rlhf_ray.types import RolloutGroup

if TYPE_CHECKING:
    from rlhf_ray.rewards.reward_model.model import RewardModel

__all__ = ["ConcurrentRewardWorker", "RewardModelWorker", "ScoringRequest", "SequentialRewardWorker", "load_tokenizer"]

ScoringRequest: TypeAlias = tuple[RolloutGroup, TrainerState]


class SequentialRewardWorker:
    """Reward functions, one group at a time, on the actor's main thread.

    Python delivers signals to the main thread only, so a function that limits its own time with ``signal.alarm``, as
    math-verify does, works here and would not in a thread.

    Args:
        rewards: Each a :class:`NamedReward`, serialized.
        tokenizer: A folder or hub id, or a tokenizer, serialized.
        trust_remote_code: Run code that ships with the tokenizer.
    """

    def __init__(self, rewards: Sequence[bytes], tokenizer: str | bytes, trust_remote_code: bool) -> None:
        self._scorer = _scorer(rewards, tokenizer, trust_remote_code)
        # One loop for the worker's life: async functions may keep sessions and locks that belong to it.
        self._loop = asyncio.new_event_loop()

    def ready(self) -> None:
        """Answer once the worker is ready."""

    def work(self, requests: Sequence[ScoringRequest]) -> list[Scores | ScoringError]:
        """Score the first groups, those that ``LONG_CALL_S`` allows; an error is an answer, not raised."""
        started = time.perf_counter()
        outcomes: list[Scores | ScoringError] = []
        for request in requests:
            outcomes.append(self._loop.run_until_complete(_score(self._scorer, request)))
            if time.perf_counter() - started > LONG_CALL_S:
                break
        return outcomes


class ConcurrentRewardWorker:
    """As :class:`SequentialRewardWorker`, for functions that are all async: several calls at once."""

    def __init__(self, rewards: Sequence[bytes], tokenizer: str | bytes, trust_remote_code: bool) -> None:
        self._scorer = _scorer(rewards, tokenizer, trust_remote_code)

    async def ready(self) -> None:
        """Answer once the worker is ready."""

    async def work(self, requests: Sequence[ScoringRequest]) -> list[Scores | ScoringError]:
        """Score groups at once; an error is an answer, not raised."""
        return list(await asyncio.gather(*(_score(self._scorer, request) for request in requests)))


class RewardModelWorker:
    """A reward model, which scores the completions of several groups in common batches.

    Args:
        name: What reports call the reward.
        reward: The model.
        device: ``cpu`` or ``cuda``.
        tokenizer: The policy's: a folder or hub id, or a tokenizer, serialized.
        trust_remote_code: Run code that ships with that tokenizer.
    """

    def __init__(
        self, name: str, reward: RewardModelReward, device: str, tokenizer: str | bytes, trust_remote_code: bool
    ) -> None:
        self._name = name
        self._reward = reward
        self._device = device
        self._tokenizer = load_tokenizer(tokenizer, trust_remote_code)
        self._loaded: RewardModel | None = None

    def ready(self) -> None:
        """Load the model, once; not when the actor is made, since what goes wrong there loses its type on the way.

        Raises:
            ConfigError: It cannot be used.
        """
        self._model()

    def work(self, requests: Sequence[ScoringRequest]) -> list[Scores | ScoringError]:
        """Score groups; an error is an answer, not raised."""
        started = time.perf_counter()
        groups = [group for group, _ in requests]
        texts = [decoded_texts(group, self._tokenizer) for group in groups]
        encoded = [self._encoded(group, own) for group, own in zip(groups, texts, strict=True)]
        usable = [sequences for sequences in encoded if not isinstance(sequences, ScoringError)]
        values = iter(self._model().scores([sequence for sequences in usable for sequence in sequences]))
        seconds = time.perf_counter() - started
        return [
            sequences
            if isinstance(sequences, ScoringError)
            else self._scores([next(values) for _ in own], own, seconds)
            for own, sequences in zip(texts, encoded, strict=True)
        ]

    def _model(self) -> RewardModel:
        if self._loaded is None:
            from rlhf_ray.rewards.reward_model.model import RewardModel

            self._loaded = RewardModel(self._reward, device=self._device)
        return self._loaded

    def _encoded(self, group: RolloutGroup, texts: tuple[str, ...]) -> list[list[int]] | ScoringError:
        prompts, last = [], []
        for trajectory, text in zip(group.trajectories, texts, strict=True):
            prompt, messages = group.prompt.text, messages_of(trajectory)
            if messages is not None and not isinstance(prompt, str):
                sampled = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
                prompt, text = [*prompt, *messages[:sampled]], messages[sampled]["content"]
            prompts.append(prompt)
            last.append(text)
        try:
            return self._model().encoded(prompts, last)
        except DataError as error:
            return ScoringError("raised", f"{self._name}: {error}")

    def _scores(self, values: list[np.float32], texts: tuple[str, ...], seconds: float) -> Scores | ScoringError:
        try:
            checked = checked_answer(values, self._name, len(texts))
        except ScoringError as error:
            return error
        return Scores(values={self._name: checked}, texts=texts, reward_s=seconds)


def load_tokenizer(source: str | bytes, trust_remote_code: bool) -> Tokenizer:
    """The policy's tokenizer, from a folder, a hub id or a payload."""
    if isinstance(source, bytes):
        return cast(Tokenizer, deserialize(source))
    # Here, because most workers are sent the tokenizer itself and need not import what loads one.
    from rlhf_ray.prompts import tokenizer

    return cast(Tokenizer, tokenizer.load_tokenizer(source, trust_remote_code=trust_remote_code))


def _scorer(rewards: Sequence[bytes], tokenizer: str | bytes, trust_remote_code: bool) -> RewardScorer:
    named = [cast(NamedReward, deserialize(reward)) for reward in rewards]
    return RewardScorer(named, load_tokenizer(tokenizer, trust_remote_code))


async def _score(scorer: RewardScorer, request: ScoringRequest) -> Scores | ScoringError:
    try:
        return await scorer.scores(*request)
    except ScoringError as error:
        return error
    except DataError:
        raise
    except Exception as error:  # Not a function's: what those raise is a ScoringError. No later group would do better.
        raise RewardError(f"a reward worker failed outside of the reward functions: {error!r}") from error
