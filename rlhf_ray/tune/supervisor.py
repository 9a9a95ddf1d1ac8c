"""One actor for all Ray Tune trials of a cluster: gives them room, starts Serve for them and outlives them.

Tune kills a trial that has not stopped by itself after ten seconds, and the memory monitor kills without asking. Ray
then ends all actors of the trial but the replicas, which belong to Serve, and keeps the learners' placement group until
the whole sweep has ended. The keeper notices that the trial's bridge is gone and removes both. Some seconds after the
last trial it shuts Serve down, if it had started it, and ends itself.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray import serve
from ray.util import remove_placement_group

from rlhf_ray.rollouts.serve_instance import end_unused_serve, start_serve
from rlhf_ray.stopping import stop_all
from rlhf_ray.tune.queue import Answer, Room, TrialRoom
from rlhf_ray.worker_env import worker_env

__all__ = ["TrialKeeper", "trial_keeper"]

_NAME = "rlhf_ray_trial_keeper"
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
        self.call()

    def call(self) -> None:
        """Ask the bridge, without waiting for it."""
        self._answer = self._bridge.placement_group.remote()

    def has_answered(self) -> bool:
        """Whether the bridge's answer is there, or its end is known."""
        return bool(ray.wait([self._answer], timeout=0)[0])

    def is_gone(self) -> bool:
        """Whether the bridge has died for good."""
        try:
            self._placement_group = ray.get(self._answer) or self._placement_group
        except ray.exceptions.ActorDiedError:
            return True
        except ray.exceptions.RayActorError:  # Out of reach for a while.
            return False
        return False

    def remove(self) -> None:
        """Delete the application, and remove the group: Ray does that only when all of the sweep's job has ended.

        Serve may be gone, and the application with it; other trials' must still be looked after.
        """
        steps: list[tuple[str, Callable[[], object]]] = [
            (f"Serve application {self._app_name}", lambda: serve.delete(self._app_name))
        ]
        if self._placement_group is not None:
            steps.insert(0, ("the learners' placement group", lambda: remove_placement_group(self._placement_group)))
        stop_all(*steps)


class TrialKeeper:
    """The actor itself; calls come in several threads."""

    def __init__(self) -> None:
        # Not from within a trial: Ray would look for the controller's node in the trial's placement group.
        start_serve()
        self._lock = threading.Lock()
        self._room = TrialRoom(_free)
        self._unwatched: dict[str, float] = {}
        self._watched: dict[str, _Parts] = {}
        self._closed = False
        threading.Thread(target=self._look_after, name="look-after", daemon=True).start()

    def ask(self, trial: str, need: Room) -> Answer | None:
        """See :meth:`TrialRoom.ask`; ``None``: this keeper is about to end, ask a new one."""
        with self._lock:
            if self._closed:
                return None
            answer = self._room.ask(trial, need)
            if answer.granted:
                self._unwatched[trial] = time.monotonic()
            return answer

    def watch(self, trial: str, app_name: str, bridge: Any) -> None:
        """Remove a Serve application and the learners' placement group when ``bridge``, of the same trial, is gone."""
        with self._lock:
            self._unwatched.pop(trial, None)
            self._watched[trial] = _Parts(app_name, bridge)

    def started(self, trial: str) -> None:
        """All parts of a trial run."""
        with self._lock:
            self._room.started(trial)

    def leave(self, trial: str) -> None:
        """A trial has stopped its parts."""
        with self._lock:
            self._unwatched.pop(trial, None)
            self._watched.pop(trial, None)
            self._room.leave(trial)

    def _look_after(self) -> None:
        empty_since = time.monotonic()
        while True:
            time.sleep(_LOOK_S)
            self._clear_away()
            with self._lock:
                now = time.monotonic()
                if not self._room.is_empty():
                    empty_since = now
                if now - empty_since > _LINGER_S:
                    self._closed = True
                    break
        self._end()

    def _clear_away(self) -> None:
        with self._lock:
            watched = dict(self._watched)
            late = [trial for trial, since in self._unwatched.items() if time.monotonic() - since > _UNWATCHED_S]
        for trial, parts in watched.items():
            if not parts.has_answered():
                continue
            if not parts.is_gone():
                parts.call()
                continue
            parts.remove()
            self.leave(trial)
        for trial in late:
            self.leave(trial)

    def _end(self) -> None:
        stop_all(
            ("Ray Serve", end_unused_serve),
            ("the trial keeper", lambda: ray.kill(ray.get_actor(_NAME, namespace=_NAMESPACE))),
        )


def trial_keeper() -> Any:
    """The cluster's keeper, started if there is none."""
    options: dict[str, Any] = {
        "name": _NAME,
        "namespace": _NAMESPACE,
        "get_if_exists": True,
        "lifetime": "detached",
        "num_cpus": 0,
        "max_concurrency": 16,
        # Neither inside the placement group of the trial that happens to be the first.
        "scheduling_strategy": "DEFAULT",
        "runtime_env": worker_env(),
    }
    return ray.remote(TrialKeeper).options(**options).remote()


def _free() -> Room:
    free = ray.available_resources()
    return Room(cpus=free.get("CPU", 0.0), gpus=free.get("GPU", 0.0))
