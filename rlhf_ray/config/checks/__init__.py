"""Before the loop: what makes settings wrong, found before anything starts.

::

    value_types.py      the type of one setting (``typed_value``, at once when it is set)
    ranges.py           what its numbers and texts may be (``RANGES``)
    the others          combinations of settings that cannot work, by the sections they are in

Each raises a :class:`~rlhf_ray.errors.ConfigError` with field, value and remedy. Nothing here imports an engine, and
nothing is repaired.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

from rlhf_ray.config.checks import (
    data_and_rewards,
    devices_and_folders,
    evaluation_and_checkpoints,
    rollouts,
    training_and_losses,
)
from rlhf_ray.config.checks.devices_and_folders import check_attention_device
from rlhf_ray.config.checks.ranges import RANGES, check_not_empty, check_range
from rlhf_ray.config.checks.training_and_losses import check_advantage, check_loss
from rlhf_ray.config.checks.value_types import check_resolved, section_types, setting_types, typed_value
from rlhf_ray.config.settings import Settings

__all__ = [
    "RANGES",
    "check_advantage",
    "check_attention_device",
    "check_loss",
    "section_types",
    "setting_types",
    "typed_value",
    "validate",
]


def validate(settings: Settings) -> None:
    """Check every setting and every combination that can be known to fail without starting an engine.

    Raises:
        ConfigError: The first thing wrong.
    """
    for field, value in _each(settings):
        check_resolved(field, value)
        typed_value(field, value)
        check_range(field, value)
        check_not_empty(field, value)
    for check in _COMBINATIONS:
        check(settings)


def _each(settings: Settings) -> Iterator[tuple[str, Any]]:
    for section in section_types():
        values = getattr(settings, section)
        yield from ((f"{section}.{name}", getattr(values, name)) for name in setting_types(section))


_COMBINATIONS: Final[tuple[Callable[[Settings], None], ...]] = (
    data_and_rewards.check_data_source,
    data_and_rewards.check_csv_types,
    data_and_rewards.check_prompt_template,
    data_and_rewards.check_model_for_data,
    data_and_rewards.check_rewards_given,
    data_and_rewards.check_reward_names,
    data_and_rewards.check_reward_weights,
    evaluation_and_checkpoints.check_checkpointing,
    evaluation_and_checkpoints.check_evaluation_data,
    evaluation_and_checkpoints.check_evaluation_sampling,
    rollouts.check_trainable_sampling,
    rollouts.check_off_policy,
    rollouts.check_engine_args,
    training_and_losses.check_minibatches,
    training_and_losses.check_microbatch_fits,
    training_and_losses.check_plugins,
    training_and_losses.check_kl_target,
    training_and_losses.check_kl_clip,
    data_and_rewards.check_reward_shaping,
    rollouts.check_dynamic_sampling,
    training_and_losses.check_critic_warmup,
    training_and_losses.check_lr_warmup,
    devices_and_folders.check_attention,
    devices_and_folders.check_lora,
    devices_and_folders.check_learner_gpus,
    devices_and_folders.check_sequence_parallel,
    devices_and_folders.check_tensor_parallel,
    devices_and_folders.check_weight_transfer,
    devices_and_folders.check_colocation,
    devices_and_folders.check_model_folders,
)
