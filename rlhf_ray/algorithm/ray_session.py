"""The Ray cluster under a run: joins or starts one, derives shares of it, and shuts down only what it started."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from rlhf_ray.algorithm.ray_connection import RayConnection
from rlhf_ray.config.settings import Settings
from rlhf_ray.errors import ConfigError
from rlhf_ray.rewards.functions import reward_models
from rlhf_ray.rollouts.engine_spec import vllm_build
from rlhf_ray.stopping import stop_all
from rlhf_ray.tune.queue import Resources
from rlhf_ray.tune.reservation import Reservation
from rlhf_ray.tune.trial import Trial

__all__ = [
    "RaySession",
    "Shares",
    "check_nodes",
    "choose_device",
    "cpu_shares",
    "node_resources",
    "resolve_colocation",
    "resolve_device",
]

_LOG = logging.getLogger(__name__)

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


def choose_device(settings: Settings, gpus: float) -> tuple[bool, str]:
    """Whether replicas run on GPUs, in a cluster that offers ``gpus``, and why."""
    device = settings.resources.device
    if device != "auto":
        return device == "cuda", f"resources.device is {device}"
    if gpus == 0:
        return False, "Ray offers no GPUs"
    if vllm_build() == "cpu":
        return False, f"the installed vLLM is its CPU build, so the {gpus:g} GPUs that Ray offers are not used"
    return True, f"Ray offers {gpus:g} GPUs"


def resolve_colocation(settings: Settings, gpus: float, *, on_gpu: bool) -> bool:
    """Whether each replica shares its GPU with a learner and takes turns with it, in a cluster that has ``gpus``.

    ``auto``: where the GPUs do not suffice for both, and nothing else is in the way.
    """
    asked, rollouts, learners = settings.resources.colocate, settings.rollouts, settings.learners
    if asked != "auto":
        return asked
    can = (
        rollouts.max_staleness == 0
        and rollouts.tensor_parallel_size == 1
        and rollouts.num_replicas == learners.num_learners
        and rollouts.weight_transfer != "nccl"
        and learners.num_gpus_per_learner != 0
    )
    of_models = _gpus_of_models(settings, on_gpu=on_gpu)
    return on_gpu and can and gpus < _gpus_needed(settings, colocated=False) + of_models


def resolve_device(settings: Settings, gpus: float) -> bool:
    """Whether replicas run on GPUs, in a cluster that offers ``gpus``.

    Raises:
        ConfigError: The run asks for more than that, or the installed vLLM does not run on CPUs.
    """
    on_gpu, reason = choose_device(settings, gpus)
    if not on_gpu and vllm_build() == "cuda":
        raise ConfigError(
            "resources.device",
            settings.resources.device,
            f"replicas would run on CPUs ({reason}), which the installed vLLM, a CUDA build, cannot; install "
            "rlhf-ray[cpu], or let Ray have GPUs",
        )
    if settings.learners.num_gpus_per_learner and not on_gpu:
        raise ConfigError(
            "learners.num_gpus_per_learner",
            settings.learners.num_gpus_per_learner,
            "the cluster has no GPUs; leave it out, or set resources.ray_address to a cluster that has some",
        )
    colocated = resolve_colocation(settings, gpus, on_gpu=on_gpu)
    needed = _gpus_needed(settings, colocated=colocated)
    if on_gpu and needed > gpus:
        remedy = "lower rollouts.num_replicas or learners.num_learners"
        if not colocated:
            remedy += (
                ", let each replica share its GPU with a learner (resources.colocate = auto or true, which needs "
                "rollouts.max_staleness = 0 and as many learners as replicas)"
            )
        raise ConfigError(
            "resources.device",
            settings.resources.device,
            f"{settings.rollouts.num_replicas} replicas of {settings.rollouts.tensor_parallel_size} GPUs and "
            f"{settings.learners.num_learners} learners need {needed} GPUs, the cluster has {gpus:g}; {remedy}, or set "
            "learners.num_gpus_per_learner = 0 or resources.device = cpu",
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


def node_resources() -> list[dict[str, float]]:
    """What each living node of the cluster has."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def check_nodes(settings: Settings, shares: Shares, nodes: Sequence[Mapping[str, float]], *, on_gpu: bool) -> None:
    """Refuse what the cluster has in all and its nodes do not: an actor is on one node, and so are a replica's GPUs.

    Args:
        settings: The run's settings.
        shares: CPUs reserved.
        nodes: From :func:`node_resources`.
        on_gpu: Whether replicas run on GPUs.

    Raises:
        ConfigError: Ray would wait for such nodes until the time is over.
    """
    rollouts, learners, worker_cpus = settings.rollouts, settings.learners, shares.reward_worker
    replica_gpus = rollouts.tensor_parallel_size if on_gpu else 0
    learner_gpus = int(on_gpu and learners.num_gpus_per_learner != 0)
    asked: list[tuple[str, Any, int, float, float]] = [
        ("rollouts.tensor_parallel_size", rollouts.tensor_parallel_size, rollouts.num_replicas, 0, replica_gpus),
        ("resources.cpus_per_replica", shares.replica, rollouts.num_replicas, shares.replica, replica_gpus),
        ("resources.cpus_per_learner", shares.learner, learners.num_learners, shares.learner, learner_gpus),
        ("resources.cpus_per_reward_worker", worker_cpus, settings.rewards.num_workers, worker_cpus, 0),
    ]
    for model in reward_models(settings.rewards):
        gpus = model.gpus_per_worker(on_gpu=on_gpu)
        asked.append(("rewards.functions", model.path, model.num_workers, worker_cpus, gpus))
    for field, value, count, cpus, gpus in asked:
        needs = [(name, amount) for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount > 0]
        # Sums of fractions are a little off.
        rooms = (min(int(node.get(name, 0.0) / amount + 1e-6) for name, amount in needs) for node in nodes if needs)
        if needs and (at_once := sum(rooms)) < count:
            sizes = ", ".join(f"{node.get('CPU', 0.0):g} CPUs and {node.get('GPU', 0.0):g} GPUs" for node in nodes)
            each = " and ".join(f"{amount:g} {name}s" for name, amount in needs)
            raise ConfigError(
                field,
                value,
                f"{count} actors need {each} each, on one node, and the nodes ({sizes}) hold {at_once} such at once; "
                "lower it, or their number",
            )


# Of all sessions in this process.
_CONNECTION = RayConnection()


class RaySession:
    """A connection to Ray.

    Args:
        settings: The run's settings: address, device and noise.
        trial: The Ray Tune trial that this is; waits until the cluster has resources for it; ``None``: no trial.

    Raises:
        ConfigError: The run does not fit the cluster.
    """

    def __init__(self, settings: Settings, trial: Trial | None = None) -> None:
        _CONNECTION.join(
            self,
            settings.resources.ray_address,
            namespace="rlhf_ray",
            log_to_driver=settings.debugging.log_to_driver,
            logging_level=logging.getLevelName(settings.debugging.log_level),
            configure_logging=True,
        )
        self.ends_ray = _CONNECTION.ends_ray
        """Whether the whole cluster ends with the last session of this process: one of them started it."""
        self.reservation: Reservation | None = None
        self._quieten(settings.debugging.log_level)
        try:
            gpus = ray.cluster_resources().get("GPU", 0.0)
            self.on_gpu = resolve_device(settings, gpus)
            """Whether replicas run on GPUs."""
            unexpected = gpus > 0 and not self.on_gpu and settings.resources.device == "auto"
            device, reason = "GPUs" if self.on_gpu else "CPUs", choose_device(settings, gpus)[1]
            _LOG.log(logging.WARNING if unexpected else logging.INFO, "the run uses %s: %s", device, reason)
            self.learners_on_gpu = self.on_gpu and settings.learners.num_gpus_per_learner != 0
            """Whether learners run on GPUs."""
            self.colocated = resolve_colocation(settings, gpus, on_gpu=self.on_gpu)
            """Whether each replica takes turns with a learner."""
            cpus = ray.cluster_resources().get("CPU", 0.0)
            self.shares = cpu_shares(settings, cpus) if trial is None else self._reserved(settings, cpus - trial.cpus)
            check_nodes(settings, self.shares, node_resources(), on_gpu=self.on_gpu)
        except BaseException:
            self.stop()  # Or the next session here would take this cluster for the user's.
            raise

    def stop(self) -> None:
        """Leave the cluster; one that was started here ends with the last session."""
        reservation, self.reservation = self.reservation, None
        steps: list[tuple[str, Callable[[], object]]] = [("Ray", lambda: _CONNECTION.leave(self))]
        if reservation is not None:
            steps.insert(0, ("the trial's place on the cluster", reservation.end))
        stop_all(*steps)

    def _reserved(self, settings: Settings, cpus: float) -> Shares:
        from rlhf_ray.tune.supervisor import trial_supervisor

        gpus = _gpus_of_models(settings, on_gpu=self.on_gpu)
        gpus += _gpus_needed(settings, colocated=self.colocated) if self.on_gpu else 0
        offered: dict[Resources, Shares] = {}

        def taken(cpus: float) -> Resources:
            shares = cpu_shares(settings, cpus)
            resources = Resources(cpus=shares.total(settings), gpus=gpus, in_pairs=self.colocated and self.on_gpu)
            offered[resources] = shares
            return resources

        self.reservation = Reservation(
            trial_supervisor, need=taken(cpus), reduced=lambda free: taken(min(cpus, free.cpus))
        )
        return offered[self.reservation.resources]

    @staticmethod
    def _quieten(level: str) -> None:
        for name in ("ray.serve", "ray.data", "ray.train"):
            logging.getLogger(name).setLevel(level)


def _num_reward_workers(settings: Settings) -> int:
    return settings.rewards.num_workers + sum(model.num_workers for model in reward_models(settings.rewards))


def _gpus_of_models(settings: Settings, *, on_gpu: bool) -> float:
    models = reward_models(settings.rewards)
    return float(sum(model.num_workers * model.gpus_per_worker(on_gpu=on_gpu) for model in models))


def _gpus_needed(settings: Settings, *, colocated: bool) -> int:
    own = settings.learners.num_gpus_per_learner != 0 and not colocated
    learners = settings.learners.num_learners if own else 0
    return settings.rollouts.num_replicas * settings.rollouts.tensor_parallel_size + learners
