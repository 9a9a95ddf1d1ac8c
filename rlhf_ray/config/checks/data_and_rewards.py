"""Before the loop: settings that cannot go together in ``data`` and ``rewards``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_ray.config.checks.value_types import typed_value
from rlhf_ray.config.settings import Settings
from rlhf_ray.errors import ConfigError
from rlhf_ray.evaluation.held_out_sets import SET_SETTINGS, held_out_sets

__all__ = [
    "check_csv_types",
    "check_data_source",
    "check_model_for_data",
    "check_prompt_template",
    "check_reward_names",
    "check_reward_shaping",
    "check_reward_weights",
    "check_rewards_given",
]


def check_data_source(settings: Settings) -> None:
    """Training and held-out prompts come from paths, hub ids or a dataset."""
    _check_source("data.path", settings.data.path)
    for held_out in held_out_sets(settings.data):
        _check_source(held_out.field, held_out.data.path)
        for name in SET_SETTINGS:
            value = getattr(held_out.data, name)
            try:
                typed_value(f"data.{name}", value)
            except ConfigError as error:
                raise ConfigError(f"{held_out.field}.{name}", value, error.remedy) from None


def _check_source(field: str, source: Any) -> None:
    paths = source if isinstance(source, list) and source else [source]
    is_dataset = hasattr(source, "iter_batches") and hasattr(source, "schema")
    if source is not None and not is_dataset and not all(isinstance(path, str) for path in paths):
        remedy = "give a file or folder, a list of files, a hub id, or a ray.data.Dataset"
        raise ConfigError(field, source, remedy)


def check_csv_types(settings: Settings) -> None:
    """Columns of CSV files are made what can be made of a text."""
    sections = {"data": settings.data, **{each.field: each.data for each in held_out_sets(settings.data)}}
    for section, data in sections.items():
        for column, given in data.csv_types.items():
            from rlhf_ray.prompts.formats import CSV_TYPES  # prompts/ imports NumPy: not unless it is needed.

            if not isinstance(given, str) or given not in CSV_TYPES:
                remedy = f"a column is made one of {', '.join(CSV_TYPES)}; the others are text"
                raise ConfigError(f"{section}.csv_types.{column}", given, remedy)


def check_prompt_template(settings: Settings) -> None:
    """A template without the prompt would ask the same of every row."""
    template = settings.data.prompt_template
    if template is not None and "{prompt}" not in template:
        raise ConfigError("data.prompt_template", template, "write {prompt} where the prompt goes")


def check_rewards_given(settings: Settings) -> None:
    """Data of the user's needs a reward of its own."""
    own_data = settings.data.path is not None or settings.data.eval_path is not None
    if not own_data or settings.rewards.functions:
        return
    from rlhf_ray.rewards.registry import built_in_names

    remedy = (
        "the quickstart task's checker cannot score other data; pass a function, .rewards(my_reward), or name a "
        f"built-in: {', '.join(built_in_names())}"
    )
    raise ConfigError("rewards.functions", settings.rewards.functions, remedy)


def check_model_for_data(settings: Settings) -> None:
    """Data of the user's needs a model: the embedded one adds numbers and has read nothing else."""
    if settings.data.path is None or settings.model.path is not None:
        return
    from rlhf_ray.quickstart import model_path

    remedy = (
        "data is named and no model to train on it; name a folder or a hub id. To try the loop without a language "
        f"model, give the quickstart's, which reads any text byte by byte: {model_path()}"
    )
    raise ConfigError("model.path", None, remedy)


def check_reward_names(settings: Settings) -> None:
    """Every reward named is there."""
    from rlhf_ray.rewards.registry import build_reward, built_in_names

    for index, spec in enumerate(settings.rewards.functions):
        name = spec.get("name") if isinstance(spec, Mapping) else spec
        if isinstance(name, str) and ":" not in name and name not in built_in_names():
            # Raises, and names the nearest. Known names, modules and files are resolved when the run starts: some
            # take seconds to import.
            build_reward(name, {}, field=f"rewards.functions[{index}]", value=spec)


def check_reward_weights(settings: Settings) -> None:
    """There is one weight a reward, and not all are 0."""
    weights = settings.rewards.weights
    if weights is None:
        return
    num_functions = len(settings.rewards.functions) or 1
    if len(weights) != num_functions:
        raise ConfigError("rewards.weights", weights, f"give one weight a reward function: {num_functions}")
    if not any(weights):
        raise ConfigError("rewards.weights", weights, "give at least one weight that is not 0; else all rewards are 0")


def check_reward_shaping(settings: Settings) -> None:
    """Rewards are normalized over more than one."""
    rewards = settings.rewards
    if rewards.leave_one_out and rewards.normalize == "none":
        raise ConfigError("rewards.leave_one_out", True, "set rewards.normalize to group or batch, whose mean it is")
    if rewards.normalize == "group" and settings.rollouts.group_size < 2:
        remedy = "rewards.normalize = group compares the completions of a prompt; use at least 2"
        raise ConfigError("rollouts.group_size", settings.rollouts.group_size, remedy)
