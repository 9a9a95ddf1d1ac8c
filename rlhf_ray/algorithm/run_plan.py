"""What a run takes of a Ray cluster and gives to replicas and learners: computed once, before anything is started.

``start.py`` starts what the plan says; ``rlhf-ray config --plan`` and ``rlhf-ray doctor`` print it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import ray

from rlhf_ray.algorithm.inputs import Inputs
from rlhf_ray.config.checks import check_attention_device
from rlhf_ray.config.plugins import Plugin
from rlhf_ray.config.schedule import Schedule
from rlhf_ray.config.settings import Settings
from rlhf_ray.errors import ConfigError
from rlhf_ray.learner.learner import LearnerSpec
from rlhf_ray.learner.lora import LoraSpec
from rlhf_ray.pickling import serialize
from rlhf_ray.rewards.functions import reward_models
from rlhf_ray.rollouts.engine import EngineSpec
from rlhf_ray.rollouts.engine_spec import engine_spec, vllm_build, weight_transfer
from rlhf_ray.types import Device

__all__ = [
    "Cluster",
    "Placement",
    "RunPlan",
    "Shares",
    "arguments_text",
    "check_device",
    "check_nodes",
    "choose_device",
    "cpu_shares",
    "learner_spec",
]

# Left free on a small machine: Ray Data's readers and others that ask for a little.
_SPARE_CPUS = 0.2
_SMALLEST_SHARE = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """What a Ray cluster offers."""

    cpus: float
    gpus: float
    nodes: tuple[Mapping[str, float], ...]
    """Resources of each living node."""

    @classmethod
    def joined(cls) -> Self:
        """The one that this process is connected to."""
        resources = ray.cluster_resources()
        nodes = tuple(node["Resources"] for node in ray.nodes() if node["Alive"])
        return cls(cpus=resources.get("CPU", 0.0), gpus=resources.get("GPU", 0.0), nodes=nodes)

    @classmethod
    def of_machine(cls) -> Self:
        """The one that Ray would start on this machine."""
        import torch

        node = {"CPU": float(len(os.sched_getaffinity(0))), "GPU": float(torch.cuda.device_count())}
        return cls(cpus=node["CPU"], gpus=node["GPU"], nodes=(node,))


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """CPUs reserved per replica, learner and reward worker."""

    replica: float
    learner: float
    reward_worker: float
    environment_worker: float | None = None
    """``None``: there is no environment."""

    def __str__(self) -> str:
        shares = f"{self.replica:g} per replica, {self.learner:g} per learner, {self.reward_worker:g} per reward worker"
        of_environment = self.environment_worker
        return shares if of_environment is None else f"{shares}, {of_environment:g} per environment worker"


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """What a run takes of a cluster."""

    device: Device
    shares: Shares
    cpus: float
    """All CPUs that replicas, learners, reward and environment workers reserve."""
    gpus: float
    """All GPUs, those of reward models included."""

    @classmethod
    def of(cls, settings: Settings, cluster: Cluster) -> Self:
        """Place a run.

        Raises:
            ConfigError: It does not fit the cluster, or the installed vLLM does not run on what is there.
        """
        device = choose_device(settings, cluster.gpus)
        check_device(settings, device, cluster.gpus)
        shares = cpu_shares(settings, cluster.cpus)
        check_nodes(settings, shares, cluster.nodes, on_gpu=device.on_gpu)
        return cls(
            device=device,
            shares=shares,
            cpus=shares.replica * settings.rollouts.num_replicas
            + shares.learner * settings.learners.num_learners
            + shares.reward_worker * _num_reward_workers(settings)
            + (shares.environment_worker or 0.0) * settings.environment.num_workers,
            gpus=_gpus_of_models(settings, on_gpu=device.on_gpu)
            + (_gpus_needed(settings, colocated=device.colocated) if device.on_gpu else 0),
        )

    def __str__(self) -> str:
        return f"CPUs reserved: {self.shares}; the run uses {self.device}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """All that follows from settings, models and cluster."""

    placement: Placement
    engine: EngineSpec
    learner: LearnerSpec

    @classmethod
    def of(cls, settings: Settings, inputs: Inputs, placement: Placement) -> Self:
        """Plan a run.

        Raises:
            ConfigError: Learners cannot compute the attention on their device, or vLLM cannot run the model there.
        """
        learner = learner_spec(settings, inputs, placement.device)
        engine = engine_spec(
            settings,
            placement.device,
            model_path=inputs.policy_path,
            tokenizer_path=inputs.tokenizer_path,
            config=inputs.model_config,
            eos_token_ids=inputs.eos_token_ids,
            prompt_tokens=inputs.max_prompt_tokens,
        )
        return cls(placement=placement, engine=engine, learner=learner)

    def rows(self) -> list[tuple[str, str]]:
        """The plan as lines of a label and a value, for printing."""
        placement, learner = self.placement, self.learner
        return [
            ("device", str(placement.device)),
            ("compute type", placement.device.dtype),
            ("CPUs reserved", str(placement.shares)),
            ("resources of the run", f"{placement.cpus:g} CPUs, {placement.gpus:g} GPUs"),
            ("shared GPUs", "replicas and learners take turns" if placement.device.colocated else "none"),
            ("weight transfer", self.engine.weight_transfer),
            ("critic", learner.critic_path or "none"),
            *([("reference", learner.reference_path)] if learner.reference_path is not None else []),
            *((f"vLLM {name}", str(value)) for name, value in sorted(self.engine.engine_args.items())),
        ]


def arguments_text(spec: EngineSpec) -> str:
    """What a replica's engine is given, in one line."""
    return ", ".join(f"{name}={value}" for name, value in sorted(spec.engine_args.items()))


def choose_device(settings: Settings, gpus: float) -> Device:
    """On what a run computes, in a cluster that offers ``gpus``; :func:`check_device` says whether it can."""
    on_gpu, reason = _replicas_device(settings, gpus)
    dtype = settings.model.dtype
    return Device(
        on_gpu=on_gpu,
        learners_on_gpu=on_gpu and settings.learners.num_gpus_per_learner != 0,
        colocated=_colocated(settings, gpus, on_gpu=on_gpu),
        dtype=("bfloat16" if on_gpu else "float32") if dtype == "auto" else dtype,
        reason=reason,
    )


def _replicas_device(settings: Settings, gpus: float) -> tuple[bool, str]:
    device = settings.resources.device
    if device != "auto":
        return device == "cuda", f"resources.device is {device}"
    if gpus == 0:
        return False, "Ray offers no GPUs"
    if vllm_build() == "cpu":
        return False, f"the installed vLLM is its CPU build, so the {gpus:g} GPUs that Ray offers are not used"
    return True, f"Ray offers {gpus:g} GPUs"


def _colocated(settings: Settings, gpus: float, *, on_gpu: bool) -> bool:
    """``auto``: where the GPUs do not suffice for both, and nothing else prevents it."""
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


def check_device(settings: Settings, device: Device, gpus: float) -> None:
    """Refuse a device that the cluster or the installed vLLM does not offer.

    Raises:
        ConfigError: The run asks for more than ``gpus``, or the installed vLLM does not run on CPUs.
    """
    if not device.on_gpu and vllm_build() == "cuda":
        raise ConfigError(
            "resources.device",
            settings.resources.device,
            f"replicas would run on CPUs ({device.reason}), which the installed vLLM, a CUDA build, cannot; install "
            "rlhf-ray[cpu], or let Ray have GPUs",
        )
    if device.on_gpu and gpus == 0:
        raise ConfigError(
            "resources.device",
            settings.resources.device,
            "the cluster has no GPUs; use auto or cpu, or set resources.ray_address to a cluster that has some",
        )
    if settings.learners.num_gpus_per_learner and not device.on_gpu:
        raise ConfigError(
            "learners.num_gpus_per_learner",
            settings.learners.num_gpus_per_learner,
            "the cluster has no GPUs; leave it out, or set resources.ray_address to a cluster that has some",
        )
    needed = _gpus_needed(settings, colocated=device.colocated) if device.on_gpu else 0
    if needed > gpus:
        shared, remedy = "", "lower rollouts.num_replicas or learners.num_learners"
        if device.colocated:
            shared, remedy = " that share them", f"{remedy}, or set resources.device = cpu"
        else:
            remedy += (
                ", let each replica share its GPU with a learner (resources.colocate = auto or true, which needs "
                "rollouts.max_staleness = 0 and as many learners as replicas), or set "
                "learners.num_gpus_per_learner = 0 or resources.device = cpu"
            )
        raise ConfigError(
            "resources.device",
            settings.resources.device,
            f"{settings.rollouts.num_replicas} replicas of {settings.rollouts.tensor_parallel_size} GPUs and "
            f"{settings.learners.num_learners} learners{shared} need {needed} GPUs, the cluster has {gpus:g}; {remedy}",
        )
    of_models, free = _gpus_of_models(settings, on_gpu=device.on_gpu), gpus - needed
    if of_models > free:
        raise ConfigError(
            "rewards.functions",
            [model.path for model in reward_models(settings.rewards)],
            f"the reward models need {of_models:g} GPUs, and replicas and learners leave {free:g} of the cluster's "
            f"{gpus:g}; lower num_gpus (0: on CPUs) or num_workers of the reward models",
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
    if settings.environment.is_used:
        asked.append((resources.cpus_per_environment_worker, settings.environment.num_workers))
    fixed = sum(cpus * count for cpus, count in asked if cpus is not None)
    open_actors = sum(count for cpus, count in asked if cpus is None)
    left = cluster_cpus - _SPARE_CPUS - fixed
    if fixed > cluster_cpus or (open_actors and left < open_actors * _SMALLEST_SHARE):
        raise ConfigError(
            "resources.cpus_per_replica / cpus_per_learner / cpus_per_reward_worker / cpus_per_environment_worker",
            fixed,
            f"replicas, learners and workers need more than the cluster's {cluster_cpus:g} CPUs; lower them",
        )
    # Ray counts fractions in ten-thousandths, and only below one.
    share = 1.0 if not open_actors or left >= open_actors else math.floor(left / open_actors * 100) / 100
    replica, learner, reward_worker, *others = (share if cpus is None else cpus for cpus, _ in asked)
    environment_worker = others[0] if others else None
    return Shares(replica=replica, learner=learner, reward_worker=reward_worker, environment_worker=environment_worker)


def check_nodes(settings: Settings, shares: Shares, nodes: Sequence[Mapping[str, float]], *, on_gpu: bool) -> None:
    """Refuse what the cluster has in all and its nodes do not: an actor is on one node, and so are a replica's GPUs.

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
    if (of_environment := shares.environment_worker) is not None:
        workers = settings.environment.num_workers
        asked.append(("resources.cpus_per_environment_worker", of_environment, workers, of_environment, 0))
    for model in reward_models(settings.rewards):
        gpus = model.gpus_per_worker(on_gpu=on_gpu)
        asked.append(("rewards.functions", model.path, model.num_workers, worker_cpus, gpus))
    for field, value, count, cpus, gpus in asked:
        needs = [(name, amount) for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount > 0]
        # Sums of fractions are a little off.
        held = (min(int(node.get(name, 0.0) / amount + 1e-6) for name, amount in needs) for node in nodes if needs)
        if needs and (at_once := sum(held)) < count:
            sizes = ", ".join(f"{node.get('CPU', 0.0):g} CPUs and {node.get('GPU', 0.0):g} GPUs" for node in nodes)
            each = " and ".join(f"{amount:g} {name}s" for name, amount in needs)
            raise ConfigError(
                field,
                value,
                f"{count} actors need {each} each, on one node, and the nodes ({sizes}) hold {at_once} such at once; "
                "lower it, or their number",
            )


def learner_spec(settings: Settings, inputs: Inputs, device: Device) -> LearnerSpec:
    """What the learners need of the settings.

    Raises:
        ConfigError: The attention has no kernel on their device, or weights cannot be sent as asked for.
    """
    model, rollouts, schedule = settings.model, settings.rollouts, Schedule(settings)
    check_attention_device(model.attn_implementation, on_gpu=device.learners_on_gpu, dtype=device.dtype)
    lora = LoraSpec(
        rank=model.lora_rank, alpha=model.lora_alpha, targets=tuple(model.lora_targets), seed=settings.debugging.seed
    )
    return LearnerSpec(
        training=settings.training,
        model=model,
        rollouts=rollouts,
        learners=settings.learners,
        compute=device,
        advantage=_portable(inputs.advantage),
        loss=_portable(inputs.loss),
        policy_path=inputs.policy_path,
        critic_path=inputs.critic_path,
        reference_path=inputs.reference_path,
        lora=lora if model.lora_rank > 0 else None,
        critic_steps=schedule.critic_optimizer_steps,
        policy_steps=schedule.policy_optimizer_steps,
        timeline=settings.reporting.timeline_interval > 0,
        keeps_state=settings.fault_tolerance.keeps_state,
        weight_transfer=weight_transfer(rollouts.weight_transfer, device),
    )


def _portable(plugin: Plugin) -> Plugin:
    """The plug-in with a function of the user's pickled, code of a lone file or a notebook included."""
    if not callable(plugin.function):
        return plugin
    return replace(plugin, function=serialize(plugin.function, defined_by=plugin.function))


def _num_reward_workers(settings: Settings) -> int:
    return settings.rewards.num_workers + sum(model.num_workers for model in reward_models(settings.rewards))


def _gpus_of_models(settings: Settings, *, on_gpu: bool) -> float:
    models = reward_models(settings.rewards)
    return float(sum(model.num_workers * model.gpus_per_worker(on_gpu=on_gpu) for model in models))


def _gpus_needed(settings: Settings, *, colocated: bool) -> int:
    own = settings.learners.num_gpus_per_learner != 0 and not colocated
    learners = settings.learners.num_learners if own else 0
    return settings.rollouts.num_replicas * settings.rollouts.tensor_parallel_size + learners
