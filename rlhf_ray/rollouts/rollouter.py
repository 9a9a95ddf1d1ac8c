"""The seam of rollouts: how the trajectories of one prompt come about, given replicas and seeds.

The flow (flow.py) decides when a prompt is rolled out, at which policy version and with which sampling settings; a
:class:`Rollouter` decides what happens then. It asks an :class:`Engine` for tokens, once or turn by turn, and never
learns of replicas that die: the engine repeats each request by itself.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from rlhf_ray.errors import RolloutError
from rlhf_ray.span_log import SpanLog
from rlhf_ray.types import (
    EnvironmentStats,
    Int32Array,
    Prompt,
    RewardFailure,
    RolloutGroup,
    SamplingSettings,
    TraceSpan,
)
from rlhf_ray.untrusted_text import shortened

__all__ = ["Engine", "Requests", "Rollouter", "Seeds", "SingleTurn", "group_seed"]


def group_seed(run_seed: int, version: int, prompt_id: int) -> int:
    """Seed of a group's first completion, below 2**62; the i-th completion's is ``group_seed(...) + i``."""
    return _seed(f"{run_seed}/{version}/{prompt_id}")


def _seed(text: str) -> int:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Seeds:
    """The seeds of one group."""

    run_seed: int
    version: int
    prompt_id: int

    @property
    def first_turn(self) -> int:
        """Of the first trajectory's first turn; the i-th one's is ``first_turn + i``."""
        return group_seed(self.run_seed, self.version, self.prompt_id)

    def later_turn(self, index: int, prefix: Int32Array, times: int) -> int:
        """Of a later turn of trajectory ``index``: by the tokens before it, not by when it was asked for.

        Args:
            index: The trajectory's in its group.
            prefix: ``[P]``, all tokens before the turn.
            times: Turns of this trajectory that were sampled after the same tokens before.
        """
        digest = hashlib.blake2b(prefix.tobytes(), digest_size=16).hexdigest()
        return _seed(f"{self.run_seed}/{self.version}/{self.prompt_id}/{index}/{digest}/{times}")

    @property
    def environment(self) -> int:
        """Of the environment, the same for all trajectories of a group, whichever policy plays them."""
        return _seed(f"{self.run_seed}/environment/{self.prompt_id}")


_LOG = logging.getLogger(__name__)

_RETRY_PAUSE_S = 1.0


def _nothing() -> None:
    pass


@dataclass(slots=True)
class Requests:
    """What became of the requests to replicas since the start."""

    retries: int = 0
    """Requests repeated because their replica died."""
    spans: SpanLog = field(default_factory=SpanLog)
    """What replicas generated, and what environments did."""
    environments: dict[str, EnvironmentStats] = field(default_factory=dict)
    """By their names; emptied when a batch is made."""

    on_step: Callable[[], None] = _nothing
    """Called after each step of an environment: long episodes make progress, too."""

    def stepped(self, environment: str, worker: str, seconds: float, metrics: Mapping[str, float]) -> None:
        """Book a step of an environment."""
        stats = EnvironmentStats.of_step(seconds, metrics)
        self.environments[environment] = self.environments.get(environment, EnvironmentStats()) + stats
        self.spans.add(TraceSpan.ending_now(worker, environment, seconds))
        self.on_step()

    def take_environments(self) -> dict[str, EnvironmentStats]:
        """What environments did since the last call."""
        stats = dict(self.environments)
        self.environments.clear()
        return stats


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """All replicas, as one rollout sees them.

    ``dataclasses.replace`` gives the engine of a later turn: newer weights at least, one sample, the same replica.
    """

    generate: Callable[..., Awaitable[RolloutGroup]]
    """``generate(prompt, sampling, seed=, max_tokens=, min_version=, replica_id=)`` -> group, awaited: one request."""
    sampling: SamplingSettings
    """How tokens are drawn: as in training, greedily for a baseline, or as in evaluation."""
    version: int = 0
    """Oldest policy version that may answer."""
    max_retries: int
    """Times a request is repeated because its replica died."""
    timeout_s: float
    """Longest wait for one request."""
    replica_id: str = ""
    """Replica that has the tokens before in its cache, and answers if it lives; empty: any."""
    requests: Requests = field(default_factory=Requests)

    async def sample(self, prompt: Prompt, *, seed: int, max_tokens: int | None = None) -> RolloutGroup:
        """Sample ``sampling.group_size`` continuations of a prompt; the i-th one's seed is ``seed + i``.

        Args:
            prompt: All tokens so far.
            seed: Of the first.
            max_tokens: Longest continuation; unset: ``sampling.max_new_tokens``.

        Raises:
            RolloutError: The prompt is refused, took longer than ``timeout_s``, or replicas died at each try.
        """
        for attempt in range(self.max_retries + 1):
            try:
                return await self._sample_once(prompt, seed, max_tokens or self.sampling.max_new_tokens)
            except _replica_errors() as error:
                if isinstance(refusal := getattr(error, "cause", None), RolloutError):
                    raise refusal from error
                reason = shortened(repr(error))
                if attempt == self.max_retries:
                    raise RolloutError(
                        f"prompt {prompt.prompt_id} failed {attempt + 1} times, last with {reason}"
                    ) from error
                self.requests.retries += 1
                _LOG.warning("prompt %d is sent again, its replica failed: %s", prompt.prompt_id, reason)
                await asyncio.sleep(_RETRY_PAUSE_S)
        raise AssertionError("unreachable")

    async def _sample_once(self, prompt: Prompt, seed: int, max_tokens: int) -> RolloutGroup:
        bare = replace(prompt, columns={}, text="")  # All that a replica reads.
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            async with asyncio.timeout(self.timeout_s) as limit:
                group = await self.generate(
                    bare,
                    self.sampling,
                    seed=seed,
                    max_tokens=max_tokens,
                    min_version=self.version,
                    replica_id=self.replica_id,
                )
        except TimeoutError:
            if not limit.expired():
                raise
            raise RolloutError(
                f"prompt {prompt.prompt_id} was not completed within rollouts.timeout_s = {self.timeout_s:g} s"
            ) from None
        lane, name = f"replica {group.replica_id}", f"group {prompt.prompt_id}"
        self.requests.spans.add(TraceSpan.ending_now(lane, name, loop.time() - started))
        return replace(group, prompt=prompt)


class Rollouter(Protocol):
    """A kind of rollout; :attr:`rlhf_ray.Algorithm.rollouter` names the one that an algorithm uses."""

    async def rollout(self, prompt: Prompt, engine: Engine, seeds: Seeds) -> RolloutGroup | RewardFailure:
        """Roll a prompt out to ``engine.sampling.group_size`` trajectories, or say why there are none to score.

        Called for training, for greedy baselines and for evaluation, many at a time on one event loop; it is cancelled
        when its group is not needed any more. What it draws must follow from its arguments alone, so that a group which
        is rolled out again is the same group.
        """
        ...


class SingleTurn:
    """The completions of a prompt: one request, one turn each."""

    async def rollout(self, prompt: Prompt, engine: Engine, seeds: Seeds) -> RolloutGroup:
        """See :meth:`Rollouter.rollout`."""
        return await engine.sample(prompt, seed=seeds.first_turn)


def _replica_errors() -> tuple[type[BaseException], ...]:
    """What a request raises when its replica died or its engine did; anything else is a defect and propagates."""
    from ray.exceptions import ObjectLostError, RayActorError, RayTaskError, WorkerCrashedError
    from ray.serve.exceptions import RequestCancelledError

    return (ObjectLostError, RayActorError, RayTaskError, WorkerCrashedError, RequestCancelledError)
