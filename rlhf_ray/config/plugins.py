"""Before the loop: the advantages and losses that settings name, built in or from user code.

Both are pure functions of tensors. A function asks for what it needs by the names of its parameters, so its signature
also says what the run must have: one that takes ``values`` needs a critic, one that takes ``group_ids`` needs several
completions a prompt. Nothing here imports torch; a built-in function is imported by the process that calls it.

::

    @register_advantage("best_of_group")
    def best_of_group(rewards, group_ids):      # [B], [B] -> [B], over the whole batch of all learners
        ...

    GRPOConfig().training(advantage="best_of_group")
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any, Final, TypeVar, cast

from rlhf_ray.config.user_code import bound_arguments, load_reference
from rlhf_ray.errors import ConfigError

__all__ = ["Plugin", "advantage_plugin", "loss_plugin", "register_advantage", "register_loss"]

Function = TypeVar("Function", bound=Callable[..., Any])

PER_TOKEN: Final = ("rewards", "values", "mask", "bootstrap", "gamma", "lam")
"""What an advantage of tokens may ask for: a rank's rows, ``[N, T]`` each (``bootstrap`` ``[N]``), and two settings."""
_OF_TOKENS_ALONE: Final = ("values", "mask", "bootstrap")
PER_COMPLETION: Final = ("rewards", "group_ids", "lengths", "greedy_rewards")
"""What an advantage of completions may ask for: the whole batch of all ranks, ``[B]`` each."""
OF_LOSS: Final = (
    "logprobs",
    "old_logprobs",
    "advantages",
    "mask",
    "clip_low",
    "clip_high",
    "dual_clip",
    "behavior_weights",
    "aggregation",
    "normalizer",
)
"""What a loss may ask for: ``[B, T]`` tensors, and the settings of the same names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plugin:
    """A function that settings name, and what it asks for."""

    name: str
    asks_for: tuple[str, ...]
    """Names of the inputs that it is given."""
    function: Callable[..., Any] | str | bytes
    """The function; a built-in's ``module:function``; or a function pickled for another process."""
    required: tuple[str, ...] = ()
    """Names of further arguments without a default."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Further keyword arguments of every call."""

    @property
    def needs_critic(self) -> bool:
        """Whether it asks for the critic's values."""
        return "values" in self.asks_for

    @property
    def compares_groups(self) -> bool:
        """Whether it sees the completions of a prompt together."""
        return "group_ids" in self.asks_for

    @property
    def per_completion(self) -> bool:
        """Whether it gives one advantage a completion rather than one a token."""
        return not any(name in _OF_TOKENS_ALONE for name in self.asks_for)

    @property
    def needs_greedy_rewards(self) -> bool:
        """Whether it asks for the reward of a greedily decoded completion of the same prompt."""
        return "greedy_rewards" in self.asks_for

    def loaded(self) -> Plugin:
        """The same with the function itself, as the process that calls it needs it."""
        function = self.function
        if isinstance(function, bytes):
            from rlhf_ray.pickling import deserialize

            function = cast("Callable[..., Any]", deserialize(function))
        if isinstance(function, str):
            function = load_reference(function, field=self.name, value=function)
        return replace(self, function=function)

    def call(self, available: Mapping[str, Any]) -> Any:
        """Call the function, once :meth:`loaded`, with those of ``available`` that it asks for.

        Tensors and further arguments are copies: what the function edits in place does not reach the learner.
        """
        assert callable(self.function), "call loaded() first"
        inputs = {name: available[name] for name in self.asks_for}
        own = {name: value.clone() if hasattr(value, "clone") else value for name, value in inputs.items()}
        return self.function(**own, **deepcopy(dict(self.arguments)))


def _built_in(name: str, reference: str, asks_for: str, *, required: tuple[str, ...] = (), **arguments: Any) -> Plugin:
    return Plugin(
        name=name, asks_for=tuple(asks_for.split()), function=reference, required=required, arguments=arguments
    )


def _group_method(name: str) -> Plugin:
    return _built_in(name, "rlhf_ray.advantages:group_advantages", "rewards group_ids lengths", method=name)


_LOSS_TENSORS: Final = "logprobs old_logprobs advantages mask"
_LOSS_SETTINGS: Final = "behavior_weights aggregation normalizer"
_CLIPPED: Final = f"{_LOSS_TENSORS} clip_low clip_high {_LOSS_SETTINGS}"

_ADVANTAGES: dict[str, Plugin] = {
    plugin.name: plugin
    for plugin in (
        _built_in("gae", "rlhf_ray.advantages:gae", "rewards values mask gamma lam bootstrap"),
        *map(_group_method, ("grpo", "dr_grpo", "rloo", "opo", "maxrl")),
        _built_in("reinforce_plus_plus", "rlhf_ray.advantages:reinforce_plus_plus", "rewards mask gamma"),
        _built_in("remax", "rlhf_ray.advantages:remax", "rewards greedy_rewards"),
    )
}
_LOSSES: dict[str, Plugin] = {
    plugin.name: plugin
    for plugin in (
        _built_in("ppo", "rlhf_ray.losses:ppo_loss", f"{_CLIPPED} dual_clip"),
        _built_in("gspo", "rlhf_ray.losses:gspo_loss", _CLIPPED),
        _built_in("cispo", "rlhf_ray.losses:cispo_loss", _CLIPPED),
        _built_in("gmpo", "rlhf_ray.losses:gmpo_loss", _CLIPPED),
        _built_in(
            "sapo",
            "rlhf_ray.losses:sapo_loss",
            f"{_LOSS_TENSORS} {_LOSS_SETTINGS}",
            required=("temperature_positive", "temperature_negative"),
        ),
    )
}
ADVANTAGES: Final[Mapping[str, Plugin]] = MappingProxyType(_ADVANTAGES)
"""Every advantage that a setting may name."""
LOSSES: Final[Mapping[str, Plugin]] = MappingProxyType(_LOSSES)
"""Every loss that a setting may name."""


def register_advantage(name: str) -> Callable[[Function], Function]:
    """Make a function available as ``training.advantage``; a decorator.

    With a parameter called ``mask``, ``values`` or ``bootstrap`` it gives advantages of tokens: it is called with a
    learner rank's rows and returns ``[N, T]``, or ``(advantages, returns)`` when it takes the critic's ``values``.
    Without, it gives advantages of completions: it is called with the whole batch of all ranks and returns ``[B]``.
    See :data:`PER_TOKEN` and :data:`PER_COMPLETION`; other parameters come from ``training.advantage_args``.

    Args:
        name: What settings call it.

    Raises:
        ConfigError: The name is taken by another function.
    """
    return _registering("training.advantage", name, _ADVANTAGES, advantage_parameters)


def register_loss(name: str) -> Callable[[Function], Function]:
    """Make a function available as ``training.loss``; a decorator.

    It is called with ``[B, T]`` tensors, one sequence a row, and returns ``(loss, metrics)`` as
    :func:`rlhf_ray.losses.ppo_loss` does: the loss divided by ``normalizer``, the metrics token means. See
    :data:`OF_LOSS` for the parameters; others come from ``training.loss_args``.

    Args:
        name: What settings call it.

    Raises:
        ConfigError: The name is taken by another function.
    """
    return _registering("training.loss", name, _LOSSES, lambda names: OF_LOSS)


def advantage_plugin(name: str, arguments: Mapping[str, Any]) -> Plugin:
    """The advantage that ``training.advantage`` names, with ``training.advantage_args``.

    Raises:
        ConfigError: There is none of that name, or it takes no such argument.
    """
    return _found("training.advantage", name, arguments, ADVANTAGES, advantage_parameters)


def loss_plugin(name: str, arguments: Mapping[str, Any]) -> Plugin:
    """The loss that ``training.loss`` names, with ``training.loss_args``.

    Raises:
        ConfigError: There is none of that name, or it takes no such argument.
    """
    return _found("training.loss", name, arguments, LOSSES, lambda names: OF_LOSS)


def advantage_parameters(names: tuple[str, ...]) -> tuple[str, ...]:
    """The inputs that an advantage with such parameters may ask for."""
    return PER_TOKEN if any(name in _OF_TOKENS_ALONE for name in names) else PER_COMPLETION


_BY_NAME: Final = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_Inputs = Callable[[tuple[str, ...]], tuple[str, ...]]


def _registering(setting: str, name: str, table: dict[str, Plugin], inputs: _Inputs) -> Callable[[Function], Function]:
    def register(function: Function) -> Function:
        taken = table.get(name)
        # The same function again: its module was run twice, as notebooks do.
        if taken is not None and _identity(taken.function) != _identity(function):
            raise ConfigError(setting, name, "this name is taken; register under another one")
        table[name] = _of_function(setting, name, function, inputs)
        return function

    return register


def _identity(function: object) -> tuple[Any, Any]:
    named = function if hasattr(function, "__qualname__") else type(function)
    return getattr(function, "__module__", None), getattr(named, "__qualname__", None)


def _of_function(setting: str, name: str, function: Callable[..., Any], inputs: _Inputs) -> Plugin:
    signature = inspect.signature(function).parameters
    if unnamed := [item.name for item in signature.values() if item.kind is item.POSITIONAL_ONLY]:
        raise ConfigError(setting, name, f"inputs are given by name, but {', '.join(unnamed)} is positional only")
    parameters = tuple(signature)
    asks_for = tuple(name for name in parameters if name in inputs(parameters))
    first, *others = inputs(parameters)
    if first not in asks_for:
        raise ConfigError(setting, name, f"the function must take {first}; it may take {', '.join(others)}")
    if taken := sorted(bound_arguments(function) & {*asks_for}):
        raise ConfigError(setting, name, f"the function binds {taken[0]!r}, which every run passes: leave it free")
    required = tuple(
        item.name
        for item in signature.values()
        if item.kind in _BY_NAME and item.default is item.empty and item.name not in asks_for
    )
    return Plugin(name=name, asks_for=asks_for, function=function, required=required)


def _found(
    setting: str, name: str, arguments: Mapping[str, Any], table: Mapping[str, Plugin], inputs: _Inputs
) -> Plugin:
    if ":" in name:
        plugin = _of_function(setting, name, load_reference(name, field=setting, value=name), inputs)
    elif name in table:
        plugin = table[name]
    else:
        near = get_close_matches(name, table, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(table))}"
        raise ConfigError(
            setting, name, f"no such function; {hint} (your own: 'module:function' or 'file.py:function')"
        )
    if arguments:
        _check_known(f"{setting}_args", plugin, arguments)
    if taken := sorted(bound_arguments(plugin.function) & arguments.keys()):
        remedy = f"{plugin.name} has a value for {taken[0]!r} already: leave it out"
        raise ConfigError(f"{setting}_args", dict(arguments), remedy)
    if missing := [argument for argument in plugin.required if argument not in arguments]:
        raise ConfigError(f"{setting}_args", dict(arguments), f"{plugin.name} needs {', '.join(missing)}")
    return replace(plugin, arguments={**plugin.arguments, **arguments})


def _check_known(setting: str, plugin: Plugin, arguments: Mapping[str, Any]) -> None:
    function: Any = plugin.loaded().function
    parameters = inspect.signature(function).parameters.values()
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    given = {*plugin.asks_for, *plugin.arguments}
    own = [item.name for item in parameters if item.name not in given and item.kind in _BY_NAME]
    for name in arguments:
        if name in plugin.asks_for or (name not in own and not takes_any):
            remedy = f"{plugin.name} takes {', '.join(own) or 'no arguments'}"
            raise ConfigError(setting, dict(arguments), f"no argument {name!r}; {remedy}")
