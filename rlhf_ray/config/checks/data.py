"""Combinations that cannot work in ``data``, ``rewards``, ``evaluation`` and ``checkpointing``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_ray.config.held_out_sets import SET_SETTINGS, held_out_sets
from rlhf_ray.config.settings import Settings
from rlhf_ray.config.values import typed_value
from rlhf_ray.errors import ConfigError

__all__ = ["COMBINATIONS"]


def data_problems(settings: Settings) -> Iterator[tuple[str, str]]:
    """Prompts come from paths, hub ids or a dataset, and there is a model for data of the user's."""
    data = settings.data
    _check_source("data.path", data.path)
    for held_out in held_out_sets(data):
        _check_source(held_out.field, held_out.data.path)
        for name in SET_SETTINGS:
            try:
                typed_value(f"data.{name}", getattr(held_out.data, name))
            except ConfigError as error:
                field = held_out.field + error.field.removeprefix("data")
                raise ConfigError(field, error.value, error.remedy) from None
    if data.prompt_template is not None and "{prompt}" not in data.prompt_template:
        yield "data.prompt_template", "write {prompt} where the prompt goes"
    if data.path is not None and settings.model.path is None:
        from rlhf_ray.quickstart import model_path

        # The embedded model adds numbers and has read nothing else.
        yield (
            "model.path",
            "data is named and no model to train on it; name a folder or a hub id. To try the loop without a language "
            f"model, give the quickstart's, which reads any text byte by byte: {model_path()}",
        )


def _check_source(field: str, source: Any) -> None:
    paths = source if isinstance(source, list) and source else [source]
    is_dataset = hasattr(source, "iter_batches") and hasattr(source, "schema")
    if source is not None and not is_dataset and not all(isinstance(path, str) for path in paths):
        remedy = "give a file or folder, a list of files, a hub id, or a ray.data.Dataset"
        raise ConfigError(field, source, remedy)


def reward_problems(settings: Settings) -> Iterator[tuple[str, str]]:
    """Every reward that is named exists and has one weight, and rewards are normalized over more than one."""
    from rlhf_ray.rewards.registry import build_reward, built_in_names

    rewards = settings.rewards
    has_own_data = settings.data.path is not None or settings.data.eval_path is not None
    environment = settings.environment
    gives_rewards = environment.is_used and not environment.tools
    named = [spec.get("name") if isinstance(spec, Mapping) else spec for spec in rewards.functions]
    if "environment" in named and not gives_rewards:
        remedy = "tools give no rewards" if environment.tools else "there is no environment: .environment(...)"
        yield "rewards.functions", f"{remedy}; name another reward"
    if environment.tools and not rewards.functions:
        yield "rewards.functions", "tools give no rewards; name a function that scores what the policy writes"
    if has_own_data and not rewards.functions and not gives_rewards:
        yield (
            "rewards.functions",
            "the quickstart task's checker cannot score other data; pass a function, .rewards(my_reward), or name a "
            f"built-in: {', '.join(built_in_names())}",
        )
    for index, spec in enumerate(rewards.functions):
        name = spec.get("name") if isinstance(spec, Mapping) else spec
        if isinstance(name, str) and ":" not in name and name not in built_in_names():
            # Raises, and names the nearest. Known names, modules and files are resolved when the run starts: some
            # take seconds to import.
            build_reward(name, {}, field=f"rewards.functions[{index}]", value=spec)
    num_functions = len(rewards.functions) or 1
    if rewards.weights is not None and len(rewards.weights) != num_functions:
        yield "rewards.weights", f"give one weight per reward function: {num_functions}"
    if rewards.weights is not None and not any(rewards.weights):
        yield "rewards.weights", "give at least one weight that is not 0; else all rewards are 0"
    if rewards.leave_one_out and rewards.normalize == "none":
        yield "rewards.leave_one_out", "set rewards.normalize to group or batch, whose mean it is"
    if rewards.normalize == "group" and settings.rollouts.group_size < 2:
        yield (
            "rollouts.group_size",
            "rewards.normalize = group compares the completions of a prompt; use at least 2",
        )


def evaluation_problems(settings: Settings) -> Iterator[tuple[str, str]]:
    """A resume finds its folder, the best checkpoint is among those measured, and evaluation has a held-out set."""
    evaluation, checkpointing = settings.evaluation, settings.checkpointing
    names = [held_out.name for held_out in held_out_sets(settings.data)]
    if checkpointing.resume != "never" and settings.reporting.run_dir is None:
        yield "checkpointing.resume", "name the run's folder: reporting.run_dir"
    best = checkpointing.best_metric
    if best is not None and best.startswith("evaluation/"):
        if evaluation.interval == 0:
            yield "checkpointing.best_metric", "set evaluation.interval, or it is never measured"
        elif checkpointing.interval % evaluation.interval:
            yield (
                "checkpointing.interval",
                f"with evaluation.interval = {evaluation.interval} checkpoints are made that nothing measures; make "
                "checkpointing.interval a multiple of it",
            )
        if names and not any(best.startswith(f"evaluation/{name}/") for name in names):
            yield "checkpointing.best_metric", f"there is no such held-out set; use {' or '.join(names)}"
    for name, off in (("interval", 0), ("at_start", False), ("at_end", False)):
        if not names and getattr(evaluation, name) != off:
            yield f"evaluation.{name}", f"set data.eval_path to the held-out set, or {name} to {off}"
    if 0 < evaluation.temperature < 0.01:
        yield "evaluation.temperature", "the engine makes 0.01 of it; use 0 for greedy decoding, or 0.01 and more"
    if evaluation.temperature == 0 and evaluation.samples_per_prompt > 1:
        yield (
            "evaluation.samples_per_prompt",
            "greedy completions of a prompt are all the same; set evaluation.temperature, such as 0.6, or use 1",
        )
    if evaluation.temperature == 0 and evaluation.top_p != 1.0:
        yield (
            "evaluation.top_p",
            "greedy decoding takes the likeliest token whatever top_p is; set evaluation.temperature, or use 1.0",
        )


COMBINATIONS = (data_problems, reward_problems, evaluation_problems)
