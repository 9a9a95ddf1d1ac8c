"""The advantages and losses that settings name, built in or from user code.

Both are pure functions of tensors. A function asks for what it needs by the names of its parameters, so its signature
also says what the run must have: one that takes ``values`` needs a critic, one that takes ``group_ids`` needs several
completions per prompt. Nothing here imports torch; a built-in function is imported by the process that calls it.

::

    @register_advantage("best_of_group")
    def best_of_group(rewards, group_ids):      # [B], [B] -> [B], over the whole batch of all learners
        ...

    GRPOConfig().training(advantage="best_of_group")
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeVar, cast

from rlhf_ray.config.user_code import bound_arguments, close_match, identity, load_reference
from rlhf_ray.errors import ConfigError

__all__ = [
    "ADVANTAGES",
    "LOSSES",
    "Plugin",
    "PluginTable",
    "advantage_plugin",
    "loss_plugin",
    "register_advantage",
    "register_loss",
]

Function = TypeVar("Function", bound=Callable[..., Any])
_BY_NAME: Final = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)

_COEFFICIENTS: Final = ("gamma", "lam", "critic_lam", "length_alpha")
PER_TOKEN: Final = ("rewards", "values", "mask", "bootstrap", "turn_ids", *_COEFFICIENTS)
"""What an advantage of tokens may ask for: a rank's trajectories, a row ``[N, T]`` each (``bootstrap`` ``[N]``), and
the settings ``gamma``, ``lambda_``, ``critic_lambda`` and ``lambda_alpha``, the last two ``None`` where unset."""
_OF_TOKENS_ALONE: Final = ("values", "mask", "bootstrap", "turn_ids")
PER_COMPLETION: Final = ("rewards", "group_ids", "lengths", "greedy_rewards")
"""What an advantage of completions may ask for: the trajectories of the whole batch of all ranks, ``[B]`` each."""
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
    required_inputs: tuple[str, ...]
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
        return "values" in self.required_inputs

    @property
    def compares_groups(self) -> bool:
        """Whether it sees the completions of a prompt together."""
        return "group_ids" in self.required_inputs

    @property
    def per_completion(self) -> bool:
        """Whether it gives one advantage per completion rather than one per token."""
        return not any(name in _OF_TOKENS_ALONE for name in self.required_inputs)

    @property
    def needs_greedy_rewards(self) -> bool:
        """Whether it asks for the reward of a greedily decoded completion of the same prompt."""
        return "greedy_rewards" in self.required_inputs

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
        inputs = {name: available[name] for name in self.required_inputs}
        own = {name: value.clone() if hasattr(value, "clone") else value for name, value in inputs.items()}
        return self.function(**own, **deepcopy(dict(self.arguments)))


@dataclass(frozen=True, slots=True)
class PluginTable:
    """The functions that one setting may name."""

    setting: str
    inputs: Callable[[tuple[str, ...]], tuple[str, ...]]
    """Names of a function's parameters -> those of the inputs that it may ask for."""
    plugins: dict[str, Plugin] = field(default_factory=dict)

    def add_built_in(self, name: str, reference: str, inputs: str, **values: Any) -> None:
        """Add a function that is imported when it is called, with the names of its inputs between spaces."""
        self.plugins[name] = Plugin(name=name, function=reference, required_inputs=tuple(inputs.split()), **values)

    def register(self, name: str, function: Function) -> Function:
        """Add a function under a name, in place of the same one of a module that was run again, as notebooks do."""
        taken = self.plugins.get(name)
        if taken is not None and identity(taken.function) != identity(function):
            raise ConfigError(self.setting, name, "this name is taken; register under another one")
        self.plugins[name] = self._of_function(name, function)
        return function

    def find(self, name: str, arguments: Mapping[str, Any]) -> Plugin:
        """The function of a name or reference, with further arguments."""
        plugin = self.plugins.get(name)
        if ":" in name:
            plugin = self._of_function(name, load_reference(name, field=self.setting, value=name))
        if plugin is None:
            near = close_match(name, self.plugins)
            hint = f"did you mean {near}?" if near else f"there are {', '.join(sorted(self.plugins))}"
            raise ConfigError(
                self.setting, name, f"no such function; {hint} (your own: 'module:function' or 'file.py:function')"
            )
        if remedy := _wrong_arguments(plugin, arguments):
            raise ConfigError(f"{self.setting}_args", dict(arguments), remedy)
        return replace(plugin, arguments={**plugin.arguments, **arguments})

    def _of_function(self, name: str, function: Callable[..., Any]) -> Plugin:
        signature = inspect.signature(function).parameters
        first, *others = inputs = self.inputs(tuple(signature))
        required_inputs = tuple(parameter for parameter in signature if parameter in inputs)
        if unnamed := [item.name for item in signature.values() if item.kind is item.POSITIONAL_ONLY]:
            remedy = f"inputs are given by name, but {', '.join(unnamed)} is positional only"
            raise ConfigError(self.setting, name, remedy)
        if first not in required_inputs:
            raise ConfigError(self.setting, name, f"the function must take {first}; it may take {', '.join(others)}")
        if taken := sorted(bound_arguments(function) & {*required_inputs}):
            remedy = f"the function binds {taken[0]!r}, which every run passes: leave it free"
            raise ConfigError(self.setting, name, remedy)
        own = [item for item in signature.values() if item.kind in _BY_NAME and item.name not in required_inputs]
        required = tuple(item.name for item in own if item.default is item.empty)
        return Plugin(name=name, required_inputs=required_inputs, function=function, required=required)


def _wrong_arguments(plugin: Plugin, arguments: Mapping[str, Any]) -> str | None:
    """What is wrong with the further arguments of a function; ``None``: nothing."""
    if arguments:
        function: Any = plugin.loaded().function
        parameters = inspect.signature(function).parameters.values()
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        given = {*plugin.required_inputs, *plugin.arguments}
        own = [item.name for item in parameters if item.name not in given and item.kind in _BY_NAME]
        for name in arguments:
            if name in plugin.required_inputs or (name not in own and not takes_any):
                return f"no argument {name!r}; {plugin.name} takes {', '.join(own) or 'no arguments'}"
    if taken := sorted(bound_arguments(plugin.function) & arguments.keys()):
        return f"{plugin.name} has a value for {taken[0]!r} already: leave it out"
    missing = [argument for argument in plugin.required if argument not in arguments]
    return f"{plugin.name} needs {', '.join(missing)}" if missing else None


def advantage_parameters(names: tuple[str, ...]) -> tuple[str, ...]:
    """The inputs that an advantage with such parameters may ask for."""
    return PER_TOKEN if any(name in _OF_TOKENS_ALONE for name in names) else PER_COMPLETION


_LOSS_TENSORS: Final = "logprobs old_logprobs advantages mask"
_LOSS_SETTINGS: Final = "behavior_weights aggregation normalizer"
_CLIPPED: Final = f"{_LOSS_TENSORS} clip_low clip_high {_LOSS_SETTINGS}"

ADVANTAGES: Final = PluginTable("training.advantage", advantage_parameters)
"""Every advantage that a setting may name."""
ADVANTAGES.add_built_in("gae", "rlhf_ray.advantages:gae", f"rewards values mask bootstrap {' '.join(_COEFFICIENTS)}")
ADVANTAGES.add_built_in(
    "turn_gae", "rlhf_ray.advantages:turn_gae", "rewards values mask turn_ids gamma lam critic_lam bootstrap"
)
for _method in ("grpo", "dr_grpo", "rloo", "opo", "maxrl"):
    ADVANTAGES.add_built_in(
        _method, "rlhf_ray.advantages:group_advantages", "rewards group_ids lengths", arguments={"method": _method}
    )
ADVANTAGES.add_built_in("reinforce_plus_plus", "rlhf_ray.advantages:reinforce_plus_plus", "rewards mask gamma")
ADVANTAGES.add_built_in("remax", "rlhf_ray.advantages:remax", "rewards greedy_rewards")

LOSSES: Final = PluginTable("training.loss", lambda names: OF_LOSS)
"""Every loss that a setting may name."""
LOSSES.add_built_in("ppo", "rlhf_ray.losses:ppo_loss", f"{_CLIPPED} dual_clip")
for _name in ("gspo", "cispo", "gmpo"):
    LOSSES.add_built_in(_name, f"rlhf_ray.losses:{_name}_loss", _CLIPPED)
LOSSES.add_built_in(
    "sapo",
    "rlhf_ray.losses:sapo_loss",
    f"{_LOSS_TENSORS} {_LOSS_SETTINGS}",
    required=("temperature_positive", "temperature_negative"),
)


def register_advantage(name: str) -> Callable[[Function], Function]:
    """Make a function available as ``training.advantage``; a decorator.

    With a parameter called ``mask``, ``values``, ``bootstrap`` or ``turn_ids`` it gives advantages of tokens: it is
    called with a learner rank's trajectories, a row each, and returns ``[N, T]``, or ``(advantages, returns)`` when it
    takes the critic's ``values``.
    Without, it gives advantages of completions: it is called with the whole batch of all ranks and returns ``[B]``.
    See :data:`PER_TOKEN` and :data:`PER_COMPLETION`; other parameters come from ``training.advantage_args``.

    Args:
        name: What settings call it.

    Raises:
        ConfigError: The name is taken by another function.
    """
    return functools.partial(ADVANTAGES.register, name)


def register_loss(name: str) -> Callable[[Function], Function]:
    """Make a function available as ``training.loss``; a decorator.

    It is called with ``[B, T]`` tensors, one sequence per row, and returns ``(loss, metrics)`` as
    :func:`rlhf_ray.losses.ppo_loss` does: the loss divided by ``normalizer``, the metrics token means. See
    :data:`OF_LOSS` for the parameters; others come from ``training.loss_args``.

    Args:
        name: What settings call it.

    Raises:
        ConfigError: The name is taken by another function.
    """
    return functools.partial(LOSSES.register, name)


def advantage_plugin(name: str, arguments: Mapping[str, Any]) -> Plugin:
    """The advantage that ``training.advantage`` names, with ``training.advantage_args``.

    Raises:
        ConfigError: There is none of that name, or it takes no such argument.
    """
    return ADVANTAGES.find(name, arguments)


def loss_plugin(name: str, arguments: Mapping[str, Any]) -> Plugin:
    """The loss that ``training.loss`` names, with ``training.loss_args``.

    Raises:
        ConfigError: There is none of that name, or it takes no such argument.
    """
    return LOSSES.find(name, arguments)
