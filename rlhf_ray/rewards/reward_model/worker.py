"""Rewards, inside a Ray actor: a reward model, rollout groups -> scores."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from rlhf_ray.errors import DataError
from rlhf_ray.prompts.tokenizer import decoded
from rlhf_ray.rewards.reward_model.model import RewardModel
from rlhf_ray.rewards.reward_model.reward import RewardModelReward
from rlhf_ray.rewards.scoring import Scores
from rlhf_ray.rewards.worker import load_tokenizer
from rlhf_ray.types import RewardFailure, RolloutGroup

__all__ = ["RewardModelWorker"]


class RewardModelWorker:
    """Scores the completions of several groups in common batches.

    Args:
        name: What reports call the reward.
        weight: Its share of the sum.
        reward: The model.
        device: ``cpu`` or ``cuda``.
        policy_tokenizer: The tokenizer of the completions: a folder or hub id, or a tokenizer from ``pack``.
        trust_remote_code: Run code that ships with that tokenizer.
    """

    def __init__(
        self,
        name: str,
        weight: float,
        reward: RewardModelReward,
        device: str,
        policy_tokenizer: str | bytes,
        trust_remote_code: bool,
    ) -> None:
        self._name = name
        self._weight = weight
        self._reward = reward
        self._device = device
        self._policy_tokenizer = load_tokenizer(policy_tokenizer, trust_remote_code)
        self._loaded: RewardModel | None = None

    def ready(self) -> None:
        """Load the model, once; not when the actor is made, since what goes wrong there loses its type on the way.

        Raises:
            ConfigError: It cannot be used.
        """
        if self._loaded is None:
            self._loaded = RewardModel(self._reward, device=self._device)

    def score(self, groups: Sequence[RolloutGroup]) -> list[Scores | RewardFailure]:
        """Score ``groups``; a failure is an answer, no exception."""
        started = time.perf_counter()
        texts = [self._texts(group) for group in groups]
        encoded = [self._encoded(group, of_group) for group, of_group in zip(groups, texts, strict=True)]
        usable = [sequences for sequences in encoded if not isinstance(sequences, RewardFailure)]
        values = iter(self._model.scores([sequence for sequences in usable for sequence in sequences]))
        seconds = time.perf_counter() - started
        return [
            sequences
            if isinstance(sequences, RewardFailure)
            else self._outcome(group, of_group, np.array([next(values) for _ in sequences]), seconds)
            for group, of_group, sequences in zip(groups, texts, encoded, strict=True)
        ]

    @property
    def _model(self) -> RewardModel:
        assert self._loaded is not None, "ready() comes first"
        return self._loaded

    def _texts(self, group: RolloutGroup) -> tuple[str, ...]:
        return tuple(
            decoded(self._policy_tokenizer, completion.token_ids.tolist()) for completion in group.trajectories
        )

    def _encoded(self, group: RolloutGroup, texts: tuple[str, ...]) -> list[list[int]] | RewardFailure:
        try:
            return self._model.encoded([group.prompt.text] * len(texts), texts)
        except DataError as error:
            return RewardFailure(group_id=group.group_id, kind="raised", message=f"{self._name}: {error}")

    def _outcome(
        self, group: RolloutGroup, texts: tuple[str, ...], values: np.ndarray, seconds: float
    ) -> Scores | RewardFailure:
        unusable = np.flatnonzero(~np.isfinite(values))
        if unusable.size:
            message = f"{self._name} scored completion {unusable[0]} as {values[unusable[0]]}"
            return RewardFailure(group_id=group.group_id, kind="not_finite", message=message)
        return Scores(
            rewards=(np.float64(self._weight) * values).astype(np.float32),
            rewards_by_function={self._name: values.astype(np.float32)},
            texts=texts,
            reward_s=seconds,
        )
