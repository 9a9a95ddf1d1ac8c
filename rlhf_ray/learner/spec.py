"""What a learner rank needs to build its models; made once on the driver."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from rlhf_ray.config.plugins import Plugin
from rlhf_ray.config.settings import LearnerSettings, ModelSettings, RolloutSettings, TrainingSettings
from rlhf_ray.learner.lora import LoraSpec
from rlhf_ray.types import Device

__all__ = ["LearnerSpec"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerSpec:
    """How ranks build their models and train them."""

    training: TrainingSettings
    model: ModelSettings
    rollouts: RolloutSettings
    """``temperature`` is that of the distribution that log-probabilities are of."""
    learners: LearnerSettings
    compute: Device
    advantage: Plugin
    loss: Plugin
    policy_path: str
    critic_path: str | None
    """``None``: the advantage asks for no values, and there is no critic."""
    reference_path: str | None
    """``None``: the reference, if there is one, is the policy as the run begins with it."""
    lora: LoraSpec | None
    """Adapters of the policy; ``None``: all its weights are trained."""
    critic_steps: int
    """Optimizer steps of the critic in the run."""
    policy_steps: int
    """Optimizer steps of the policy: none in the critic's warm-up."""
    timeline: bool
    """Whether ranks report what they do when."""
    keeps_state: bool
    """Whether ranks keep copies of their state outside of their processes, and not for checkpoints alone."""
    weight_transfer: str = "nccl"
    """How ranks send weights to replicas themselves: ``nccl`` or ``ipc``."""

    @property
    def on_gpu(self) -> bool:
        """Whether ranks compute on GPUs."""
        return self.compute.learners_on_gpu

    @property
    def colocated(self) -> bool:
        """Whether a replica shares this rank's device, and takes turns with it."""
        return self.compute.colocated

    @property
    def sequence_parallel(self) -> int:
        """Ranks that read the same sequences, a slice of each."""
        return self.learners.sequence_parallel

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return torch.device("cuda", torch.cuda.current_device()) if self.on_gpu else torch.device("cpu")

    @property
    def compute_dtype(self) -> torch.dtype:
        """The type that models compute in, engines too: weights are published in it."""
        dtype: torch.dtype = getattr(torch, self.compute.dtype)
        return dtype

    def threads(self, num_ranks: int) -> int | None:
        """CPU threads of a rank whose CPU computes: models or optimizers are there; ``None``: PyTorch's own default.

        That default is one, by Ray. Unset, a rank takes its share of the machine's cores, or of half of them where
        engines on CPUs sample at the same time.

        Args:
            num_ranks: Ranks on this machine, where ``LOCAL_WORLD_SIZE`` does not tell.
        """
        asked = self.learners.num_threads
        if asked is not None or (self.on_gpu and not self.learners.offload_optimizer):
            return asked
        cores = len(os.sched_getaffinity(0))
        if self.rollouts.max_staleness > 0 and not self.on_gpu:
            cores //= 2
        return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks)))
