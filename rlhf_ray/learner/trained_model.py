"""A sharded model with its optimizer and learning-rate schedule: what one PPO step changes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from rlhf_ray.config.settings import TrainingSettings
from rlhf_ray.errors import LearnerError
from rlhf_ray.learner.checkpoint_format import CheckpointFormat
from rlhf_ray.learner.initial_weights import local_part
from rlhf_ray.learner.models import reshard
from rlhf_ray.models.weights import first_nonfinite
from rlhf_ray.weight_sync.buckets import full_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["TrainedModel", "learning_rate_factor"]


def learning_rate_factor(training: TrainingSettings, total_steps: int, step: int) -> float:
    """Learning rate of optimizer step ``step`` (from 0) as a share of the peak.

    Linear warm-up over ``lr_warmup_steps``, then ``constant``, or down to ``min_lr_ratio`` at ``total_steps`` on a
    straight (``linear``) or a half-cosine (``cosine``) line; ``min_lr_ratio`` after that.
    """
    warmup_steps = training.lr_warmup_steps
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if training.lr_schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    shape = 1.0 - progress if training.lr_schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return training.min_lr_ratio + (1.0 - training.min_lr_ratio) * shape


class TrainedModel:
    """One of policy and critic.

    Args:
        model: The sharded model.
        training: The training section.
        lr: Peak learning rate.
        max_grad_norm: Clip of the gradient's norm; ``None``: no clip.
        total_steps: Optimizer steps of the run, for the schedule.

    Attributes:
        checkpoint: The weights as a checkpoint has them.
        steps_taken: Optimizer steps since the run began, restarts included.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        training: TrainingSettings,
        *,
        lr: float,
        max_grad_norm: float | None,
        total_steps: int,
    ) -> None:
        reshard(model)
        self.model = model
        self.checkpoint = CheckpointFormat(model)
        self._max_grad_norm = max_grad_norm
        self._optimizer = torch.optim.AdamW(
            _parameter_groups(model, training.weight_decay),
            lr=lr,
            betas=training.adam_betas,
            eps=training.adam_eps,
            # One call for all tensors: the default on CPUs dispatches every operation on every shard, 10x slower.
            fused=True,
        )
        names = {parameter: name for name, parameter in model.named_parameters()}
        self._trained = {names[p]: p for group in self._optimizer.param_groups for p in group["params"]}
        self._peak_lr = lr
        self._lr_factor = partial(learning_rate_factor, training, total_steps)
        self.steps_taken = 0

    @property
    def lr(self) -> float:
        """Learning rate of the last step taken; before there was one, that of the first."""
        return self._peak_lr * self._lr_factor(max(0, self.steps_taken - 1))

    def grad_norm(self) -> torch.Tensor:
        """Norm of the gradient over all ranks; a collective."""
        gradients = [parameter.grad for parameter in self._trained.values() if parameter.grad is not None]
        return full_tensor(nn.utils.get_total_norm(gradients))

    def step(self, grad_norm: torch.Tensor) -> None:
        """Clip by the gradient's norm, update the weights, clear the gradients."""
        if self._max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(list(self._trained.values()), self._max_grad_norm, grad_norm)
        self.checkpoint.forget()
        for group in self._optimizer.param_groups:
            group["lr"] = self._peak_lr * self._lr_factor(self.steps_taken)
        self._optimizer.step()
        self.steps_taken += 1
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """Clear the gradients and leave the weights as they are."""
        self._optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def nonfinite(self, dtype: torch.dtype | None = None) -> str | None:
        """Name a tensor of this rank's share that is not finite, ``None`` where all are.

        A collective where adapters are merged, for which every rank gathers.

        Args:
            dtype: Look at the weights that are published, as they are in this type; ``None``: at what a checkpoint
                holds, weights and moments.
        """
        tensors = self.checkpoint.merged()
        if dtype is None:
            tensors = itertools.chain(self.model.named_parameters(), self._moments())
        return first_nonfinite(((name, local_part(tensor)) for name, tensor in tensors), dtype)

    def tensors(self) -> Iterator[torch.Tensor]:
        """Weights, frozen ones too, and all of the optimizer's state."""
        yield from self.model.parameters()
        for state in self._optimizer.state.values():
            yield from state.values()

    def state(self) -> dict[str, torch.Tensor]:
        """What :meth:`step` changes by the names of a checkpoint, each with an axis or more.

        They are the model's own tensors, sharded, but for the count of steps.
        """
        named: dict[str, torch.Tensor] = {}
        for name, parameter in self._trained.items():
            moments = self._optimizer.state[parameter]
            if not moments:  # As AdamW begins, in its first step.
                moments["step"] = torch.zeros((), device=parameter.device)
                moments["exp_avg"] = torch.zeros_like(parameter)
                moments["exp_avg_sq"] = torch.zeros_like(parameter)
            named[f"weights.{name}"] = parameter.detach()
            for key, moment in moments.items():
                named[f"moments.{name}.{key}"] = moment if moment.ndim else moment.view(1)
        return named | {"steps": torch.tensor([self.steps_taken])}

    def frozen_state(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What else a checkpoint holds, by its names there: weights and buffers that nothing changes."""
        stored = self.model.state_dict().keys()
        for name, tensor in itertools.chain(self.model.named_parameters(), self.model.named_buffers()):
            if name in stored and name not in self._trained:
                yield f"weights.{name}", tensor.detach()

    def restored(self, steps: int) -> None:
        """Continue after ``steps``, once the tensors of :meth:`state` were filled with what they were then."""
        self.drop_gradients()
        self.checkpoint.forget()
        self.steps_taken = steps

    def _moments(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self.model.named_parameters():
            for key, value in self._optimizer.state.get(parameter, {}).items():
                if value.ndim:
                    yield f"{key} of {name}", value


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; norms and biases do not.

    Raises:
        LearnerError: The model is sharded and a parameter is not: FSDP would never give it a gradient.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    strays = [name for name, p in named.items() if isinstance(model, FSDPModule) and not isinstance(p, DTensor)]
    if strays:
        raise LearnerError(f"{len(strays)} parameters of a sharded model are not sharded, {strays[0]} first")
    trained = list(named.values())
    matrices = [p for p in trained if p.ndim >= 2]
    vectors = [p for p in trained if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
