"""A Ray Tune trial's resources, from the permission to start its parts until they have stopped."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable
from typing import Any

import ray

from rlhf_ray.errors import ConfigError
from rlhf_ray.tune.supervisor import Answer, Resources

__all__ = ["Reservation"]

_LOG = logging.getLogger(__name__)
_ASK_S = 1.0
_ANSWER_TIMEOUT_S = 120.0
# What the trial before has just released is seen free only after some seconds.
_PATIENCE_S = 60.0
# Longer waits are logged.
_SILENCE_S = 5.0


class Reservation:
    """Waits for resources when made.

    Args:
        supervisor: Gives the handle of the trials' supervisor, a new one where the last has ended.
        need: What all parts of the trial take.
        reduced: What they may do with where no other trial runs and only so much is free; raises ``ConfigError``.
        patience_s: How long to wait for resources while no other trial runs.
        wait: Sleeps.

    Raises:
        ConfigError: No other trial runs, and yet there are too few resources.
    """

    def __init__(
        self,
        supervisor: Callable[[], Any],
        *,
        need: Resources,
        reduced: Callable[[Resources], Resources],
        patience_s: float = _PATIENCE_S,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        self._find_supervisor = supervisor
        self._wait = wait
        self._id = uuid.uuid4().hex
        self._patience_s = patience_s
        self.resources = self._granted(need, reduced)
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

    def _granted(self, need: Resources, reduced: Callable[[Resources], Resources]) -> Resources:
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
            elif now - alone_since > self._patience_s:
                raise ConfigError("resources", str(need), _TOO_FEW.format(free=answer.free))
            else:
                try:
                    asked = reduced(answer.free)
                except ConfigError:
                    asked = need
            self._wait(_ASK_S)

    def _ask(self, need: Resources) -> Answer | None:
        try:
            self._supervisor = self._find_supervisor()
            answer: Answer | None = ray.get(self._supervisor.ask.remote(self._id, need), timeout=_ANSWER_TIMEOUT_S)
        except ray.exceptions.RayActorError:  # It ended after the last trial before this one.
            return None
        return answer

    def _tell(self, method: str, *arguments: Any) -> None:
        try:
            ray.get(getattr(self._supervisor, method).remote(self._id, *arguments), timeout=_ANSWER_TIMEOUT_S)
        except ray.exceptions.RayActorError as error:
            _LOG.warning("the actor that supervises the trials' Serve applications is gone: %s", error)


_WAITING = (
    "this trial waits for resources: its parts need %s, %s are free, and %d other trials run. That is no error; set "
    "TuneConfig(max_concurrent_trials=...) to how many fit, or lower resources.cpus_per_replica, cpus_per_learner and "
    "cpus_per_reward_worker to run more of them at once"
)
_TOO_FEW = (
    "no other trial runs, and yet only {free} are free: trials that wait, or other programs, hold the rest. "
    "Set TuneConfig(max_concurrent_trials=...) to how many trials fit, or lower resources.cpus_per_replica, "
    "cpus_per_learner and cpus_per_reward_worker"
)
