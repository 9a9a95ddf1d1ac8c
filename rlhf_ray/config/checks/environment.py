"""Combinations that cannot work in ``environment``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rlhf_ray.config.settings import EnvironmentSettings, Settings

__all__ = ["COMBINATIONS"]

_KINDS = ("name", "tools", "agent")


def environment_problems(settings: Settings) -> Iterator[tuple[str, str]]:
    """There is one kind of environment, and what is set applies to it."""
    environment = settings.environment
    kinds = [kind for kind in _KINDS if getattr(environment, kind) not in (None, [])]
    if len(kinds) > 1:
        yield f"environment.{kinds[1]}", f"environment.{kinds[0]} is given too; use one of {', '.join(_KINDS)}"
    if not environment.is_used:
        yield from _unused(environment)
        return
    several = isinstance(environment.name, Mapping) and "name" not in environment.name
    if environment.column is not None and not several:
        yield "environment.column", "rows choose among several environments: name = {guess: ..., shop: ...}"
    if several and not environment.name:
        yield "environment.name", "names no environment"
    if several and environment.column is None:
        yield (
            "environment.name",
            "several environments need environment.column, by which a row names its own; a single one with arguments "
            "is {name: ..., arguments}",
        )
    for name in ("tool_parser", "reasoning_parser"):
        if (parser := getattr(environment, name)) is not None:
            from rlhf_ray.rollouts.message_parser import check_parser

            check_parser(f"environment.{name}", parser)
    _check_name(environment)
    if environment.tools and environment.tool_parser is None:
        yield (
            "environment.tool_parser",
            "name the parser of the calls that the model writes: hermes for Qwen 2.5 and 3, llama3_json, mistral, ...",
        )
    most, longest = settings.rollouts.max_new_tokens, environment.max_turn_tokens
    if longest is not None and longest > most:
        yield "environment.max_turn_tokens", f"is more than rollouts.max_new_tokens = {most}, the whole trajectory"
    if environment.step_timeout_s > environment.timeout_s:
        yield "environment.step_timeout_s", f"is more than environment.timeout_s = {environment.timeout_s:g}"


def _check_name(environment: EnvironmentSettings) -> None:
    """Refuse the name of an environment that the library does not have; others are imported when the run starts."""
    from rlhf_ray.environments.registry import BUILT_IN, resolve_environments

    specs = list(environment.name.values()) if environment.column is not None else [environment.name]
    named = [spec.get("name") if isinstance(spec, Mapping) else spec for spec in specs]
    if any(isinstance(name, str) and ":" not in name and name not in BUILT_IN for name in named):
        resolve_environments(environment)  # Raises, and names the nearest.


def _unused(environment: EnvironmentSettings) -> Iterator[tuple[str, str]]:
    """A run without an environment has one turn, and nothing else to say of it."""
    defaults = EnvironmentSettings()
    for name in EnvironmentSettings.__dataclass_fields__:
        value = getattr(environment, name)
        if value != getattr(defaults, name) and not (name == "max_turns" and value == 1):
            yield f"environment.{name}", "there is no environment: set environment.name, environment.tools or agent"


COMBINATIONS = (environment_problems,)
