"""Learner ranks without Ray Train, for benchmarks of the learner alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rlhf_ray import AlgorithmConfig
from rlhf_ray.config.plugins import advantage_plugin, loss_plugin
from rlhf_ray.learner.learner import LearnerSpec
from rlhf_ray.types import Device


@contextmanager
def one_rank(*, on_gpu: bool = False) -> Iterator[None]:
    """A process group of this process alone, as Ray Train would set it up."""
    with rank_of(1, 0, on_gpu=on_gpu, store=dist.HashStore()):
        yield


@contextmanager
def rank_of(world_size: int, rank: int, *, on_gpu: bool, store: dist.Store | Path) -> Iterator[None]:
    """This process as one of several ranks, each on the GPU of its number.

    Args:
        world_size: How many there are.
        rank: This one's number.
        on_gpu: Whether they compute on GPUs.
        store: Where they meet; a path is that of a file, which the first of them makes.
    """
    if on_gpu:
        torch.cuda.set_device(rank)
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    store = dist.FileStore(str(store), world_size) if isinstance(store, Path) else store
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def learner_spec(config: AlgorithmConfig, path: str, **changes: Any) -> LearnerSpec:
    """What a rank of ``config`` would be started with, its policy and critic read from ``path``; float32 on the CPU."""
    settings = config.settings
    training = settings.training
    advantage = advantage_plugin(training.advantage, training.advantage_args)
    values: dict[str, Any] = {
        "training": training,
        "advantage": advantage,
        "loss": loss_plugin(training.loss, training.loss_args),
        "policy_path": path,
        "critic_path": path if advantage.needs_critic else None,
        "reference_path": None,
        "lora": None,
        "model": settings.model,
        "rollouts": settings.rollouts,
        "learners": settings.learners,
        "compute": Device(on_gpu=False, learners_on_gpu=False, colocated=False, dtype="float32"),
        "critic_steps": 1000,
        "policy_steps": 1000,
        "timeline": False,
        "keeps_state": False,
    }
    return LearnerSpec(**values | changes)
