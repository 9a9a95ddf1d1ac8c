"""One actor for all Ray Tune trials of a cluster: gives them resources, starts Serve for them and outlives them.

Tune kills a trial that has not stopped by itself after ten seconds, and the memory monitor kills without asking. Ray
then ends all actors of the trial but the replicas, which belong to Serve, and keeps the learners' placement group until
the whole sweep has ended. The supervisor notices that the trial's bridge is gone and removes both. Some seconds after
the last trial it shuts Serve down, if it had started it, and ends itself.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.util import remove_placement_group

from rlhf_ray.rollouts.app import end_unused_serve, start_serve
from rlhf_ray.stopping import stop_all
from rlhf_ray.worker_env import worker_env

__all__ = ["Answer", "Resources", "Supervisor", "TrialQueue", "trial_supervisor"]

# A trial that waits asks every second; one that has not asked for so long is gone.
_FORGOTTEN_S = 30.0

# Ray counts in ten-thousandths.
_ROUNDING = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """CPUs and GPUs, needed or free."""

    cpus: float
    gpus: float
    in_pairs: bool = False
    """Whether replica and learner share each GPU: Ray pairs them as long as nothing else takes parts of GPUs."""

    def __sub__(self, other: Resources) -> Resources:
        return Resources(cpus=self.cpus - other.cpus, gpus=self.gpus - other.gpus)

    def fit_in(self, free: Resources) -> bool:
        """Whether there is at least so much."""
        return self.cpus <= free.cpus + _ROUNDING and self.gpus <= free.gpus + _ROUNDING

    def __str__(self) -> str:
        return f"{self.cpus:.2g} CPUs and {self.gpus:g} GPUs" if self.gpus else f"{self.cpus:.2g} CPUs"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a trial is told."""

    granted: bool
    free: Resources
    """What the cluster has free, less what trials that are starting will take."""
    others: int
    """Trials that have their resources."""
    is_next: bool
    """Whether no other trial asked earlier."""


@dataclass(slots=True, kw_only=True)
class _Trial:
    need: Resources
    asked_at: float
    granted_at: float | None = None
    has_started: bool = False
    parts: Any = None


class TrialQueue:
    """Trials that wait, start or run, in the order in which they asked first.

    Args:
        free: What the cluster has free now.
        clock: Seconds.
    """

    def __init__(self, free: Callable[[], Resources], clock: Callable[[], float] = time.monotonic) -> None:
        self._free = free
        self._clock = clock
        self._trials: dict[str, _Trial] = {}

    def ask(self, name: str, need: Resources) -> Answer:
        """Give a trial its resources, or put it into the queue; one that waits asks again and again."""
        now = self._clock()
        trial = self._trials.setdefault(name, _Trial(need=need, asked_at=now))
        trial.need, trial.asked_at = need, now
        self._forget()
        others = [other for other in self._trials.values() if other.granted_at is not None]
        starting = [other.need for other in others if not other.has_started]
        free = self._free()
        for taken in starting:
            free -= taken
        is_next = next((other for other in self._trials.values() if other.granted_at is None), None) is trial
        is_in_the_way = bool(starting) and any(each.in_pairs for each in (need, *starting))
        granted = is_next and need.fit_in(free) and not is_in_the_way
        if granted:
            trial.granted_at = now
        return Answer(granted=granted, free=free, others=len(others), is_next=is_next)

    def watch(self, name: str, parts: Any) -> None:
        """Remember what a trial has started, even if it was given up meanwhile."""
        now = self._clock()
        late = _Trial(need=Resources(cpus=0.0, gpus=0.0), asked_at=now, granted_at=now)
        self._trials.setdefault(name, late).parts = parts

    def started(self, name: str) -> None:
        """All its parts run: from now on the cluster itself counts what they take."""
        if name in self._trials:
            self._trials[name].has_started = True

    def leave(self, name: str) -> None:
        """Remove a trial, whatever its state."""
        self._trials.pop(name, None)

    def watched(self) -> dict[str, Any]:
        """The parts of each trial that has some."""
        return {name: trial.parts for name, trial in self._trials.items() if trial.parts is not None}

    def unwatched(self, for_s: float) -> list[str]:
        """Trials that got their resources so long ago and have started nothing."""
        since = self._clock() - for_s
        without = ((name, trial.granted_at) for name, trial in self._trials.items() if trial.parts is None)
        return [name for name, granted_at in without if granted_at is not None and granted_at < since]

    def is_empty(self) -> bool:
        """Whether no trial has resources or waits for them."""
        self._forget()
        return not self._trials

    def _forget(self) -> None:
        since = self._clock() - _FORGOTTEN_S
        for name in [name for name, each in self._trials.items() if each.granted_at is None and each.asked_at < since]:
            del self._trials[name]


_NAME = "rlhf_ray_trial_supervisor"

_NAMESPACE = "rlhf_ray"

_LOOK_S = 1.0

# The process of the next trial takes that long to start on a busy machine.
_LINGER_S = 20.0

# From the permission to start to the first part that can be watched.
_UNWATCHED_S = 120.0


class _Parts:
    """What a killed trial leaves behind; its bridge dies with it and until then knows where the learners are."""

    def __init__(self, app_name: str, bridge: Any) -> None:
        self._app_name = app_name
        self._bridge = bridge
        self._placement_group: Any = None
        self._answer = bridge.placement_group.remote()

    def are_left(self) -> bool:
        """Whether the bridge has died for good, as far as is known without waiting for it."""
        if not ray.wait([self._answer], timeout=0)[0]:
            return False
        try:
            self._placement_group = ray.get(self._answer) or self._placement_group
        except ray.exceptions.ActorDiedError:
            return True
        except ray.exceptions.RayActorError:  # Out of reach for a while.
            pass
        self._answer = self._bridge.placement_group.remote()
        return False

    def remove(self) -> None:
        """Delete the application, and remove the group: Ray does that only when all of the sweep's job has ended.

        Serve may be gone, and the application with it; other trials' must still be supervised.
        """
        steps: list[tuple[str, Callable[[], object]]] = [
            (f"Serve application {self._app_name}", lambda: serve.delete(self._app_name))
        ]
        if self._placement_group is not None:
            steps.insert(0, ("the learners' placement group", lambda: remove_placement_group(self._placement_group)))
        stop_all(*steps)


class Supervisor:
    """The actor itself; calls come in several threads."""

    def __init__(self) -> None:
        # Not from within a trial: Ray would look for the controller's node in the trial's placement group.
        start_serve()
        self._lock = threading.Lock()
        self._queue = TrialQueue(_free)
        self._closed = False
        threading.Thread(target=self._supervise, name="supervise", daemon=True).start()

    def ask(self, trial: str, need: Resources) -> Answer | None:
        """See :meth:`TrialQueue.ask`; ``None``: this supervisor is about to end, ask a new one."""
        with self._lock:
            return None if self._closed else self._queue.ask(trial, need)

    def watch(self, trial: str, app_name: str, bridge: Any) -> None:
        """Remove a Serve application and the learners' placement group when ``bridge``, of the same trial, is gone."""
        with self._lock:
            self._queue.watch(trial, _Parts(app_name, bridge))

    def started(self, trial: str) -> None:
        """All parts of a trial run."""
        with self._lock:
            self._queue.started(trial)

    def leave(self, trial: str) -> None:
        """A trial has stopped its parts."""
        with self._lock:
            self._queue.leave(trial)

    def _supervise(self) -> None:
        empty_since = time.monotonic()
        while not self._closed:
            time.sleep(_LOOK_S)
            self._clear_away()
            with self._lock:
                if not self._queue.is_empty():
                    empty_since = time.monotonic()
                self._closed = time.monotonic() - empty_since > _LINGER_S
        stop_all(
            ("Ray Serve", end_unused_serve),
            ("the trials' supervisor", lambda: ray.kill(ray.get_actor(_NAME, namespace=_NAMESPACE))),
        )

    def _clear_away(self) -> None:
        with self._lock:
            watched, gone = self._queue.watched(), self._queue.unwatched(_UNWATCHED_S)
        for trial, parts in watched.items():
            if parts.are_left():
                parts.remove()
                gone.append(trial)
        for trial in gone:
            self.leave(trial)


def trial_supervisor() -> Any:
    """The cluster's supervisor, started if there is none."""
    return (
        ray.remote(Supervisor)
        .options(
            name=_NAME,
            namespace=_NAMESPACE,
            get_if_exists=True,
            lifetime="detached",
            num_cpus=0,
            max_concurrency=16,
            # Not inside the placement group of the trial that happens to be the first.
            scheduling_strategy="DEFAULT",
            runtime_env=worker_env(),
        )
        .remote()
    )


def _free() -> Resources:
    free = ray.available_resources()
    return Resources(cpus=free.get("CPU", 0.0), gpus=free.get("GPU", 0.0))
