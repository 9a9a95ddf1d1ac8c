"""Requests to the replicas, one group at a time: repeated where a replica dies, and bounded in time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace

from rlhf_ray.errors import RolloutError
from rlhf_ray.span_log import SpanLog
from rlhf_ray.types import Prompt, RolloutGroup, SamplingSettings, TraceSpan
from rlhf_ray.untrusted_text import shortened

__all__ = ["ReplicaPool"]

_LOG = logging.getLogger(__name__)
_RETRY_PAUSE_S = 1.0


class ReplicaPool:
    """What a request to any replica must survive.

    Args:
        generate: ``generate(prompt, sampling, seed=, min_version=)`` -> group, awaited; one try.
        max_retries: Times a request is repeated because its replica died.
        timeout_s: Longest wait for one try.
    """

    def __init__(self, generate: Callable[..., Awaitable[RolloutGroup]], *, max_retries: int, timeout_s: float) -> None:
        self._generate = generate
        self._max_retries = max_retries
        self._timeout_s = timeout_s
        self.retries = 0
        """Requests repeated because their replica died, since the start."""
        self.spans = SpanLog()
        """What replicas generated."""

    async def sample(self, prompt: Prompt, sampling: SamplingSettings, *, seed: int, min_version: int) -> RolloutGroup:
        """Sample a group with weights of ``min_version`` or newer.

        Raises:
            RolloutError: The engine refuses the prompt, a try took longer than ``timeout_s``, or replicas died at each.
        """
        bare = replace(prompt, columns={}, text="")  # All that an engine reads.
        for attempt in range(self._max_retries + 1):
            started = asyncio.get_running_loop().time()
            try:
                async with asyncio.timeout(self._timeout_s) as limit:
                    group = await self._generate(bare, sampling, seed=seed, min_version=min_version)
            except TimeoutError:
                if not limit.expired():
                    raise
                raise RolloutError(
                    f"prompt {prompt.prompt_id} was not completed within rollouts.timeout_s = {self._timeout_s:g} s"
                ) from None
            except _replica_errors() as error:
                if isinstance(refusal := getattr(error, "cause", None), RolloutError):
                    raise refusal from error
                if attempt == self._max_retries:
                    raise RolloutError(
                        f"prompt {prompt.prompt_id} failed {attempt + 1} times, last with {shortened(repr(error))}"
                    ) from error
                self.retries += 1
                _LOG.warning(
                    "prompt %d is sent again, its replica failed: %s", prompt.prompt_id, shortened(repr(error))
                )
                await asyncio.sleep(_RETRY_PAUSE_S)
            else:
                seconds = asyncio.get_running_loop().time() - started
                lane, name = f"replica {group.replica_id}", f"group {prompt.prompt_id}"
                self.spans.add(TraceSpan.ending_now(lane, name, seconds))
                return replace(group, prompt=prompt)
        raise AssertionError("unreachable")


def _replica_errors() -> tuple[type[BaseException], ...]:
    """What a call raises when its replica died or its engine did; anything else is a defect and propagates."""
    from ray.exceptions import ObjectLostError, RayActorError, RayTaskError, WorkerCrashedError
    from ray.serve.exceptions import RequestCancelledError

    return (ObjectLostError, RayActorError, RayTaskError, WorkerCrashedError, RequestCancelledError)
