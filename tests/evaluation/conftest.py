"""Makes scored groups for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from rlhf_ray.types import Prompt, RolloutGroup, ScoredGroup, Trajectory


def _prompt(prompt_id: int) -> Prompt:
    return Prompt(prompt_id=prompt_id, token_ids=np.zeros(1, dtype=np.int32), text=str(prompt_id))


def _completion(length: int, finish_reason: str) -> Trajectory:
    return Trajectory.single_turn(
        token_ids=np.zeros(length, dtype=np.int32),
        sampling_logprobs=np.zeros(length, dtype=np.float32),
        version_spans=(),
        asked_version=0,
        finish_reason=finish_reason,
    )


def _scored(
    prompt_id: int, rewards: Sequence[float], lengths: Sequence[int] | None = None, truncated: Sequence[int] = ()
) -> ScoredGroup:
    completions = tuple(
        _completion(length, "length" if index in truncated else "stop")
        for index, length in enumerate(lengths or [1] * len(rewards))
    )
    group = RolloutGroup(group_id=prompt_id, prompt=_prompt(prompt_id), trajectories=completions, replica_id="r")
    return ScoredGroup(
        group=group,
        rewards=np.asarray(rewards, dtype=np.float32),
        rewards_by_function={},
        texts=("",) * len(rewards),
        reward_s=0.0,
    )


@pytest.fixture
def prompt() -> Callable[[int], Prompt]:
    """``prompt(prompt_id)``."""
    return _prompt


@pytest.fixture
def scored() -> Callable[..., ScoredGroup]:
    """``scored(prompt_id, rewards, lengths=, truncated=)``: token counts, and which completions were cut."""
    return _scored
