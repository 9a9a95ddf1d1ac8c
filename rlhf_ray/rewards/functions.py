"""What ``rewards.functions`` names becomes checked, weighted callables."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import rlhf_ray.rewards.builtin  # noqa: F401  (registers the built-in rewards)
from rlhf_ray.config.settings import REWARD_ARGUMENTS, RewardFunction, RewardSettings, RewardSpec, Settings
from rlhf_ray.config.user_code import bound_arguments, load_reference
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.rewards.arguments import Parameters, unbound
from rlhf_ray.rewards.registry import RowCheck, build_reward, check_known_arguments, is_factory
from rlhf_ray.rewards.reward_model.reward import RewardModelReward
from rlhf_ray.untrusted_text import shortened

__all__ = ["NamedReward", "resolve_rewards", "reward_models", "rewards_of_run", "row_check"]

DEFAULT_REWARD = "rlhf_ray.quickstart.task:reward"
"""Scores the quickstart task; used where no function is named."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedReward:
    """A reward function, what reports call it, and its share of the sum."""

    name: str
    """Unique among a run's reward functions."""
    weight: float
    function: RewardFunction
    parameters: Parameters = field(init=False, compare=False, repr=False)
    """What the function can be called with."""

    def __post_init__(self) -> None:
        """Read the function's signature."""
        object.__setattr__(self, "parameters", Parameters.of(self.function))

    @property
    def is_async(self) -> bool:
        """Whether calling the function gives a coroutine, so that several calls can share a worker."""
        call = getattr(self.function, "__call__", None)  # noqa: B004  (the method itself is wanted)
        return inspect.iscoroutinefunction(self.function) or inspect.iscoroutinefunction(call)

    def check_bound(self, columns: Collection[str]) -> None:
        """Check that no column replaces an argument.

        Raises:
            DataError: One has the name of an argument that has a value already.
        """
        if taken := sorted(self.parameters.bound.intersection(columns)):
            raise DataError(
                f"the reward {self.name!r} is given {taken[0]!r} in rewards.functions, and the dataset has a column "
                f"{taken[0]!r} too, which would replace it: rename one of them"
            )

    def check_required(self, columns: Collection[str]) -> None:
        """Check that the columns are there without which the function cannot be called.

        Raises:
            DataError: One is missing.
        """
        if missing := [name for name in self.parameters.required if name not in columns]:
            raise DataError(
                f"the reward {self.name!r} needs the column {missing[0]!r}, which is not there (columns: "
                f"{', '.join(sorted(columns)) or 'none'}; besides columns a reward may take "
                f"{', '.join(sorted(REWARD_ARGUMENTS))})"
            )

    def check_row(self, row: Mapping[str, Any]) -> None:
        """Check a dataset row, by the function's parameters and by its own ``check_row``, if it has one.

        Raises:
            DataError: The function cannot use the row, or its ``check_row`` raised something.
        """
        self.check_bound(row)
        self.check_required(row)
        check: RowCheck | None = getattr(unbound(self.function), "check_row", None)
        try:
            if check is not None:
                check(row)
        except DataError as error:
            raise DataError(f"{self.name}: {error}") from error
        except Exception as error:  # It is the user's code.
            raise DataError(f"{self.name}: check_row raised {type(error).__name__}: {shortened(error)}") from error

    def serialized(self) -> bytes:
        """As bytes for another process, including code that cannot be imported there (of a notebook, of a single file).

        Raises:
            ConfigError: The function holds something that cannot be sent.
        """
        from rlhf_ray.pickling import serialize  # Imports Ray.

        try:
            return serialize(self, defined_by=self.function)
        except Exception as error:  # Pickling runs the __reduce__ of whatever the function holds.
            raise ConfigError(
                "rewards.functions",
                self.name,
                f"cannot be sent to a reward worker ({type(error).__name__}: {error}); make what it holds inside it",
            ) from error


def resolve_rewards(settings: RewardSettings) -> tuple[NamedReward, ...]:
    """Find, build and check the reward functions of a run.

    Each of ``settings.functions`` is a callable; the name of a built-in; ``package.module:function``;
    ``path/to/file.py:function``, relative to the working directory; or ``{"name": one of these names, **arguments}``,
    whose arguments a built-in's factory or the function itself receives. No functions: the quickstart task's checker.

    Raises:
        ConfigError: Something of this is missing, misspelled, or cannot be called as rewards are; or the weights do
            not fit the functions.
    """
    specs: Sequence[RewardSpec] = settings.functions or [DEFAULT_REWARD]
    functions = [_resolve(spec, f"rewards.functions[{index}]") for index, spec in enumerate(specs)]
    names = _unique([_name_of(function) for function in functions])
    weights = settings.weights or [1.0] * len(functions)
    for index, weight in enumerate(weights):
        if not math.isfinite(weight):
            raise ConfigError(f"rewards.weights[{index}]", weight, "must be a finite number")
    return tuple(
        NamedReward(name=name, weight=float(weight), function=function)
        for name, weight, function in zip(names, weights, functions, strict=True)
    )


def rewards_of_run(settings: Settings) -> RewardSettings:
    """The rewards section of a run: where it names no function, an environment's own rewards are those."""
    rewards, environment = settings.rewards, settings.environment
    if environment.is_used and not rewards.functions and not environment.tools:
        return replace(rewards, functions=["environment"])
    return rewards


def reward_models(settings: RewardSettings) -> tuple[RewardModelReward, ...]:
    """Those of a run's rewards that are models; nothing else is looked up.

    Raises:
        ConfigError: An argument of one is wrong.
    """
    found = []
    for index, spec in enumerate(settings.functions):
        named = spec.get("name") if isinstance(spec, Mapping) else spec
        if isinstance(spec, RewardModelReward) or named == "reward_model":
            model = _resolve(spec, f"rewards.functions[{index}]")
            assert isinstance(model, RewardModelReward)
            found.append(model)
    return tuple(found)


def row_check(rewards: Sequence[NamedReward]) -> RowCheck:
    """One check of a row, by all rewards."""

    def check_row(row: Mapping[str, Any]) -> None:
        for reward in rewards:
            reward.check_row(row)

    return check_row


def _resolve(spec: RewardSpec, field: str) -> RewardFunction:
    if isinstance(spec, str):
        function = _from_name(spec, {}, field, spec)
    elif isinstance(spec, Mapping):
        arguments = dict(spec)
        name = arguments.pop("name", None)
        if not isinstance(name, str):
            raise ConfigError(field, spec, "a mapping needs a name: {name: gsm8k, last_number: true}")
        function = _from_name(name, arguments, field, spec)
    else:
        function = spec
    _check_signature(function, field, spec)
    return function


def _from_name(name: str, arguments: Mapping[str, Any], field: str, value: object) -> RewardFunction:
    if ":" not in name:
        if name.endswith(".py"):
            raise ConfigError(field, value, f"say which function of the file: '{name}:function'")
        return build_reward(name, arguments, field=field, value=value)
    function = load_reference(name, field=field, value=value)
    if not arguments:
        return function
    check_known_arguments("the function", inspect.signature(function).parameters, arguments, field=field, value=value)
    if taken := sorted(bound_arguments(function).intersection(arguments)):
        raise ConfigError(field, value, f"the function has a value for {taken[0]!r} already: leave it out")
    return functools.partial(function, **arguments)


def _check_signature(function: object, field: str, value: object) -> None:
    if not callable(function):
        raise ConfigError(
            field, value, "must be a callable, a name, 'module:function', 'file.py:function' or {name: ...}"
        )
    if is_factory(function):
        name = getattr(function, "__name__", "it")
        raise ConfigError(field, value, f"{name} makes reward functions and is none: write {name}() or {name!r}")
    if any(base.__module__.startswith("torch.nn.") for base in type(function).__mro__):
        raise ConfigError(field, value, "a model is named, so that it has actors of its own: RewardModelReward(path)")
    parameters = Parameters.of(function)
    if needed := parameters.positional_only:
        raise ConfigError(field, value, f"rewards are called with keywords, but {', '.join(needed)} is positional only")
    if taken := sorted(parameters.bound & REWARD_ARGUMENTS):
        raise ConfigError(field, value, f"{taken[0]!r} cannot be bound: every run passes it; rename the parameter")
    if "environments" in parameters.required:
        raise ConfigError(field, value, "needs environments, which only TRL's agent training has; give it a default")


def _name_of(function: RewardFunction) -> str:
    function = unbound(function)
    if isinstance(function, RewardModelReward):
        return "reward_model"
    name = getattr(function, "__name__", None) or type(function).__name__
    return str(name).strip("<>")


def _unique(names: Sequence[str]) -> list[str]:
    taken = ["failures"]  # rewards/failures/... are metrics of their own.
    for name in names:
        candidate, count = name, 1
        while candidate in taken:
            count += 1
            candidate = f"{name}_{count}"
        taken.append(candidate)
    return taken[1:]
