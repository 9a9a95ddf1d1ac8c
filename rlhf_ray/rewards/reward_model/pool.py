"""Rewards, the actors of one reward model: rollout groups in, scores out.

Consumes finished ``RolloutGroup``s; produces ``Scores`` or counted ``RewardFailure``s. Groups wait for a free actor,
which takes as many of them at once as fill a few forward passes.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from rlhf_ray.config.local_path import absolute_if_local
from rlhf_ray.errors import ConfigError, RewardError
from rlhf_ray.reporting.run_directory import ray_name
from rlhf_ray.rewards.functions import NamedReward
from rlhf_ray.rewards.pool import START_TRIES, died_by_itself, kill, span_name
from rlhf_ray.rewards.reward_model.requests import Request, RequestQueue
from rlhf_ray.rewards.reward_model.reward import RewardModelReward
from rlhf_ray.rewards.reward_model.worker import RewardModelWorker
from rlhf_ray.rewards.scoring import Scores
from rlhf_ray.span_log import SpanLog
from rlhf_ray.stopping import stop_all
from rlhf_ray.types import RewardFailure, RolloutGroup, TraceSpan
from rlhf_ray.untrusted_text import shortened
from rlhf_ray.worker_env import worker_env

__all__ = ["ModelPoolSpec", "RewardModelPool"]

_LOG = logging.getLogger(__name__)
# Forward passes that a call is filled for: sequences are sorted by length over a whole call.
_PASSES_A_CALL = 4
_JOIN_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPoolSpec:
    """What the actors of all reward models of a run have in common."""

    run_id: str
    policy_tokenizer: str | bytes
    """Folder or hub id, or a tokenizer from ``pack``."""
    trust_remote_code: bool
    """Run code that ships with that tokenizer."""
    num_cpus: float
    """CPUs that Ray reserves for an actor."""
    on_gpu: bool
    """Whether the run is on GPUs."""


class RewardModelPool:
    """Actors that hold a reward model each, with a thread here for each of them.

    Args:
        reward: The reward model, its name and its weight.
        spec: What it has in common with others.

    Attributes:
        workers_replaced: Actors that died, or were killed at the time limit, since the start.
    """

    def __init__(self, reward: NamedReward, spec: ModelPoolSpec) -> None:
        assert isinstance(reward.function, RewardModelReward)
        self.name = reward.name
        self.workers_replaced = 0
        self._weight = reward.weight
        self._reward = _absolute(reward.function)
        self._spec = spec
        self._num_gpus = reward.function.gpus_per_worker(on_gpu=spec.on_gpu)
        self._queue = RequestQueue()
        self._lock = threading.Lock()
        self._actors: dict[int, Any] = {}
        self._threads: list[threading.Thread] = []
        self._stopped = False
        self._stopped_message = f"the reward model {self.name} is stopped"
        self._starts = 0
        self._spans = SpanLog()

    def launch(self) -> None:
        """Start the actors, which load the model, and do not wait for them."""
        for index in range(self._reward.num_workers):
            self._start(index)

    def wait_ready(self) -> None:
        """Wait until every actor has loaded the model.

        Raises:
            ConfigError: The model cannot be used.
            RewardError: An actor does not start within ``startup_timeout_s``.
        """
        try:
            for index in range(self._reward.num_workers):
                self._wait_for(index)
        except RayError as error:
            self.stop()
            raise self._startup_failure(error) from error
        self._threads = [
            threading.Thread(target=self._serve, args=(index,), name=f"{self.name}-{index}", daemon=True)
            for index in self._actors
        ]
        for thread in self._threads:
            thread.start()

    async def score(self, group: RolloutGroup) -> Scores | RewardFailure:
        """Score ``group`` with the next free actor.

        Raises:
            RewardError: The pool is stopped, or its last actor could not be replaced.
        """
        request = Request(group)
        self._queue.put(request)
        return await asyncio.wrap_future(request.outcome)

    def stop(self) -> None:
        """End the actors; groups that wait raise ``RewardError``."""
        with self._lock:
            self._stopped = True
            actors, self._actors = self._actors, {}
        self._queue.close(self._stopped_message)
        stop_all(*((f"an actor of {self.name}", partial(kill, actor)) for actor in actors.values()))
        for thread in self._threads:
            thread.join(timeout=_JOIN_S)

    def take_spans(self) -> list[TraceSpan]:
        """What each actor did since the last call."""
        return self._spans.take()

    def _serve(self, index: int) -> None:
        """Give one actor its work, and another in its place when it dies."""
        max_tokens = _PASSES_A_CALL * self._reward.max_tokens_per_batch
        while (batch := self._queue.take(max_tokens)) is not None:
            actor = self._actors.get(index)
            if actor is None:  # Stopped.
                self._queue.put_back(batch)
            elif not self._call(index, actor, batch) and not self._replaced(index, actor):
                return

    def _call(self, index: int, actor: Any, batch: list[Request]) -> bool:
        """Score a batch with the actor of a place; whether it can go on."""
        if any(request.alone for request in batch):
            # Their last try is for an actor that lives: two may have died together while they were idle.
            try:
                ray.get(actor.ready.remote(), timeout=self._reward.timeout_s)
            except RayError:
                self._queue.put_back(batch)
                return False
        groups = [request.group for request in batch]
        try:
            with self._spans.during(f"{self.name} {index + 1}", span_name(groups)):
                outcomes = ray.get(actor.score.remote(groups), timeout=self._reward.timeout_s)
        except RayTaskError as error:
            self._again(batch, kind="raised", message=f"{self.name} raised {shortened(error, 1000)}")
            return True
        except GetTimeoutError:
            limit = f"no score after {self._reward.timeout_s:g} s (timeout_s of {self.name}); its actor was killed"
            self._again(batch, kind="timeout", message=limit)
            return False
        except RayError as error:
            died = f"the actor of {self.name} died twice: {shortened(error, 1000)}"
            self._again(batch, kind="worker_died", message=died)
            return False
        for request, outcome in zip(batch, outcomes, strict=True):
            request.tell(outcome)
        return True

    def _again(self, batch: list[Request], *, kind: str, message: str) -> None:
        """Send each group of a call that ended badly once more, by itself; one that was by itself has failed."""
        first = [request for request in batch if not request.alone]
        for request in batch:
            if request.alone:
                request.tell(RewardFailure(group_id=request.group.group_id, kind=kind, message=message))
        self._queue.put_back(first)

    def _replaced(self, index: int, dead: Any) -> bool:
        """Put a new actor in a dead one's place; whether that worked."""
        kill(dead)
        self.workers_replaced += 1
        try:
            self._start(index)
            self._wait_for(index)
        except RayError as error:
            with self._lock:
                if self._stopped:
                    return False
                kill(self._actors.pop(index))
                left = len(self._actors)
            failure = self._startup_failure(error)
            _LOG.warning("%s; %d actors of %s are left", failure, left, self.name)
            if left == 0:
                self._queue.close(str(failure))
            return False
        except RewardError:  # Stopped.
            return False
        return True

    def _start(self, index: int) -> None:
        """Start an actor for one of the places.

        Raises:
            RewardError: The pool is stopped.
        """
        with self._lock:
            if self._stopped:
                raise RewardError(self._stopped_message)
            self._starts += 1
            self._actors[index] = self._new_actor(f"{self._starts}")

    def _wait_for(self, index: int) -> None:
        """Wait until the actor of a place has loaded the model; another one comes in the place of one that dies.

        Raises:
            RayError: It cannot start.
            RewardError: The pool is stopped.
        """
        tries = 0
        while True:
            tries += 1
            actor = self._actors.get(index)
            if actor is None:
                raise RewardError(self._stopped_message)
            try:
                ray.get(actor.ready.remote(), timeout=self._reward.startup_timeout_s)
                return
            except RayError as error:
                if self._stopped or tries == START_TRIES or not died_by_itself(error):
                    raise
                _LOG.warning("%s; another one is started", self._startup_failure(error))
                self._start(index)

    def _new_actor(self, label: str) -> Any:
        spec = self._spec
        actor_class = ray.remote(RewardModelWorker).options(
            name=f"{spec.run_id}-{ray_name(self.name)}-{label}",
            num_cpus=spec.num_cpus,
            num_gpus=self._num_gpus,
            max_restarts=0,
            # Inside a Tune trial, actors would otherwise look for room in the trial's own placement group.
            scheduling_strategy="DEFAULT",
            runtime_env=worker_env(TOKENIZERS_PARALLELISM="false"),
        )
        return actor_class.remote(
            self.name,
            self._weight,
            self._reward,
            "cuda" if self._num_gpus else "cpu",
            spec.policy_tokenizer,
            spec.trust_remote_code,
        )

    def _startup_failure(self, error: Exception) -> Exception:
        if isinstance(error, GetTimeoutError):
            return RewardError(
                f"an actor of {self.name} did not load {self._reward.path} in {self._reward.startup_timeout_s:g} s "
                f"(startup_timeout_s): are {self._spec.num_cpus:g} CPUs and {self._num_gpus:g} GPUs free for each of "
                f"{self._reward.num_workers}?"
            )
        cause = getattr(error, "cause", None)  # What ready() raised.
        if isinstance(cause, ConfigError):
            return cause
        return RewardError(f"an actor of {self.name} cannot start: {shortened(error, 1000)}")


def _absolute(reward: RewardModelReward) -> RewardModelReward:
    """Local folders as absolute paths: actors have other working directories."""
    own = None if reward.tokenizer_path is None else absolute_if_local(reward.tokenizer_path)
    return replace(reward, path=absolute_if_local(reward.path), tokenizer_path=own)
