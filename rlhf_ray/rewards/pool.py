"""Scores a run's rollout groups on Ray actors.

Consumes finished ``RolloutGroup``s; produces ``ScoredGroup``s or ``RewardFailure``s. Reward functions share workers,
each reward model has its own; a group goes to all of them at once, and its scores are added up here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, TypeAlias

from rlhf_ray.actor_pool import ActorPool, WorkerSpec, WorkFailed
from rlhf_ray.config.settings import RewardSettings
from rlhf_ray.errors import DataError, RewardError
from rlhf_ray.pickling import serialize
from rlhf_ray.reporting.run_directory import ray_name
from rlhf_ray.rewards.arguments import TrainingProgress
from rlhf_ray.rewards.functions import NamedReward, resolve_rewards
from rlhf_ray.rewards.reward_model.reward import RewardModelReward
from rlhf_ray.rewards.scoring import Scores, ScoringError, Tokenizer, scored_group
from rlhf_ray.rewards.workers import ConcurrentRewardWorker, RewardModelWorker, ScoringRequest, SequentialRewardWorker
from rlhf_ray.stopping import stop_all
from rlhf_ray.types import RewardFailure, RolloutGroup, ScoredGroup, TraceSpan

__all__ = ["RewardPool"]

CONCURRENT_GROUPS = 16
"""Groups that one worker scores at once when all functions are async."""
CALL_S = 0.05
"""Groups that functions are expected to score within so many seconds share a call, which costs a millisecond."""
MAX_GROUPS_PER_CALL = 64
STARTUP_TIMEOUT_S = 300.0
"""Longest wait for workers of functions to start."""
_PASSES_PER_CALL = 4
"""Forward passes of a reward model that a call is filled for: sequences are sorted by length over a whole call."""

_Pool: TypeAlias = ActorPool[ScoringRequest, Scores | ScoringError]


class RewardPool:
    """Reward functions and reward models on actors with an enforced time limit.

    :meth:`score` may be awaited on any event loop, hundreds of times at once.

    Args:
        settings: The ``rewards`` section, from :func:`rewards_of_run`.
        run_id: First part of the names of reward models' actors.
        tokenizer_path: Folder or hub id of the policy's tokenizer.
        num_cpus: CPUs that Ray reserves for an actor.
        trust_remote_code: Run code that ships with the tokenizer.
        on_gpu: Whether the run is on GPUs.
        tokenizer: A tokenizer to send instead of loading ``tokenizer_path``.

    Raises:
        ConfigError: A reward or weight is wrong.
    """

    def __init__(
        self,
        settings: RewardSettings,
        *,
        run_id: str,
        tokenizer_path: str,
        num_cpus: float,
        trust_remote_code: bool,
        on_gpu: bool,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self.progress = TrainingProgress()
        """What ``trainer_state`` of reward functions follows from."""
        self._rewards = resolve_rewards(settings)
        self._num_cpus = num_cpus
        source = tokenizer_path if tokenizer is None else serialize(tokenizer, defined_by=tokenizer)
        functions = [reward for reward in self._rewards if not isinstance(reward.function, RewardModelReward)]
        self._pools: list[_Pool] = []
        if functions:
            self._pools.append(self._function_pool(functions, settings, source, trust_remote_code))
        for reward in self._rewards:
            if isinstance(model := reward.function, RewardModelReward):
                self._pools.append(self._model_pool(reward.name, model, run_id, on_gpu, source, trust_remote_code))

    @property
    def workers_replaced(self) -> int:
        """Actors that died, or were killed at a time limit, since the start."""
        return sum(pool.workers_replaced for pool in self._pools)

    def start(self) -> None:
        """Start all actors and wait until they are ready.

        Raises:
            ConfigError: A reward model cannot be used.
            RewardError: Actors do not start in their time; or the pool was started before, or is stopped.
        """
        for pool in self._pools:
            pool.launch()
        try:
            for pool in self._pools:
                pool.wait_ready()
        except BaseException:
            self.stop()
            raise

    async def score(self, group: RolloutGroup) -> ScoredGroup | RewardFailure:
        """Score ``group``; where several rewards fail, the functions' failure is the one that is returned.

        Raises:
            RewardError: The pool is not started or is stopped, the last worker could not be replaced, or a worker
                failed outside of the reward functions.
            DataError: A dataset column has the name of an argument that has a value already.
        """
        request = group, self.progress.at(group.trajectories[0].asked_version)
        answers = await asyncio.gather(*(pool.submit(request) for pool in self._pools), return_exceptions=True)
        scores: list[Scores] = []
        try:
            for answer in answers:
                if isinstance(answer, BaseException):
                    raise answer
                scores.append(answer)
            return scored_group(group, self._rewards, scores)
        except (ScoringError, WorkFailed) as failure:
            if isinstance(failure.__cause__, (DataError, RewardError)):
                raise failure.__cause__ from None
            return RewardFailure(group_id=group.group_id, kind=failure.kind, message=failure.message)

    def stop(self) -> None:
        """End all actors; groups that are being scored or wait for a worker raise ``RewardError``."""
        stop_all(*(("reward workers", pool.stop) for pool in self._pools))

    def take_spans(self) -> list[TraceSpan]:
        """What each actor did since the last call, for the timeline."""
        return [span for pool in self._pools for span in pool.take_spans()]

    def _function_pool(self, functions: Sequence[NamedReward], settings: RewardSettings, *tokenizer: Any) -> _Pool:
        concurrent = all(reward.is_async for reward in functions)

        def share_of_call(_: ScoringRequest, seconds: float) -> float:
            return 1.0 if concurrent else max(seconds / CALL_S, 1 / MAX_GROUPS_PER_CALL)

        spec = WorkerSpec(
            title="reward worker",
            worker_class=ConcurrentRewardWorker if concurrent else SequentialRewardWorker,
            arguments=([reward.serialized() for reward in functions], *tokenizer),
            num_workers=settings.num_workers,
            calls_per_worker=CONCURRENT_GROUPS if concurrent else 1,
            timeout_s=settings.timeout_s,
            timeout_setting="rewards.timeout_s",
            startup_timeout_s=STARTUP_TIMEOUT_S,
            startup_remedy=(
                f": are {self._num_cpus:g} CPUs free for each of {settings.num_workers} "
                "(resources.cpus_per_reward_worker, rewards.num_workers)?"
            ),
            error=RewardError,
            num_cpus=self._num_cpus,
            env_vars={"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
        return ActorPool(spec, share_of_call=share_of_call, describe=_span_name)

    def _model_pool(self, name: str, reward: RewardModelReward, run_id: str, on_gpu: bool, *tokenizer: Any) -> _Pool:
        def share_of_call(request: ScoringRequest, _: float) -> float:
            group = request[0]
            prompt = len(group.prompt.token_ids)
            tokens = sum(prompt + len(completion.token_ids) for completion in group.trajectories)
            return tokens / (_PASSES_PER_CALL * reward.max_tokens_per_batch)

        num_gpus = reward.gpus_per_worker(on_gpu=on_gpu)
        spec = WorkerSpec(
            title=name,
            worker_class=RewardModelWorker,
            arguments=(name, reward.with_absolute_paths(), "cuda" if num_gpus else "cpu", *tokenizer),
            num_workers=reward.num_workers,
            timeout_s=reward.timeout_s,
            timeout_setting=f"timeout_s of {name}",
            startup_timeout_s=reward.startup_timeout_s,
            startup_remedy=(
                f" with {reward.path} (startup_timeout_s of {name}): are {self._num_cpus:g} CPUs and {num_gpus:g} GPUs "
                f"free for each of {reward.num_workers}?"
            ),
            error=RewardError,
            name=f"{run_id}-{ray_name(name)}",
            num_cpus=self._num_cpus,
            num_gpus=num_gpus,
            env_vars={"TOKENIZERS_PARALLELISM": "false"},
        )
        return ActorPool(spec, share_of_call=share_of_call, describe=_span_name)


def _span_name(request: ScoringRequest) -> str:
    return f"group {request[0].group_id}"
