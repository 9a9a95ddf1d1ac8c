"""The seam of rollouts: what one of several turns is made of, and what it is spared."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ActorDiedError

from rlhf_ray.rollouts import rollouter as module
from rlhf_ray.rollouts.rollouter import Engine, Requests, Seeds, SingleTurn, group_seed
from rlhf_ray.types import Prompt, RolloutGroup, SamplingSettings, Trajectory, Turn

SAMPLING = SamplingSettings(group_size=2, max_new_tokens=4, temperature=1.0)
SEEDS = Seeds(run_seed=5, version=3, prompt_id=7)
PROMPT = Prompt(prompt_id=7, token_ids=np.asarray([1], dtype=np.int32), text="question", columns={"answer": 1})


class Replicas:
    """Each answers with the number of its request as the only token; the named ones die."""

    def __init__(self, dying: tuple[int, ...] = ()) -> None:
        self._dying = dying
        self.requests: list[tuple[list[int], int, int, int]] = []

    async def generate(
        self, prompt: Prompt, sampling: SamplingSettings, *, seed: int, min_version: int, **_: Any
    ) -> RolloutGroup:
        number = len(self.requests)
        self.requests.append((prompt.token_ids.tolist(), sampling.group_size, seed, min_version))
        if number in self._dying:
            raise ActorDiedError
        trajectory = Trajectory.single_turn(
            token_ids=np.asarray([number], dtype=np.int32),
            sampling_logprobs=np.zeros(1, dtype=np.float32),
            asked_version=min_version,
            version_spans=(),
            finish_reason="stop",
        )
        return RolloutGroup(
            group_id=prompt.prompt_id,
            prompt=prompt,
            trajectories=(trajectory,) * sampling.group_size,
            replica_id="r",
        )


class TwoTurns:
    """The first turn is sampled for all trajectories at once, the second one for each, after an observation, 99."""

    async def rollout(self, prompt: Prompt, engine: Engine, seeds: Seeds) -> RolloutGroup:
        group = await engine.sample(prompt, seed=seeds.first_turn)
        one = replace(engine, sampling=replace(engine.sampling, group_size=1), version=engine.version + 1)
        return replace(
            group,
            trajectories=tuple(
                [await self._second(first, prompt, one, index) for index, first in enumerate(group.trajectories)]
            ),
        )

    async def _second(self, first: Trajectory, prompt: Prompt, engine: Engine, index: int) -> Trajectory:
        seen = np.concatenate([first.token_ids, np.asarray([99], dtype=np.int32)])
        turn = replace(prompt, token_ids=np.concatenate([prompt.token_ids, seen]))
        second = (await engine.sample(turn, seed=1000 + index)).trajectories[0]
        end = len(seen) + len(second.token_ids)
        return replace(
            first,
            token_ids=np.concatenate([seen, second.token_ids]),
            sampling_logprobs=np.zeros(end, dtype=np.float32),
            turns=(*first.turns, Turn(start=len(seen), end=end)),
        )


def rolled_out(rollouter: Any, replicas: Replicas) -> tuple[RolloutGroup, Requests]:
    engine = Engine(generate=replicas.generate, sampling=SAMPLING, version=3, max_retries=1, timeout_s=10.0)
    return asyncio.run(rollouter.rollout(PROMPT, engine, SEEDS)), engine.requests


def test_a_single_turn_is_one_request() -> None:
    replicas = Replicas()

    group, _ = rolled_out(SingleTurn(), replicas)

    assert replicas.requests == [([1], 2, group_seed(5, 3, 7), 3)]
    assert group.prompt is PROMPT, "replicas are not sent the row"


def test_a_later_turn_is_repeated_alone_where_its_replica_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_RETRY_PAUSE_S", 0.0)
    replicas = Replicas(dying=(1,))

    group, requests = rolled_out(TwoTurns(), replicas)

    assert replicas.requests == [
        ([1], 2, group_seed(5, 3, 7), 3),
        ([1, 0, 99], 1, 1000, 4),
        ([1, 0, 99], 1, 1000, 4),
        ([1, 0, 99], 1, 1001, 4),
    ]
    assert requests.retries == 1
    assert [trajectory.token_ids.tolist() for trajectory in group.trajectories] == [[0, 99, 2], [0, 99, 3]]
    assert [trajectory.loss_mask.tolist() for trajectory in group.trajectories] == [[True, False, True]] * 2
    assert len(requests.spans.take()) == 3
