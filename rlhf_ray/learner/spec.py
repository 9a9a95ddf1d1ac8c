"""What a learner rank needs to build its models; made once on the driver."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from rlhf_ray.config.plugins import Plugin
from rlhf_ray.config.settings import TrainingSettings
from rlhf_ray.learner.lora import LoraSpec

__all__ = ["LearnerSpec"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerSpec:
    """How ranks build their models and train them."""

    training: TrainingSettings
    advantage: Plugin
    loss: Plugin
    policy_path: str
    critic_path: str | None
    """``None``: the advantage asks for no values, and there is no critic."""
    lora: LoraSpec | None
    """Adapters of the policy; ``None``: all its weights are trained."""
    attn_implementation: str
    trust_remote_code: bool
    gradient_checkpointing: bool
    compile_backend: str | None
    """Of ``torch.compile``; ``None``: models run as they are."""
    offload_reference: bool
    """Keep the reference in CPU memory."""
    offload_optimizer: bool
    """Keep all of policy and critic in CPU memory, and step there."""
    dtype: str
    """Compute type: ``float32`` or ``bfloat16``."""
    wire_dtype: str
    """Type of published weights: the engines' own."""
    temperature: float
    """Sampling temperature: log-probabilities are those of the distribution sampled from."""
    max_new_tokens: int
    max_staleness: int
    """Versions that data may lag behind the policy."""
    total_steps: int
    """Optimizer steps of the run."""
    policy_steps: int
    """Those of them that update the policy: all but the critic's warm-up."""
    on_gpu: bool
    timeline: bool
    """Whether ranks report what they do when."""
    keeps_state: bool
    """Whether ranks keep copies of their state outside of their processes, and not for checkpoints alone."""
    num_threads: int | None
    """CPU threads of a rank; ``None``: its share of the machine's cores."""
    weight_transfer: str = "nccl"
    """How ranks send weights to replicas themselves: ``nccl`` or ``ipc``."""
    quantized_sampler: bool = False
    """Whether engines compute more coarsely than learners, and so sample from another policy."""
    sequence_parallel: int = 1
    """Ranks that read the same sequences, a slice of each."""
    colocated: bool = False
    """Whether a replica shares this rank's device, and takes turns with it."""

    @property
    def off_policy(self) -> bool:
        """Whether the sampler may be another policy than the trained one, so that the loss corrects for it."""
        return self.max_staleness > 0 or self.quantized_sampler

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return torch.device("cuda", torch.cuda.current_device()) if self.on_gpu else torch.device("cpu")

    @property
    def compute_dtype(self) -> torch.dtype:
        """The type that models compute in."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def published_dtype(self) -> torch.dtype:
        """The type of published weights."""
        dtype: torch.dtype = getattr(torch, self.wire_dtype)
        return dtype

    def threads(self, num_ranks: int) -> int | None:
        """CPU threads of a rank whose CPU computes: models or optimizers are there; ``None``: PyTorch's own default.

        That default is one, by Ray. Unset, a rank takes its share of the machine's cores, or of half of them where
        engines on CPUs sample at the same time.

        Args:
            num_ranks: Ranks on this machine, where ``LOCAL_WORLD_SIZE`` does not tell.
        """
        if self.num_threads is not None or (self.on_gpu and not self.offload_optimizer):
            return self.num_threads
        cores = len(os.sched_getaffinity(0))
        if self.max_staleness > 0 and not self.on_gpu:
            cores //= 2
        return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks)))
