"""Before the loop: what the numbers and texts of one setting may be, whatever the others are."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

from rlhf_ray.config.checks.value_types import section_types
from rlhf_ray.errors import ConfigError

__all__ = ["RANGES", "Range", "check_not_empty", "check_range"]


@dataclass(frozen=True, slots=True)
class Range:
    """The finite numbers that a setting may be."""

    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, number: float) -> bool:
        above = number > self.low if self.open_low else number >= self.low
        below = number < self.high if self.open_high else number <= self.high
        return math.isfinite(number) and above and below

    def __str__(self) -> str:
        if math.isinf(self.low):
            return "a finite number"
        low = f"greater than {self.low}" if self.open_low else f"of at least {self.low}"
        if math.isinf(self.high):
            return f"a number {low}"
        return f"a number {low} and {'less than' if self.open_high else 'at most'} {self.high}"


# What floating point still counts exactly; larger numbers overflow here and there.
_LARGEST: Final = 2**53
_COUNT: Final = Range(1)
_FROM_ZERO: Final = Range(0)
_POSITIVE: Final = Range(0, open_low=True)
_SHARE: Final = Range(0, 1)
_BELOW_ONE: Final = Range(0, 1, open_high=True)

RANGES: Final[Mapping[str, Range]] = {
    "model.lora_rank": _FROM_ZERO,
    "model.lora_alpha": _POSITIVE,
    "data.batch_size": _COUNT,
    "rollouts.num_replicas": _COUNT,
    "rollouts.group_size": _COUNT,
    "rollouts.max_prompt_tokens": _COUNT,
    "rollouts.max_new_tokens": _COUNT,
    # The engine takes no more than 2, and makes 0.01 of what is smaller.
    "rollouts.temperature": Range(0.01, 2),
    "rollouts.stop_token_ids": _FROM_ZERO,
    "rollouts.max_concurrent_groups": _COUNT,
    "rollouts.max_paused_replicas": _COUNT,
    "rollouts.tensor_parallel_size": _COUNT,
    "rollouts.gpu_memory_utilization": Range(0, 1, open_low=True),
    "rollouts.kv_cache_bytes": _COUNT,
    "rollouts.num_threads": _COUNT,
    "rollouts.timeout_s": _POSITIVE,
    "rollouts.max_staleness": _FROM_ZERO,
    "rollouts.stall_timeout_s": _POSITIVE,
    "rollouts.startup_timeout_s": _POSITIVE,
    "rewards.weights": Range(-math.inf),
    "rewards.num_workers": _COUNT,
    "rewards.timeout_s": _POSITIVE,
    "rewards.max_failures": _FROM_ZERO,
    "rewards.truncated_reward": Range(-math.inf),
    "rewards.bias": Range(-math.inf),
    "rewards.scale": Range(-math.inf),
    "rewards.clip": _POSITIVE,
    "rollouts.max_dropped_groups": _COUNT,
    "training.behavior_cap": Range(1),
    "training.behavior_floor": _SHARE,
    "training.m2po_threshold": _POSITIVE,
    "training.value_huber": _POSITIVE,
    "training.kl_target": _POSITIVE,
    "training.kl_horizon": _COUNT,
    "training.kl_clip": _POSITIVE,
    "training.iterations": _COUNT,
    "training.lr": _POSITIVE,
    "training.critic_lr": _POSITIVE,
    "training.lr_warmup_steps": _FROM_ZERO,
    "training.min_lr_ratio": _SHARE,
    "training.weight_decay": _FROM_ZERO,
    "training.adam_betas": _BELOW_ONE,
    "training.adam_eps": _POSITIVE,
    "training.max_grad_norm": _POSITIVE,
    "training.critic_max_grad_norm": _POSITIVE,
    "training.num_epochs": _COUNT,
    "training.num_minibatches": _COUNT,
    "training.gamma": _SHARE,
    "training.lambda_": _SHARE,
    "training.clip_low": Range(0, 1, open_low=True),
    "training.clip_high": _POSITIVE,
    "training.dual_clip": Range(1, open_low=True),
    "training.value_clip": _POSITIVE,
    "training.entropy_coef": _FROM_ZERO,
    "training.kl_coef": _FROM_ZERO,
    "training.critic_warmup_iterations": _FROM_ZERO,
    "learners.num_learners": _COUNT,
    "learners.sequence_parallel": _COUNT,
    "learners.max_tokens_per_microbatch": _COUNT,
    "learners.num_threads": _COUNT,
    "learners.startup_timeout_s": _POSITIVE,
    "learners.update_timeout_s": _POSITIVE,
    "evaluation.interval": _FROM_ZERO,
    "evaluation.num_prompts": _COUNT,
    "evaluation.samples_per_prompt": _COUNT,
    "evaluation.temperature": Range(0, 2),
    "evaluation.top_p": Range(0, 1, open_low=True),
    "evaluation.max_new_tokens": _COUNT,
    "evaluation.pass_threshold": Range(-math.inf),
    "checkpointing.interval": _FROM_ZERO,
    "checkpointing.keep": _COUNT,
    "checkpointing.keep_best": _COUNT,
    "reporting.completions_interval": _FROM_ZERO,
    "reporting.timeline_interval": _FROM_ZERO,
    "fault_tolerance.max_group_retries": _FROM_ZERO,
    "fault_tolerance.max_learner_restarts": _FROM_ZERO,
    "fault_tolerance.state_interval": _FROM_ZERO,
    # numpy's seeds, the narrowest of those that a run sets.
    "debugging.seed": Range(0, 2**32 - 1),
    "resources.cpus_per_replica": _FROM_ZERO,
    "resources.cpus_per_learner": _FROM_ZERO,
    "resources.cpus_per_reward_worker": _FROM_ZERO,
}
"""Setting -> what it, or each number in it, may be."""


def check_range(field: str, value: Any) -> None:
    """Refuse a number outside the setting's range."""
    allowed = RANGES.get(field)
    if allowed is None or value is None:
        return
    numbers_given = value if isinstance(value, (list, tuple)) else (value,)
    if any(isinstance(number, int) and abs(number) > _LARGEST for number in numbers_given):
        raise ConfigError(field, value, f"give a number of at most {_LARGEST:,}")
    if not all(number in allowed for number in numbers_given):
        raise ConfigError(field, value, f"give {allowed}{_what_none_means(field)}")


def _what_none_means(field: str) -> str:
    section, _, name = field.partition(".")
    meaning = next(item.metadata["meaning"] for item in fields(section_types()[section]) if item.name == name)
    of_none = re.search(r"(?:unset|null): (.+)", meaning)
    return f", or None ({of_none[1]})" if of_none else ""


def check_not_empty(field: str, value: Any) -> None:
    """Refuse an empty text, also in a list."""
    texts = value if isinstance(value, list) else [value]
    if any(text == "" for text in texts if isinstance(text, str)):
        raise ConfigError(field, value, "an empty text means nothing here; write one, or leave the setting out")
