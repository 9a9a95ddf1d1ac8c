"""The rollout controller: runs the rollout flow (flow.py) in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import wait
from typing import Any, TypeVar

from rlhf_ray.rollouts.flow import RolloutFlow
from rlhf_ray.rollouts.streams import cancel_all
from rlhf_ray.rollouts.tally import Collected
from rlhf_ray.stopping import stop_all
from rlhf_ray.types import Prompt, PromptPosition, RewardFailure, SamplingSettings, ScoredGroup

__all__ = ["RolloutController"]

_STOP_TIMEOUT_S = 10.0
_CHECK_S = 1.0

Result = TypeVar("Result")


class RolloutController:
    """Blocking calls to a :class:`RolloutFlow` whose event loop runs in a thread, started here.

    Args:
        flow: What to run.
        while_waiting: Called every second while a caller waits for completions, in its thread; an error ends the wait.
    """

    def __init__(self, flow: RolloutFlow, *, while_waiting: Callable[[], None]) -> None:
        self._flow = flow
        self._while_waiting = while_waiting
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollout-controller", daemon=True)
        self._thread.start()

    @property
    def retries(self) -> int:
        """Groups sent again because their replica died, since the start."""
        return self._flow.engine.requests.retries

    def collect(self, version: int) -> Collected:
        """See :meth:`RolloutFlow.collect`."""
        return self._run(self._flow.collect(version), self._while_waiting)

    def published(self, version: int) -> None:
        """See :meth:`RolloutFlow.published`; does not wait for it."""
        self._loop.call_soon_threadsafe(self._flow.published, version)

    def score_prompts(
        self, prompts: Sequence[Prompt], sampling: SamplingSettings, version: int
    ) -> tuple[ScoredGroup | RewardFailure, ...]:
        """See :meth:`RolloutFlow.score_prompts`."""
        return self._run(self._flow.score_prompts(prompts, sampling, version), self._while_waiting)

    def prompt_position(self, version: int) -> PromptPosition:
        """See :meth:`RolloutFlow.position`."""
        return self._run(self._flow.position(version))

    def resume(self, version: int) -> None:
        """See :meth:`RolloutFlow.restart`."""
        self._run(self._flow.restart(version))

    def stop(self) -> None:
        """Cancel what is in flight and end the thread; a thread that hangs in the prompt stream is left behind."""
        if not self._thread.is_alive():
            return
        cancelled = asyncio.run_coroutine_threadsafe(self._cancel(), self._loop)
        stop_all(
            ("groups in flight", lambda: cancelled.result(_STOP_TIMEOUT_S)),
            ("thread of the rollout controller", self._end_thread),
        )

    def _end_thread(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=_STOP_TIMEOUT_S)
        if not self._thread.is_alive():
            self._loop.close()

    @staticmethod
    async def _cancel() -> None:
        # Repeatedly: a group that ends meanwhile lets others in.
        while tasks := [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]:
            await cancel_all(tasks)

    def _run(self, work: Coroutine[Any, Any, Result], while_waiting: Callable[[], None] | None = None) -> Result:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            while while_waiting is not None and not wait([future], _CHECK_S).done:
                while_waiting()
            return future.result()
        except BaseException:  # also Ctrl-C in this thread: nothing may continue in the other one
            future.cancel()
            raise
