"""A Ray Tune trial's place on the cluster, from the permission to start its parts until they have stopped."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable
from typing import Any

import ray

from rlhf_ray.errors import ConfigError
from rlhf_ray.tune.queue import Answer, Room

__all__ = ["TrialLease"]

_LOG = logging.getLogger(__name__)
_ASK_S = 1.0
_ANSWER_TIMEOUT_S = 120.0
# What the trial before has just released is seen free only after some seconds.
_PATIENCE_S = 60.0
# Longer waits are said.
_SILENCE_S = 5.0


class TrialLease:
    """Waits for room when made.

    Args:
        keeper: Gives the handle of the trial keeper, a new one where the last has ended.
        need: What all parts of the trial take.
        reduced: What they may do with where no other trial runs and only so much is free; raises ``ConfigError``.
        patience_s: How long a trial that is alone waits for room before it gives up.
        wait: Sleeps.

    Raises:
        ConfigError: No other trial runs, and yet there is no room.
    """

    def __init__(
        self,
        keeper: Callable[[], Any],
        *,
        need: Room,
        reduced: Callable[[Room], Room],
        patience_s: float = _PATIENCE_S,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        self._find_keeper = keeper
        self._wait = wait
        self._id = uuid.uuid4().hex
        self._patience_s = patience_s
        self.room = self._granted(need, reduced)
        """What the trial got."""

    def watch(self, app_name: str, bridge: Any) -> None:
        """Have the Serve application deleted should this process be killed."""
        self._tell("watch", app_name, bridge)

    def started(self) -> None:
        """All parts run: the next trial may start."""
        self._tell("started")

    def end(self) -> None:
        """All parts have stopped."""
        self._tell("leave")

    def _granted(self, need: Room, reduced: Callable[[Room], Room]) -> Room:
        began = alone_since = time.monotonic()
        told, asked = False, need
        while True:
            answer = self._ask(asked)
            if answer is not None and answer.granted:
                return asked
            now = time.monotonic()
            if answer is None or answer.others or not answer.is_next:
                alone_since, asked = now, need
                if answer is not None and not told and now - began > _SILENCE_S:
                    told = True
                    _LOG.warning(_WAITING, need, answer.free, answer.others)
            else:
                asked = self._reduced(answer.free, need, reduced, is_over=now - alone_since > self._patience_s)
            self._wait(_ASK_S)

    @staticmethod
    def _reduced(free: Room, need: Room, reduced: Callable[[Room], Room], *, is_over: bool) -> Room:
        try:
            if is_over:
                raise ConfigError("resources", str(need), _NO_ROOM.format(free=free))
            return reduced(free)
        except ConfigError:
            if is_over:
                raise
            return need

    def _ask(self, need: Room) -> Answer | None:
        try:
            self._keeper = self._find_keeper()
            answer: Answer | None = ray.get(self._keeper.ask.remote(self._id, need), timeout=_ANSWER_TIMEOUT_S)
        except ray.exceptions.RayActorError:  # It ended after the last trial before this one.
            return None
        return answer

    def _tell(self, method: str, *arguments: Any) -> None:
        try:
            ray.get(getattr(self._keeper, method).remote(self._id, *arguments), timeout=_ANSWER_TIMEOUT_S)
        except ray.exceptions.RayActorError as error:
            _LOG.warning("the actor that looks after the trials' Serve applications is gone: %s", error)


_WAITING = (
    "this trial waits for room: its parts need %s, %s are free, and %d other trials run. That is no error; set "
    "TuneConfig(max_concurrent_trials=...) to how many fit, or lower resources.cpus_per_replica, cpus_per_learner and "
    "cpus_per_reward_worker to run more of them side by side"
)
_NO_ROOM = (
    "no other trial runs, and yet only {free} are free: trials that wait for room, or other programs, hold the rest. "
    "Set TuneConfig(max_concurrent_trials=...) to how many trials fit, or lower resources.cpus_per_replica, "
    "cpus_per_learner and cpus_per_reward_worker"
)
