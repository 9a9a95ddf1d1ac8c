"""The Serve application of the rollout replicas: start, handle, stop.

Consumes an engine spec; produces a handle that the controller calls. Owns what it started in Serve and nothing else.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.schema import ApplicationStatus, LoggingConfig

from rlhf_ray.errors import RolloutError
from rlhf_ray.learner.remote.turns import REPLICA_SHARE
from rlhf_ray.rollouts.affinity import AFFINITY
from rlhf_ray.rollouts.engine import EngineSpec
from rlhf_ray.rollouts.replica import RolloutReplica, root_cause
from rlhf_ray.stopping import stop_all
from rlhf_ray.worker_env import worker_env

__all__ = ["QUIET", "RolloutApp", "deploy", "end_unused_serve", "replica_options", "serve_is_running", "start_serve"]

QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)

# Algorithms of several threads share it: none may find it half started, or end it while another deploys.
_LOCK = threading.RLock()

# Which one this process started: there is a new one after each new start of Ray.
_started: str | None = None


def serve_is_running() -> bool:
    """Whether any process started it."""
    return _controller() is not None


def start_serve() -> None:
    """Start it, or connect to the one that runs."""
    global _started
    with _LOCK:
        is_new = not serve_is_running()
        serve.start(proxy_location="Disabled", logging_config=QUIET)
        if is_new:
            _started = _controller()


def deploy(make: Callable[[], serve.RunTarget]) -> Any:
    """Begin to deploy an application, and start Serve where it does not run; returns the application's handle.

    Args:
        make: Makes the application, which only one thread at a time can: Serve changes what pickle does meanwhile.
    """
    with _LOCK:
        start_serve()
        # Not serve.run: nothing but the end of the cluster ends its wait.
        (handle,) = serve.run_many(
            [make()], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False
        )
    return handle


def end_unused_serve() -> None:
    """Shut it down if this process started it and no application is left."""
    with _LOCK:
        if _started is not None and _controller() == _started and not serve.status().applications:
            serve.shutdown()


def _controller() -> str | None:
    """Id of the controller actor; ``None``: Serve does not run."""
    try:
        return str(ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")._actor_id.hex())
    except ValueError:
        return None


_START_ERROR = "RuntimeError: EngineStartError: "

_STOPPED = "the rollout replicas were stopped before they were ready"


_DEPLOYMENT = "RolloutReplica"

_POLLING_S = 0.1

_STOP_TIMEOUT_S = 60.0

# A replica takes requests without bound: vLLM schedules them, and the controller limits groups in flight.
_MAX_ONGOING_REQUESTS = 100_000


class RolloutApp:
    """The Serve pool ``{run_id}-rollout``.

    Args:
        run_id: Names the application.
        spec: How each replica starts its engine.
        num_replicas: Size of the pool.
        num_cpus: CPUs reserved per replica.
        bridge: Handle of the learners' bridge actor.
        startup_timeout_s: Longest wait for the replicas.
        ray_ends: Whether the whole Ray cluster ends with the last algorithm of this process.
    """

    def __init__(
        self,
        *,
        run_id: str,
        spec: EngineSpec,
        num_replicas: int,
        num_cpus: float,
        bridge: Any,
        startup_timeout_s: float,
        ray_ends: bool,
    ) -> None:
        self.name = f"{run_id}-rollout"
        self._spec = spec
        self._num_replicas = num_replicas
        self._num_cpus = num_cpus
        self._bridge = bridge
        self._startup_timeout_s = startup_timeout_s
        self._ray_ends = ray_ends
        self._deploying: Future[Any] | None = None
        self._stopped = threading.Event()
        self._may_begin = threading.Event()
        self._begun = False
        self._ended = False
        # A Serve that ends with stop() never answers what it was asked at that moment.
        self._looking = threading.Lock()
        self.handle: Any = None

    def start(self, *, after: Callable[[threading.Event], None] = lambda stopped: None) -> None:
        """Begin to deploy the replicas in a thread and return at once; :meth:`wait_ready` waits for them.

        Args:
            after: Waits for what must have its place before them, or for the event, which :meth:`stop` sets.
        """
        thread = ThreadPoolExecutor(1, "rollout-app")
        self._deploying = thread.submit(self._deploy, after)
        thread.shutdown(wait=False)

    def wait_ready(self) -> Any:
        """Wait until every replica answers; returns the handle that calls them.

        Raises:
            RolloutError: A replica cannot start, or the time is over; says why.
            RLHFRayError: What must come first has failed.
        """
        self._wait()
        return self.handle

    def wait_placed(self, are_placed: Callable[[], bool]) -> None:
        """Wait until every replica has its place on the cluster, where it may wait to build its engine.

        Raises:
            RolloutError: As :meth:`wait_ready`.
        """
        self._wait(are_placed)

    def _wait(self, is_enough: Callable[[], bool] = bool) -> None:
        assert self._deploying is not None, "start() comes first"
        self._may_begin.wait()  # What it waits for has a time limit of its own.
        ends_at = time.monotonic() + self._startup_timeout_s
        try:
            self.handle = self._deploying.result(self._startup_timeout_s)
        except TimeoutError:
            raise self._late() from None
        except RuntimeError as error:
            raise _cannot_start(str(error)) from error
        while True:
            status, message = self._look()
            if status == ApplicationStatus.RUNNING or is_enough():
                return
            # A model that cannot be loaded will not load at the third try either.
            if status == ApplicationStatus.DEPLOY_FAILED or _START_ERROR in message:
                cause = root_cause(message.splitlines()) or message
                raise _cannot_start(cause.removeprefix(_START_ERROR))
            if time.monotonic() > ends_at:
                raise self._late()
            self._stopped.wait(_POLLING_S)

    def stop(self) -> None:
        """Delete the application, and Serve too if this process started it and no other application is left."""
        self._stopped.set()
        if self._looking.acquire(timeout=_STOP_TIMEOUT_S):
            self._looking.release()
        deploying = self._deploying
        if self._ended or deploying is None or not ray.is_initialized():
            return
        wait([deploying], _STOP_TIMEOUT_S)  # It may not have come yet to what is to be deleted.
        if not self._begun or not serve_is_running():
            return
        steps: list[tuple[str, Callable[[], object]]] = [
            (f"Serve application {self.name}", lambda: serve.delete(self.name))
        ]
        # Serve's actors complain on the console when they are shut down one by one; a cluster that ends takes all.
        if not self._ray_ends:
            steps.append(("Ray Serve", end_unused_serve))
        stop_all(*steps)
        self._ended = True

    def _deploy(self, after: Callable[[threading.Event], None]) -> Any:
        try:
            after(self._stopped)
        finally:
            self._may_begin.set()
        if self._stopped.is_set():
            raise RolloutError(_STOPPED)
        self._begun = True
        return deploy(self._target)

    def _target(self) -> serve.RunTarget:
        application = self._deployment().bind(self._spec, self._bridge)
        return serve.RunTarget(application, name=self.name, route_prefix=None, logging_config=QUIET)

    def _look(self) -> tuple[Any, str]:
        """The application's status, and what Serve says of it.

        Raises:
            RolloutError: It was stopped.
        """
        with self._looking:
            if self._stopped.is_set():
                raise RolloutError(_STOPPED)
            application = serve.status().applications.get(self.name)
        if application is None:
            return None, ""
        messages = [deployment.message for deployment in application.deployments.values()]
        return application.status, str(next((message for message in messages if message), application.message))

    def _late(self) -> RolloutError:
        limit = f"not ready within rollouts.startup_timeout_s = {self._startup_timeout_s:g} s"
        return _cannot_start(f"{limit}; {self._look()[1]}")

    def _deployment(self) -> Any:
        return serve.deployment(
            RolloutReplica,
            name=_DEPLOYMENT,
            num_replicas=self._num_replicas,
            max_ongoing_requests=_MAX_ONGOING_REQUESTS,
            # One that dies on the way, with its node for example, is started again.
            max_constructor_retry_count=3,
            health_check_period_s=1.0,
            health_check_timeout_s=30.0,
            graceful_shutdown_wait_loop_s=0.1,
            graceful_shutdown_timeout_s=5.0,
            request_router_config=RequestRouterConfig(request_router_class=AFFINITY),
            **replica_options(self._spec, self._num_cpus, worker_env(**self._spec.env)),
        )


def replica_options(spec: EngineSpec, num_cpus: float, runtime_env: dict[str, Any]) -> dict[str, Any]:
    """What Ray reserves per replica and how it starts its process, as arguments of a deployment."""
    options: dict[str, Any] = {"num_cpus": num_cpus, "runtime_env": runtime_env}
    extra: dict[str, Any] = {}
    if spec.on_gpu and spec.tensor_parallel_size == 1:
        options["num_gpus"] = REPLICA_SHARE if spec.colocated else 1
    elif spec.on_gpu:
        # vLLM's Ray executor puts one worker on each bundle; the replica itself needs a CPU of the first.
        bundle = {"CPU": num_cpus, "GPU": 1}
        extra["placement_group_bundles"] = [bundle] + [{"GPU": 1}] * (spec.tensor_parallel_size - 1)
        extra["placement_group_strategy"] = "STRICT_PACK"
    return {"ray_actor_options": options, **extra}


_REMEDY = (
    "Check that vLLM can load the model: `rlhf-ray doctor` starts one engine and shows its output; "
    "the full log is in the Serve logs of the Ray session (/tmp/ray/session_latest/logs/serve)."
)


def _cannot_start(reason: str) -> RolloutError:
    return RolloutError(f"the rollout replicas cannot start: {reason}\n{_REMEDY}")
