"""Before the loop: what makes settings wrong, found before anything starts.

Three layers, each a :class:`~rlhf_ray.errors.ConfigError` with field, value and remedy: the type of one setting
(:func:`typed_value`, at once when it is set), its range (``RANGES``), and impossible combinations (the ``_check_*``
functions). Nothing here imports an engine, and nothing is repaired.
"""

from __future__ import annotations

import math
import numbers
import os
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Literal, Union, get_args, get_origin, get_type_hints

from rlhf_ray.errors import ConfigError
from rlhf_ray.evaluation.held_out_sets import SET_SETTINGS, held_out_sets
from rlhf_ray.plugins import Plugin, advantage_plugin, loss_plugin
from rlhf_ray.schedule import Schedule
from rlhf_ray.settings import Settings

__all__ = [
    "RANGES",
    "Range",
    "check_advantage",
    "check_loss",
    "is_search_space",
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
        _check_resolved(field, value)
        typed_value(field, value)
        _check_range(field, value)
        _check_not_empty(field, value)
    for check in _COMBINATIONS:
        check(settings)


# --- types ----------------------------------------------------------------------------------------------------------


class _WrongTypeError(Exception):
    """A value does not fit an annotation; becomes a ConfigError where the field is known."""


_NUMBER_TEXT = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?")
# YAML reads these as text, which would pass for a hub id or a folder.
_NONE_WORDS = ("None", "none")
_TYPE_NAMES: Final[Mapping[Any, str]] = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a string",
    types.NoneType: "None",
}
_YAML_NAMES: Final[Mapping[Any, str]] = {
    bool: "true or false",
    str: "a string (in quotes if YAML reads it otherwise)",
    types.NoneType: "null",
    Any: "a value or null",
}


@cache
def section_types() -> Mapping[str, type]:
    """Return every section's name and its dataclass, in order."""
    return types.MappingProxyType(get_type_hints(Settings))


@cache
def setting_types(section: str) -> Mapping[str, Any]:
    """Return the names and the annotations of one section, in order."""
    return types.MappingProxyType(get_type_hints(section_types()[section]))


def typed_value(field: str, value: Any, *, from_text: bool = False) -> Any:
    """Return a value as its setting holds it: containers copied, paths as strings, numpy scalars as Python's.

    Args:
        field: Dotted name of an existing setting.
        value: What was given. A Ray Tune search space passes; ``validate`` refuses it.
        from_text: Whether it was read from YAML, where a quoted number may stand for a float.

    Raises:
        ConfigError: The value has the wrong type.
    """
    section, _, name = field.partition(".")
    annotation = setting_types(section)[name]
    if is_search_space(value):
        return value
    try:
        return _convert(annotation, value, from_text)
    except _WrongTypeError:
        raise ConfigError(field, value, f"give {_describe(annotation, from_text)}") from None


def is_search_space(value: Any) -> bool:
    """Whether a value is Ray Tune's: a domain such as ``tune.loguniform(...)``, or a grid search."""
    if isinstance(value, Mapping):
        return set(value) == {"grid_search"}
    # A domain can only exist where its module was imported.
    samples = sys.modules.get("ray.tune.search.sample")
    return samples is not None and isinstance(value, samples.Domain)


def _convert(annotation: Any, value: Any, from_text: bool) -> Any:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return _convert_union(args, value, from_text)
    if origin is Literal:
        # YAML 1.1 reads a bare `off` as false.
        word = "off" if from_text and value is False else value
        return _require(isinstance(word, str) and word in args, word)
    if origin is list:
        items = _require(isinstance(value, (list, tuple)), value)
        return [_convert(args[0], item, from_text) for item in items]
    if origin is tuple:
        items = _require(isinstance(value, (list, tuple)) and len(value) == len(args), value)
        return tuple(_convert(arg, item, from_text) for arg, item in zip(args, items, strict=True))
    if origin in (dict, Mapping):
        return _convert_any(_require(isinstance(value, Mapping) and all(isinstance(key, str) for key in value), value))
    if origin is Callable:
        return _require(callable(value), value)
    return _convert_scalar(annotation, value, from_text)


def _convert_union(members: tuple[Any, ...], value: Any, from_text: bool) -> Any:
    if value is None and types.NoneType in members:
        return None
    if from_text and types.NoneType in members and value in _NONE_WORDS:
        raise _WrongTypeError
    for member in members:
        with suppress(_WrongTypeError):
            return _convert(member, value, from_text)
    raise _WrongTypeError


def _convert_scalar(annotation: Any, value: Any, from_text: bool) -> Any:
    if annotation is bool:
        return _require(isinstance(value, bool), value)
    if annotation is int:
        return int(_require(isinstance(value, numbers.Integral) and not isinstance(value, bool), value))
    if annotation is float:
        is_text = from_text and isinstance(value, str) and _NUMBER_TEXT.fullmatch(value)
        return float(_require(is_text or (isinstance(value, numbers.Real) and not isinstance(value, bool)), value))
    if annotation is str:
        return str(_require(isinstance(value, (str, os.PathLike)), value))
    return _convert_any(_require(annotation is Any and not (from_text and value in _NONE_WORDS), value))


def _convert_any(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_convert_any(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _convert_any(item) for key, item in value.items()}
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _require(fits: object, value: Any) -> Any:
    if not fits:
        raise _WrongTypeError
    return value


def _describe(annotation: Any, from_text: bool) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(member, from_text) for member in args)
    if origin is Literal:
        return "one of " + ", ".join(repr(choice) for choice in args)
    if origin is list:
        return f"a list, each item {_describe(args[0], from_text)}"
    if origin is tuple:
        return f"{len(args)} items, each {_describe(args[0], from_text)}"
    if origin in (dict, Mapping):
        return "a mapping with string keys"
    if origin is Callable:
        return "'module:function'" if from_text else "a function"
    return {**_TYPE_NAMES, **(_YAML_NAMES if from_text else {})}[annotation]


# --- ranges ---------------------------------------------------------------------------------------------------------


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
    # numpy's seeds, the narrowest of those that a run sets.
    "debugging.seed": Range(0, 2**32 - 1),
    "resources.cpus_per_replica": _FROM_ZERO,
    "resources.cpus_per_learner": _FROM_ZERO,
    "resources.cpus_per_reward_worker": _FROM_ZERO,
}
"""Setting -> what it, or each number in it, may be."""


def _each(settings: Settings) -> Iterator[tuple[str, Any]]:
    for section in section_types():
        values = getattr(settings, section)
        yield from ((f"{section}.{name}", getattr(values, name)) for name in setting_types(section))


def _check_resolved(field: str, value: Any) -> None:
    if is_search_space(value):
        raise ConfigError(field, value, "a search space needs Ray Tune: tune.Tuner(..., param_space=config)")


def _check_range(field: str, value: Any) -> None:
    allowed = RANGES.get(field)
    if allowed is None or value is None:
        return
    numbers_given = value if isinstance(value, (list, tuple)) else (value,)
    if not all(number in allowed for number in numbers_given):
        raise ConfigError(field, value, f"give {allowed}{_what_none_means(field)}")


def _what_none_means(field: str) -> str:
    section, _, name = field.partition(".")
    meaning = next(item.metadata["meaning"] for item in fields(section_types()[section]) if item.name == name)
    none_means = meaning.partition("none: ")[2]
    return f", or None ({none_means})" if none_means else ""


def _check_not_empty(field: str, value: Any) -> None:
    texts = value if isinstance(value, list) else [value]
    if any(text == "" for text in texts if isinstance(text, str)):
        raise ConfigError(field, value, "an empty text means nothing here; write one, or leave the setting out")


# --- combinations: prompts and rewards ------------------------------------------------------------------------------


def _check_data_source(settings: Settings) -> None:
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


def _check_prompt_template(settings: Settings) -> None:
    template = settings.data.prompt_template
    if template is not None and "{prompt}" not in template:
        raise ConfigError("data.prompt_template", template, "write {prompt} where the prompt goes")


def _check_rewards_given(settings: Settings) -> None:
    own_data = settings.data.path is not None or settings.data.eval_path is not None
    if not own_data or settings.rewards.functions:
        return
    from rlhf_ray.rewards.registry import built_in_names

    remedy = (
        "the quickstart task's checker cannot score other data; pass a function, .rewards(my_reward), or name a "
        f"built-in: {', '.join(built_in_names())}"
    )
    raise ConfigError("rewards.functions", settings.rewards.functions, remedy)


def _check_reward_names(settings: Settings) -> None:
    from rlhf_ray.rewards.registry import build_reward, built_in_names

    for index, spec in enumerate(settings.rewards.functions):
        name = spec.get("name") if isinstance(spec, Mapping) else spec
        if isinstance(name, str) and ":" not in name and name not in built_in_names():
            # Raises, and names the nearest. Known names, modules and files are resolved when the run starts: some
            # take seconds to import.
            build_reward(name, {}, field=f"rewards.functions[{index}]", value=spec)


def _check_reward_weights(settings: Settings) -> None:
    weights = settings.rewards.weights
    if weights is None:
        return
    num_functions = len(settings.rewards.functions) or 1
    if len(weights) != num_functions:
        raise ConfigError("rewards.weights", weights, f"give one weight a reward function: {num_functions}")
    if not any(weights):
        raise ConfigError("rewards.weights", weights, "give at least one weight that is not 0; else all rewards are 0")


def _check_checkpointing(settings: Settings) -> None:
    checkpointing = settings.checkpointing
    if checkpointing.resume != "never" and settings.reporting.run_dir is None:
        raise ConfigError("checkpointing.resume", checkpointing.resume, "name the run's folder: reporting.run_dir")
    best = checkpointing.best_metric
    if best is None or not best.startswith("evaluation/"):
        return
    if settings.evaluation.interval == 0:
        raise ConfigError("checkpointing.best_metric", best, "set evaluation.interval, or it is never measured")
    if checkpointing.interval % settings.evaluation.interval:
        remedy = (
            f"with evaluation.interval = {settings.evaluation.interval} checkpoints are made that nothing measures; "
            "make checkpointing.interval a multiple of it"
        )
        raise ConfigError("checkpointing.interval", checkpointing.interval, remedy)
    names = [held_out.name for held_out in held_out_sets(settings.data)]
    if names and not any(best.startswith(f"evaluation/{name}/") for name in names):
        raise ConfigError("checkpointing.best_metric", best, f"there is no such held-out set; use {' or '.join(names)}")


def _check_evaluation_data(settings: Settings) -> None:
    if held_out_sets(settings.data):
        return
    for name, off in (("interval", 0), ("at_start", False), ("at_end", False)):
        value = getattr(settings.evaluation, name)
        if value != off:
            remedy = f"set data.eval_path to the held-out set, or {name} to {off}"
            raise ConfigError(f"evaluation.{name}", value, remedy)


def _check_evaluation_sampling(settings: Settings) -> None:
    evaluation = settings.evaluation
    if 0 < evaluation.temperature < 0.01:
        remedy = "the engine makes 0.01 of it; use 0 for greedy decoding, or 0.01 and more"
        raise ConfigError("evaluation.temperature", evaluation.temperature, remedy)
    if evaluation.temperature > 0:
        return
    if evaluation.samples_per_prompt > 1:
        remedy = "greedy completions of a prompt are all the same; set evaluation.temperature, such as 0.6, or use 1"
        raise ConfigError("evaluation.samples_per_prompt", evaluation.samples_per_prompt, remedy)
    if evaluation.top_p != 1.0:
        remedy = "greedy decoding takes the likeliest token whatever top_p is; set evaluation.temperature, or use 1.0"
        raise ConfigError("evaluation.top_p", evaluation.top_p, remedy)


# --- combinations: rollouts -----------------------------------------------------------------------------------------

_FIXED_ENGINE_ARGS: Final[Mapping[str, str]] = {
    "model": "set model.path",
    "tokenizer": "set model.tokenizer_path",
    "dtype": "set model.dtype",
    "trust_remote_code": "set model.trust_remote_code",
    "tensor_parallel_size": "set rollouts.tensor_parallel_size",
    "data_parallel_size": "set rollouts.num_replicas",
    "gpu_memory_utilization": "set rollouts.gpu_memory_utilization",
    "kv_cache_memory_bytes": "set rollouts.kv_cache_bytes",
    "enforce_eager": "set rollouts.enforce_eager",
    "max_model_len": "set rollouts.max_prompt_tokens and rollouts.max_new_tokens, which it follows from",
    "seed": "set debugging.seed, which the seed of every completion follows from",
    "weight_transfer_config": "set rollouts.weight_transfer",
    "worker_extension_cls": "leave it out; the weight transfer needs it",
    "logprobs_mode": "leave it out; the learner needs the log-probabilities of the distribution sampled from",
    "skip_tokenizer_init": "leave it out; prompts and completions are token ids already",
}


def _check_trainable_sampling(settings: Settings) -> None:
    why = "the learner recomputes log-probabilities over the full distribution"
    if settings.rollouts.top_p != 1.0:
        raise ConfigError("rollouts.top_p", settings.rollouts.top_p, f"training needs 1.0: {why}")
    if settings.rollouts.top_k != 0:
        raise ConfigError("rollouts.top_k", settings.rollouts.top_k, f"training needs 0: {why}")


def _check_off_policy(settings: Settings) -> None:
    training = settings.training
    if settings.rollouts.partial_rollouts and settings.rollouts.max_staleness == 0:
        remedy = "with rollouts.max_staleness=0 nothing that is carried over may be trained on; set it to 1 or more"
        raise ConfigError("rollouts.partial_rollouts", True, remedy)
    if training.proximal == "loglinear" and training.kl_coef > 0 and training.kl_in == "reward":
        remedy = "a KL in the reward needs the forward pass that this saves; use recompute, or kl_in='loss'"
        raise ConfigError("training.proximal", training.proximal, remedy)
    if training.m2po_threshold is not None and training.proximal == "loglinear":
        remedy = "m2po_threshold needs the forward pass that this saves; use recompute"
        raise ConfigError("training.proximal", training.proximal, remedy)
    if training.m2po_threshold is not None and settings.rollouts.max_staleness == 0:
        remedy = "it masks stale data, and with rollouts.max_staleness=0 there is none; leave it out"
        raise ConfigError("training.m2po_threshold", training.m2po_threshold, remedy)


def _check_engine_args(settings: Settings) -> None:
    for name, value in settings.rollouts.engine_args.items():
        if name in _FIXED_ENGINE_ARGS:
            raise ConfigError(f"rollouts.engine_args.{name}", value, _FIXED_ENGINE_ARGS[name])


# --- combinations: the learner --------------------------------------------------------------------------------------


def _check_minibatches(settings: Settings) -> None:
    completions = Schedule.of(settings).completions
    if settings.training.num_minibatches > completions:
        remedy = f"use at most {completions}, the completions an iteration (data.batch_size x rollouts.group_size)"
        raise ConfigError("training.num_minibatches", settings.training.num_minibatches, remedy)


def _check_microbatch_fits(settings: Settings) -> None:
    longest = (settings.rollouts.max_prompt_tokens or 1) + settings.rollouts.max_new_tokens
    budget = settings.learners.max_tokens_per_microbatch
    if budget < longest:
        remedy = f"a sequence would not fit; use at least {longest} (the longest prompt and the longest completion)"
        raise ConfigError("learners.max_tokens_per_microbatch", budget, remedy)


def _check_plugins(settings: Settings) -> None:
    training = settings.training
    # Functions in files and modules are resolved when the run starts: some take seconds to import.
    if ":" not in training.loss:
        check_loss(loss_plugin(training.loss, training.loss_args), settings)
    if ":" not in training.advantage:
        check_advantage(advantage_plugin(training.advantage, training.advantage_args), settings)


def check_loss(plugin: Plugin, settings: Settings) -> None:
    """Refuse settings that the loss would ignore.

    Raises:
        ConfigError: A dual clip is given to a loss that has none, or data may be stale and the loss cannot correct it.
    """
    training, staleness = settings.training, settings.rollouts.max_staleness
    if staleness > 0 and training.behavior_weights != "none" and "behavior_weights" not in plugin.asks_for:
        remedy = (
            f"the loss {plugin.name} has no parameter behavior_weights, so it would not correct stale data; add it, or "
            "use rollouts.max_staleness=0, or say training.behavior_weights='none'"
        )
        raise ConfigError("rollouts.max_staleness", staleness, remedy)
    dual_clip = settings.training.dual_clip
    if dual_clip is not None and "dual_clip" not in plugin.asks_for:
        raise ConfigError("training.dual_clip", dual_clip, f"the loss {plugin.name} has no dual clip; leave it out")


def check_advantage(plugin: Plugin, settings: Settings) -> None:
    """Refuse settings that the advantage cannot work with.

    Raises:
        ConfigError: It compares completions and there is one a prompt; rewards become what it cannot take; or a
            setting of the critic is given to a run that has none.
    """
    training, size = settings.training, settings.rollouts.group_size
    normalise = settings.rewards.normalise
    if normalise != "none" and plugin.needs_greedy_rewards:
        remedy = f"{plugin.name} compares with the reward of a greedy completion, which is not normalised; use none"
        raise ConfigError("rewards.normalise", normalise, remedy)
    if plugin.name == "maxrl" and normalise != "none":
        remedy = "maxrl takes rewards of 0 or more, which normalised ones are not; use none"
        raise ConfigError("rewards.normalise", normalise, remedy)
    if plugin.name == "maxrl" and training.kl_coef > 0 and training.kl_in == "reward":
        remedy = "maxrl takes rewards of 0 or more, which a KL taken off them may break; use loss"
        raise ConfigError("training.kl_in", training.kl_in, remedy)
    if plugin.compares_groups and size < 2:
        remedy = f"{plugin.name} compares the completions of a prompt; use at least 2"
        raise ConfigError("rollouts.group_size", size, remedy)
    if plugin.needs_critic:
        return
    if settings.model.critic_path is not None:
        remedy = f"{plugin.name} has no critic; leave it out, or set training.advantage to gae"
        raise ConfigError("model.critic_path", settings.model.critic_path, remedy)
    if training.critic_warmup_iterations:
        remedy = f"{plugin.name} has no critic to warm up; use 0"
        raise ConfigError("training.critic_warmup_iterations", training.critic_warmup_iterations, remedy)


def _check_kl_target(settings: Settings) -> None:
    training = settings.training
    if training.kl_target is None:
        return
    if training.kl_coef == 0:
        raise ConfigError("training.kl_target", training.kl_target, "give training.kl_coef, where the adapting starts")
    completions = Schedule.of(settings).completions
    if completions >= 5 * training.kl_horizon:
        remedy = f"use more than {completions // 5}, a fifth of the completions an iteration"
        raise ConfigError("training.kl_horizon", training.kl_horizon, remedy)


def _check_reward_shaping(settings: Settings) -> None:
    rewards = settings.rewards
    if rewards.leave_one_out and rewards.normalise == "none":
        raise ConfigError("rewards.leave_one_out", True, "set rewards.normalise to group or batch, whose mean it is")
    if rewards.normalise == "group" and settings.rollouts.group_size < 2:
        remedy = "rewards.normalise = group compares the completions of a prompt; use at least 2"
        raise ConfigError("rollouts.group_size", settings.rollouts.group_size, remedy)


def _check_dynamic_sampling(settings: Settings) -> None:
    if settings.rollouts.dynamic_sampling and settings.rollouts.group_size < 2:
        remedy = "rollouts.dynamic_sampling compares the rewards of a group, and one is always equal; use at least 2"
        raise ConfigError("rollouts.group_size", settings.rollouts.group_size, remedy)


def _check_critic_warmup(settings: Settings) -> None:
    warmup, iterations = settings.training.critic_warmup_iterations, settings.training.iterations
    if warmup >= iterations:
        remedy = f"the policy would never be updated; use less than training.iterations ({iterations})"
        raise ConfigError("training.critic_warmup_iterations", warmup, remedy)


def _check_lr_warmup(settings: Settings) -> None:
    warmup, steps = settings.training.lr_warmup_steps, Schedule.of(settings).policy_optimiser_steps
    if warmup > steps:
        remedy = f"use at most {steps}, all the optimiser steps of the policy"
        raise ConfigError("training.lr_warmup_steps", warmup, remedy)


def _check_flash_attention(settings: Settings) -> None:
    kernel = settings.model.attn_implementation
    if kernel != "flash_attention_2":
        return
    if settings.resources.device == "cpu":
        raise ConfigError("model.attn_implementation", kernel, "flash attention needs a GPU; use auto or sdpa")
    if settings.model.dtype == "float32":
        remedy = "flash attention has no float32 kernel; set model.dtype to bfloat16, or use auto or sdpa"
        raise ConfigError("model.attn_implementation", kernel, remedy)


# --- combinations: devices ------------------------------------------------------------------------------------------


def _check_lora(settings: Settings) -> None:
    model = settings.model
    if model.lora_rank == 0 and model.lora_targets:
        raise ConfigError("model.lora_targets", model.lora_targets, "set model.lora_rank, or leave the targets out")
    if model.lora_rank > 0 and find_spec("peft") is None:
        raise ConfigError("model.lora_rank", model.lora_rank, "needs the package peft: pip install 'rlhf-ray[lora]'")


def _check_learner_gpus(settings: Settings) -> None:
    gpus = settings.learners.num_gpus_per_learner
    if gpus not in (None, 0, 1):
        remedy = "use 0 or 1: a learner is one FSDP2 rank, and a rank drives one GPU; raise learners.num_learners"
        raise ConfigError("learners.num_gpus_per_learner", gpus, remedy)
    if gpus and settings.resources.device == "cpu":
        remedy = "use 0 or None, since resources.device is cpu"
        raise ConfigError("learners.num_gpus_per_learner", gpus, remedy)


def _check_tensor_parallel(settings: Settings) -> None:
    size = settings.rollouts.tensor_parallel_size
    if size > 1 and settings.resources.device == "cpu":
        remedy = "use 1, since resources.device is cpu; raise rollouts.num_replicas"
        raise ConfigError("rollouts.tensor_parallel_size", size, remedy)


def _check_weight_transfer(settings: Settings) -> None:
    transfer = settings.rollouts.weight_transfer
    if transfer != "nccl":
        return
    if settings.resources.device == "cpu":
        raise ConfigError("rollouts.weight_transfer", transfer, "nccl needs GPUs; use auto or shared_memory")
    if settings.learners.num_gpus_per_learner == 0:
        remedy = "nccl needs learners on GPUs; use auto, or set learners.num_gpus_per_learner to 1"
        raise ConfigError("rollouts.weight_transfer", transfer, remedy)
    if settings.rollouts.max_paused_replicas is not None:
        remedy = "nccl sends to all replicas at once; use None, or rollouts.weight_transfer shared_memory"
        raise ConfigError("rollouts.max_paused_replicas", settings.rollouts.max_paused_replicas, remedy)


# --- combinations: folders ------------------------------------------------------------------------------------------

_CONFIG_FILES: Final = ("config.json",)
_TOKENIZER_FILES: Final = ("tokenizer_config.json", "tokenizer.json")


def _check_model_folders(settings: Settings) -> None:
    model = settings.model
    _check_folder("model.path", model.path, "model", _CONFIG_FILES)
    _check_folder("model.critic_path", model.critic_path, "model", _CONFIG_FILES)
    _check_folder("model.tokenizer_path", model.tokenizer_path, "tokenizer", _TOKENIZER_FILES)


def _check_folder(field: str, path: str | None, kind: str, files: tuple[str, ...]) -> None:
    if path is None:
        return
    folder = Path(path).expanduser()
    # A hub id is "name" or "owner/name"; anything that exists, starts like a path or nests deeper is local.
    if not (folder.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1):
        return
    if not folder.is_dir():
        reason = "is a file" if folder.exists() else "no such folder"
        raise ConfigError(field, path, f"{reason}; give the {kind}'s folder or a hub id such as owner/name")
    if not any((folder / file).is_file() for file in files):
        raise ConfigError(field, path, f"not a {kind} folder: no {' or '.join(files)} in {folder.resolve()}")


_COMBINATIONS: Final[tuple[Callable[[Settings], None], ...]] = (
    _check_data_source,
    _check_prompt_template,
    _check_rewards_given,
    _check_reward_names,
    _check_reward_weights,
    _check_checkpointing,
    _check_evaluation_data,
    _check_evaluation_sampling,
    _check_trainable_sampling,
    _check_off_policy,
    _check_engine_args,
    _check_minibatches,
    _check_microbatch_fits,
    _check_plugins,
    _check_kl_target,
    _check_reward_shaping,
    _check_dynamic_sampling,
    _check_critic_warmup,
    _check_lr_warmup,
    _check_flash_attention,
    _check_lora,
    _check_learner_gpus,
    _check_tensor_parallel,
    _check_weight_transfer,
    _check_model_folders,
)
