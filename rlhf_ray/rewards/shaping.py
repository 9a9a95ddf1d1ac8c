"""Rewards as the functions gave them -> rewards that the update sees."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from rlhf_ray.config.settings import RewardSettings

if TYPE_CHECKING:
    from rlhf_ray.learner.batch import SequenceBatch

__all__ = ["shaped"]


def shaped(batch: SequenceBatch, settings: RewardSettings, *, mask_truncated: bool) -> SequenceBatch:
    """Return the batch with its rewards replaced, shifted, scaled, clipped and normalized as the settings say.

    In that order: ``truncated_reward``, ``bias``, ``scale``, ``clip``, ``normalize``. The rewards of greedy completions
    go through ``bias``, ``scale`` and ``clip`` too, so that they stay on the same scale. Rewards of whole trajectories
    are shaped, each counted once however many sequences it has: those of turns are scaled where they are, and the last
    sampled token gets the rest.

    Args:
        batch: All of an update's sequences: groups are compared as wholes.
        settings: The rewards section.
        mask_truncated: Whether truncated trajectories are left out of the losses, with all their sequences.
    """
    import torch

    from rlhf_ray.advantages import normalize_rewards, shape_rewards

    rewards, truncated = batch.rewards, batch.truncated[batch.last_sequences]
    if settings.truncated_reward is not None:
        rewards = np.where(truncated, np.float32(settings.truncated_reward), rewards)
    own, greedy = (
        shape_rewards(torch.tensor(values), bias=settings.bias, scale=settings.scale, clip=settings.clip)
        for values in (rewards, batch.greedy_rewards)
    )
    if settings.normalize != "none":
        own = normalize_rewards(
            own,
            torch.tensor(batch.group_ids[batch.last_sequences]),
            level=settings.normalize,
            mean=True,
            std=settings.normalize_std,
            leave_one_out=settings.leave_one_out,
        )
    left_out = np.repeat((mask_truncated & truncated)[batch.of_trajectory], batch.completion_lengths)
    return replace(
        batch.with_rewards(own.numpy(), scale=settings.scale),
        greedy_rewards=greedy.numpy(),
        loss_mask=batch.loss_mask & ~left_out,
    )
