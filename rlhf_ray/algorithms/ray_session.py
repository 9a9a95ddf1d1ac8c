"""The Ray cluster under a run: joins or starts one, derives shares of it, and shuts down only what it started."""

from __future__ import annotations

import logging
import math
import os
from contextlib import suppress
from dataclasses import dataclass

import psutil
import ray
from ray._private import services

from rlhf_ray.algorithms.trial import Trial
from rlhf_ray.algorithms.trial_lease import TrialLease
from rlhf_ray.algorithms.trial_room import Room
from rlhf_ray.errors import ConfigError
from rlhf_ray.rewards.functions import reward_models
from rlhf_ray.settings import Settings

__all__ = ["RaySession", "Shares", "cluster_to_join", "cpu_shares", "resolve_device"]

_LOG = logging.getLogger(__name__)
# How long workers have to end after their raylet.
_GRACE_S = 5.0

# What a cluster that ends with this run does not need, and what would wake its processes up beside two busy cores.
_OWN_CLUSTER_ENV = {
    # Nobody announces the end of the only node.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # It has no dashboard to show them.
    "RAY_enable_metrics_collection": "0",
    "RAY_task_events_report_interval_ms": "0",
    # Ten looks a second at a pool that changes only when a replica dies.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
}

# Left free on a small machine: Ray Data's readers and whatever else asks for a little.
_SPARE_CPUS = 0.2
_SMALLEST_SHARE = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """CPUs reserved a replica, a learner and a reward worker."""

    replica: float
    learner: float
    reward_worker: float

    def total(self, settings: Settings) -> float:
        """CPUs of all replicas, learners and reward workers, those of reward models included."""
        return (
            self.replica * settings.rollouts.num_replicas
            + self.learner * settings.learners.num_learners
            + self.reward_worker * _num_reward_workers(settings)
        )


def cpu_shares(settings: Settings, cluster_cpus: float) -> Shares:
    """Reservations that fit the cluster: one CPU each, or a fair share where there are fewer CPUs than actors.

    Raises:
        ConfigError: The reservations asked for exceed the cluster.
    """
    resources = settings.resources
    asked = [
        (resources.cpus_per_replica, settings.rollouts.num_replicas),
        (resources.cpus_per_learner, settings.learners.num_learners),
        (resources.cpus_per_reward_worker, _num_reward_workers(settings)),
    ]
    fixed = sum(cpus * count for cpus, count in asked if cpus is not None)
    open_actors = sum(count for cpus, count in asked if cpus is None)
    room = cluster_cpus - _SPARE_CPUS - fixed
    if fixed > cluster_cpus or (open_actors and room < open_actors * _SMALLEST_SHARE):
        raise ConfigError(
            "resources.cpus_per_replica / cpus_per_learner / cpus_per_reward_worker",
            fixed,
            f"replicas, learners and reward workers need more than the cluster's {cluster_cpus:g} CPUs; lower them",
        )
    # Ray counts fractions in ten-thousandths, and only below one.
    share = 1.0 if not open_actors or room >= open_actors else math.floor(room / open_actors * 100) / 100
    replica, learner, reward_worker = (share if cpus is None else cpus for cpus, _ in asked)
    return Shares(replica=replica, learner=learner, reward_worker=reward_worker)


def resolve_device(settings: Settings, gpus: float) -> bool:
    """Whether replicas run on GPUs, in a cluster that has ``gpus``.

    Raises:
        ConfigError: The run asks for more than that.
    """
    on_gpu = settings.resources.device == "cuda" or (settings.resources.device == "auto" and gpus > 0)
    if settings.learners.num_gpus_per_learner and not on_gpu:
        raise ConfigError(
            "learners.num_gpus_per_learner",
            settings.learners.num_gpus_per_learner,
            "the cluster has no GPUs; leave it out, or set resources.ray_address to a cluster that has some",
        )
    needed = _gpus_needed(settings)
    if on_gpu and needed > gpus:
        raise ConfigError(
            "resources.device",
            settings.resources.device,
            f"{settings.rollouts.num_replicas} replicas of {settings.rollouts.tensor_parallel_size} GPUs and "
            f"{settings.learners.num_learners} learners need {needed} GPUs, the cluster has {gpus:g}; lower "
            "rollouts.num_replicas or learners.num_learners, or set learners.num_gpus_per_learner = 0 or "
            "resources.device = cpu",
        )
    of_models = _gpus_of_models(settings, on_gpu=on_gpu)
    free = gpus - (needed if on_gpu else 0)
    if of_models > free:
        raise ConfigError(
            "rewards.functions",
            [model.path for model in reward_models(settings.rewards)],
            f"the reward models need {of_models:g} GPUs, and replicas and learners leave {free:g} of the cluster's "
            f"{gpus:g}; lower num_gpus (0: on CPUs) or num_workers of the reward models",
        )
    return on_gpu


def cluster_to_join(address: str | None) -> str | None:
    """The cluster that ``ray.init(address)`` looks for here; ``None``: it starts one.

    Without an address, in ``RAY_ADDRESS`` neither, that is the cluster on Ray's record: the last that ``ray start``
    started or joined on this machine, until ``ray stop``.
    """
    if address in (None, "auto"):
        address = os.environ.get("RAY_ADDRESS") or address or services.find_bootstrap_address(None)
    return None if address == "local" else address


class RaySession:
    """A connection to Ray.

    Args:
        settings: The run's settings: address, device and noise.
        trial: The Ray Tune trial that this is; waits until the cluster has room for it. None: no trial.

    Raises:
        ConfigError: The run does not fit the cluster.
    """

    def __init__(self, settings: Settings, trial: Trial | None = None) -> None:
        self._connected = not ray.is_initialized()
        before = _raylets()
        if self._connected:
            _connect(settings)
        self._raylets = [raylet for raylet in _raylets() if raylet not in before]
        # By what came of it: where ray.init() looks for a cluster is for Ray to decide, and a user's must not be ended.
        self.ends_ray = bool(self._raylets)
        """Whether this session started the whole cluster, which ends with it."""
        self.lease: TrialLease | None = None
        self._quieten(settings.debugging.log_level)
        try:
            self.on_gpu = resolve_device(settings, ray.cluster_resources().get("GPU", 0.0))
            """Whether replicas run on GPUs."""
            self.learners_on_gpu = self.on_gpu and settings.learners.num_gpus_per_learner != 0
            """Whether learners run on GPUs."""
            cpus = ray.cluster_resources().get("CPU", 0.0)
            self.shares = cpu_shares(settings, cpus) if trial is None else self._leased(settings, cpus - trial.cpus)
        except BaseException:
            self.stop()  # Or the next session here would take this cluster for the user's.
            raise

    def stop(self) -> None:
        """Leave the cluster; one that this session started ends with it."""
        lease, self.lease = self.lease, None
        if lease is not None:
            lease.end()
        if not (self._connected and ray.is_initialized()):
            return
        workers = _below(self._raylets)
        ray.shutdown()
        _end(workers, grace_s=_GRACE_S)

    def _leased(self, settings: Settings, cpus: float) -> Shares:
        from rlhf_ray.algorithms.trial_keeper import trial_keeper

        gpus = _gpus_of_models(settings, on_gpu=self.on_gpu) + (_gpus_needed(settings) if self.on_gpu else 0)
        offered: dict[Room, Shares] = {}

        def room(cpus: float) -> Room:
            shares = cpu_shares(settings, cpus)
            taken = Room(cpus=shares.total(settings), gpus=gpus)
            offered[taken] = shares
            return taken

        self.lease = TrialLease(trial_keeper, need=room(cpus), reduced=lambda free: room(min(cpus, free.cpus)))
        return offered[self.lease.room]

    @staticmethod
    def _quieten(level: str) -> None:
        for name in ("ray.serve", "ray.data", "ray.train"):
            logging.getLogger(name).setLevel(level)


def _connect(settings: Settings) -> None:
    """Join the cluster that the settings, the environment or Ray's record name, or start one."""
    starts_ray = cluster_to_join(settings.resources.ray_address) is None
    # A busy laptop needs more than Ray's half minute.
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")
    # Says at every local start that tokens protect the cluster: nothing that the user can or need do.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    if starts_ray:
        for name, value in _OWN_CLUSTER_ENV.items():
            os.environ.setdefault(name, value)
    ray.init(
        address=settings.resources.ray_address,
        namespace="rlhf_ray",
        # For a cluster that ends with this run its start-up is lost; `ray start --head` has one.
        include_dashboard=False if starts_ray else None,
        log_to_driver=settings.debugging.log_to_driver,
        logging_level=logging.getLevelName(settings.debugging.log_level),
        configure_logging=True,
    )


def _num_reward_workers(settings: Settings) -> int:
    return settings.rewards.num_workers + sum(model.num_workers for model in reward_models(settings.rewards))


def _gpus_of_models(settings: Settings, *, on_gpu: bool) -> float:
    models = reward_models(settings.rewards)
    return float(sum(model.num_workers * model.gpus_per_worker(on_gpu=on_gpu) for model in models))


def _gpus_needed(settings: Settings) -> int:
    learners = 0 if settings.learners.num_gpus_per_learner == 0 else settings.learners.num_learners
    return settings.rollouts.num_replicas * settings.rollouts.tensor_parallel_size + learners


def _raylets() -> list[psutil.Process]:
    """The raylets that this process started: one is the sign of a cluster of its own."""
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):  # It has ended meanwhile.
            if child.name() == "raylet":
                found.append(child)
    return found


def _below(raylets: list[psutil.Process]) -> list[psutil.Process]:
    """All processes below raylets: Ray's workers, and the engines below them."""
    found: list[psutil.Process] = []
    for raylet in raylets:
        with suppress(psutil.NoSuchProcess):
            found += raylet.children(recursive=True)
    return found


def _end(processes: list[psutil.Process], *, grace_s: float) -> None:
    """Kill what does not end by itself: a worker of Ray 2.60 sometimes hangs in its last destructor, for ever."""
    _, left = psutil.wait_procs(processes, timeout=grace_s)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            _LOG.info("process %d (%s) did not end with its cluster and is killed", process.pid, process.name())
            process.kill()
    psutil.wait_procs(left, timeout=grace_s)
