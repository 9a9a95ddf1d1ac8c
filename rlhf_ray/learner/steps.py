"""Which model learns from which minibatch: policy and critic may make passes and optimizer steps of their own."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from rlhf_ray.config.settings import TrainingSettings
from rlhf_ray.learner.packing import Minibatch, RankPlan

__all__ = ["Step", "steps_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What is done with a minibatch in one pass."""

    minibatch: Minibatch
    policy: bool
    """Whether the policy makes an optimizer step."""
    critic: bool
    """Whether the critic learns from it."""
    critic_steps: bool
    """Whether the critic makes an optimizer step, from this minibatch and those before it that had none."""
    critic_lengths: tuple[int, ...]
    """Tokens in the losses, of every trajectory of the critic's step."""


def steps_of(plan: RankPlan, training: TrainingSettings, *, policy: bool, critic: bool) -> Iterator[Step]:
    """All passes of an update: those that both models make, then those of the one that makes more.

    Args:
        plan: Minibatches, and their order in each pass.
        training: How many passes and steps each model makes.
        policy: Whether the policy is trained.
        critic: Whether there is one.
    """
    count = len(plan.minibatches)
    share = count // (training.critic_num_minibatches or count)
    for epoch, order in enumerate(plan.epochs):
        of_policy = policy and epoch < training.num_epochs
        of_critic = critic and epoch < (training.critic_epochs or training.num_epochs)
        for place, index in enumerate(order if of_policy or of_critic else ()):
            together = order[place - place % share :][:share]
            lengths = itertools.chain.from_iterable(plan.minibatches[i].completion_lengths for i in together)
            yield Step(
                minibatch=plan.minibatches[index],
                policy=of_policy,
                critic=of_critic,
                critic_steps=of_critic and place % share == share - 1,
                critic_lengths=tuple(lengths),
            )
