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
    training, learners = settings.training, settings.learners
    advantage = advantage_plugin(training.advantage, training.advantage_args)
    values: dict[str, Any] = {
        "training": training,
        "advantage": advantage,
        "loss": loss_plugin(training.loss, training.loss_args),
        "policy_path": path,
        "critic_path": path if advantage.needs_critic else None,
        "lora": None,
        "attn_implementation": settings.model.attn_implementation,
        "trust_remote_code": False,
        "gradient_checkpointing": learners.gradient_checkpointing,
        "compile_backend": None,
        "offload_reference": learners.offload_reference,
        "offload_optimizer": learners.offload_optimizer,
        "dtype": "float32",
        "wire_dtype": "float32",
        "temperature": 1.0,
        "max_new_tokens": settings.rollouts.max_new_tokens,
        "max_staleness": 0,
        "total_steps": 1000,
        "policy_steps": 1000,
        "on_gpu": False,
        "timeline": False,
        "keeps_state": False,
        "num_threads": None,
    }
    return LearnerSpec(**values | changes)
