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
from typing import Any

import ray
from ray import serve
from ray.util import remove_placement_group

from rlhf_ray.rollouts.serve_instance import end_unused_serve, start_serve
from rlhf_ray.stopping import stop_all
from rlhf_ray.tune.queue import Answer, Resources, TrialQueue
from rlhf_ray.worker_env import worker_env

__all__ = ["Supervisor", "trial_supervisor"]

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
