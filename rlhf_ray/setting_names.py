"""Before the loop: the names of sections and settings, and what a name that is none of them was meant to be."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, Final

from rlhf_ray.errors import ConfigError
from rlhf_ray.validation import section_types, setting_types

__all__ = ["SYNONYMS", "setting_names", "unknown_section", "unknown_setting"]

_OTHER_NAMES: Final[Mapping[str, tuple[str, ...]]] = {
    "training.lr": ("actor_lr", "learning_rate", "policy_lr"),
    "training.critic_lr": ("critic_learning_rate", "value_lr", "vf_lr"),
    "training.lr_schedule": ("lr_scheduler_type",),
    "training.lr_warmup_steps": ("num_warmup_steps", "warmup_steps"),
    "training.adam_betas": ("betas",),
    "training.max_grad_norm": ("grad_clip",),
    "training.iterations": ("max_steps", "num_iterations"),
    "training.num_epochs": ("num_ppo_epochs", "num_sgd_iter", "ppo_epochs"),
    "training.num_minibatches": ("mini_batch_size", "minibatch_size", "num_mini_batches"),
    "training.gamma": ("discount",),
    "training.lambda_": ("gae_lambda", "lam", "lambda"),
    "training.clip_low": ("clip_eps", "clip_param", "clip_range", "clip_ratio", "cliprange", "epsilon"),
    "training.clip_high": ("epsilon_high",),
    "training.value_clip": ("cliprange_value", "vf_clip_param"),
    "training.entropy_coef": ("ent_coef", "entropy_coeff"),
    "training.kl_coef": ("beta", "init_kl_coef", "kl_coeff"),
    "training.loss_aggregation": ("loss_type",),
    "data.path": ("dataset", "dataset_name"),
    "data.eval_path": ("eval_dataset",),
    "data.prompt_column": ("prompt_key",),
    "data.batch_size": ("rollout_batch_size", "train_batch_size", "train_batch_size_per_learner"),
    "rollouts.group_size": ("n_samples_per_prompt", "num_generations"),
    "rollouts.max_new_tokens": ("max_completion_length", "max_tokens", "response_length"),
    "rollouts.max_prompt_tokens": ("max_prompt_length",),
    "rollouts.num_replicas": ("num_engines", "num_env_runners"),
    "rollouts.engine_args": ("vllm_args",),
    "rewards.functions": ("reward_funcs",),
    "rewards.weights": ("reward_weights",),
    "learners.max_tokens_per_microbatch": ("micro_batch_size",),
    "learners.num_gpus_per_learner": ("num_gpus_per_worker",),
    "model.path": ("model_name_or_path",),
    "model.dtype": ("torch_dtype",),
    "evaluation.interval": ("eval_steps",),
    "evaluation.at_start": ("eval_on_start", "val_before_train"),
    "evaluation.samples_per_prompt": ("eval_n_samples_per_prompt", "n_samples_per_eval_prompt"),
    "checkpointing.interval": ("save_steps",),
    "checkpointing.keep": ("save_total_limit",),
    "reporting.run_dir": ("output_dir",),
}
"""Setting -> what other libraries call it."""

SYNONYMS: Final = {other: field for field, others in _OTHER_NAMES.items() for other in others}
"""What other libraries call a setting -> the setting."""


def setting_names() -> dict[str, tuple[str, ...]]:
    """Every section's name and those of its settings, in order."""
    return {section: tuple(setting_types(section)) for section in section_types()}


def unknown_section(key: str, section: str, name: str, value: Any) -> ConfigError:
    """What to raise for a ``key`` whose section does not exist."""
    near = get_close_matches(section, section_types(), n=1)
    if near:
        return ConfigError(key, value, f"no such section; did you mean {near[0]}{'.' if name else ''}{name}?")
    named = [] if name else _settings_called(section)
    if named:
        return ConfigError(key, value, f"no such section; did you mean {' or '.join(named)}?")
    return ConfigError(key, value, f"no such section; there are {', '.join(section_types())}")


def unknown_setting(section: str, name: str, value: Any) -> ConfigError:
    """What to raise for a setting that its section does not have."""
    near = _nearest_settings(section, name)
    names = ", ".join(setting_types(section))
    hint = f"did you mean {' or '.join(near)}?" if near else f"{section} has {names}"
    return ConfigError(f"{section}.{name}", value, f"no such setting; {hint}")


def _nearest_settings(section: str, name: str) -> list[str]:
    synonym = SYNONYMS.get(name, "")
    if synonym.startswith(f"{section}."):
        return [synonym]
    # A slip of the pen in the right section goes before another section's setting of a remote name.
    close = get_close_matches(name, setting_types(section), n=1, cutoff=0.8)
    if close:
        return [f"{section}.{close[0]}"]
    if called := _settings_called(name):
        return called
    near = get_close_matches(name, setting_types(section), n=1)
    if near:
        return [f"{section}.{near[0]}"]
    everywhere = {candidate: owner for owner, candidates in setting_names().items() for candidate in candidates}
    return [f"{everywhere[match]}.{match}" for match in get_close_matches(name, everywhere, n=1, cutoff=0.75)]


def _settings_called(name: str) -> list[str]:
    """Return the settings of any section with this very name, or the one it is a synonym of."""
    same = [f"{section}.{name}" for section, names in setting_names().items() if name in names]
    return same or ([SYNONYMS[name]] if name in SYNONYMS else [])
