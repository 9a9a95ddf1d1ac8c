"""OpenEnv environments: a client of a running server, one session per episode."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from rlhf_ray.config.user_code import load_reference
from rlhf_ray.environments.environment import Action, Environment, Step
from rlhf_ray.environments.episode import EpisodeFailed
from rlhf_ray.errors import ConfigError
from rlhf_ray.types import ChatMessage
from rlhf_ray.untrusted_text import shortened

__all__ = ["OpenEnvEnvironment"]

_NOT_OBSERVED = ("done", "reward", "metadata")


class OpenEnvEnvironment(Environment):
    """Plays in an environment that a server of OpenEnv runs.

    The action is made of the turn's text, as the field ``action_field``, or of the arguments of its one tool call. An
    action that does not fit is answered with an error text. Rewards and ends are the server's.

    Args:
        base_url: Where the server is, ``http://...`` or ``ws://...``.
        client: The environment's client class, or ``module:name`` or ``file.py:name`` of it; the default takes and
            returns dictionaries, and fits every server.
        action: The client's action class, likewise; unset: a dictionary.
        action_field: The field of an action that the text of a turn becomes; unset: each turn must be a tool call.
        observation_field: The field of an observation that the policy reads; unset: all fields, as JSON.
        prompt_from_reset: Whether the observation of a reset is the prompt; else it is the row's, and is not read.
        columns: Names of the dataset columns that a reset gets, in addition to ``seed``.
        timeout_s: For connecting, and for each answer.

    Raises:
        ConfigError: A class is missing, the package ``openenv`` is not installed, or an argument is wrong.
    """

    def __init__(
        self,
        base_url: str,
        *,
        client: str | Callable[..., Any] = "openenv.core.generic_client:GenericEnvClient",
        action: str | Callable[..., Any] | None = None,
        action_field: str | None = None,
        observation_field: str | None = None,
        prompt_from_reset: bool = True,
        columns: Sequence[str] = (),
        timeout_s: float = 60.0,
    ) -> None:
        if not isinstance(base_url, str) or not base_url.startswith(("http://", "https://", "ws://", "wss://")):
            raise ConfigError("environment.base_url", base_url, "must begin with http://, https://, ws:// or wss://")
        if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float) or not 0 < timeout_s < float("inf"):
            raise ConfigError("environment.timeout_s", timeout_s, "must be a positive number of seconds")
        if isinstance(columns, str):
            raise ConfigError("environment.columns", columns, f"must be a list of names: [{columns}]")
        self._base_url = base_url
        self._client_class = _loaded(client, "environment.client")
        self._action_class = None if action is None else _loaded(action, "environment.action")
        self._action_field = action_field
        self._observation_field = observation_field
        self._prompt_from_reset = prompt_from_reset
        self._columns = tuple(columns)
        self._timeout_s = timeout_s
        self._client: Any = None

    async def reset(self, row: Mapping[str, Any], seed: int) -> str | None:  # type: ignore[override]
        """Connect, and begin an episode of the server.

        Raises:
            EpisodeFailed: The server does not answer or refuses, or the row lacks a column.
        """
        for name in self._columns:
            if name not in row:
                raise EpisodeFailed("raised", f"{self._base_url}: environment.columns names {name!r}, not in the row")
        limits = {"connect_timeout_s": self._timeout_s, "message_timeout_s": self._timeout_s}
        self._client = self._client_class(base_url=self._base_url, **limits)
        await self._ask(self._client.connect)
        # Servers take seeds of 32 bits.
        result = await self._ask(self._client.reset, seed=seed % 2**31, **{name: row[name] for name in self._columns})
        if result.done:
            raise EpisodeFailed("raised", f"{self._base_url}: the episode was done before its first turn")
        return self._text(result.observation) if self._prompt_from_reset else None

    async def step(self, action: Action) -> Step:  # type: ignore[override]
        """Send an action.

        Raises:
            EpisodeFailed: The server does not answer or raised.
        """
        calls = action.message.get("tool_calls") or []
        if calls and action.truncated:
            return Step(truncated=True)
        try:
            result = await self._ask(self._client.step, self._action(action.text, calls))
        except _BadAction as error:
            return Step(observation=self._answer(calls, f"error: {error}"), metrics={"bad_actions": 1.0})
        reward = 0.0 if result.reward is None else float(result.reward)
        observation = None if result.done else self._answer(calls, self._text(result.observation))
        return Step(observation=observation, reward=reward, done=bool(result.done), metrics={"bad_actions": 0.0})

    async def close(self) -> None:  # type: ignore[override]
        """End the session."""
        client, self._client = self._client, None
        if client is not None:
            await self._ask(client.close)

    def _action(self, text: str, calls: Sequence[Mapping[str, Any]]) -> Any:
        if len(calls) > 1:
            raise _BadAction("one tool call at a time")
        if calls:
            fields = _arguments(calls[0])
        elif self._action_field is not None:
            fields = {self._action_field: text}
        else:
            raise _BadAction("the answer must be a tool call")
        if self._action_class is None:
            return fields
        try:
            return self._action_class(**fields)
        except (TypeError, ValueError) as error:  # pydantic's is a ValueError.
            raise _BadAction(shortened(error, 300)) from error

    def _answer(self, calls: Sequence[Mapping[str, Any]], text: str) -> str | list[ChatMessage]:
        return [{"role": "tool", "tool_call_id": call.get("id"), "content": text} for call in calls] or text

    def _text(self, observation: Any) -> str:
        if isinstance(observation, str):
            return observation
        fields = _fields(observation)
        if self._observation_field is None:
            shown = {name: value for name, value in fields.items() if name not in _NOT_OBSERVED}
            return json.dumps(shown, ensure_ascii=False, default=str)
        if self._observation_field not in fields:
            known = ", ".join(fields)
            message = f"observations have no environment.observation_field {self._observation_field!r} but {known}"
            raise EpisodeFailed("wrong_type", f"{self._base_url}: {message}")
        value = fields[self._observation_field]
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)

    async def _ask(self, method: Callable[..., Awaitable[Any]], *args: Any, **arguments: Any) -> Any:
        try:
            return await method(*args, **arguments)
        except TimeoutError as error:
            raise EpisodeFailed("timeout", f"{self._base_url}: no answer after {self._timeout_s:g} s") from error
        except Exception as error:  # Connections and clients of any kind.
            if "VALIDATION_ERROR" in str(error):  # The server's word for an action that does not fit.
                raise _BadAction(shortened(error, 300)) from error
            raise EpisodeFailed("raised", f"{self._base_url}: {type(error).__name__}: {shortened(error)}") from error


class _BadAction(Exception):
    """What is wrong with an action, for the policy."""


def _loaded(named: str | Callable[..., Any], field: str) -> Callable[..., Any]:
    if isinstance(named, str):
        try:
            return load_reference(named, field=field, value=named)
        except ConfigError as error:
            if named.startswith("openenv.") and "no module 'openenv'" in error.remedy:
                remedy = "the package openenv is not installed: pip install 'rlhf-ray[openenv]'"
                raise ConfigError(field, named, remedy) from error
            raise
    if not inspect.isclass(named):
        raise ConfigError(field, named, "must be a class, or 'module:name' of one")
    return named


def _arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    written = (call.get("function") or {}).get("arguments")
    try:
        fields = json.loads(written) if isinstance(written, str) else written
    except (ValueError, RecursionError) as error:
        raise _BadAction(f"the arguments are no JSON: {shortened(error, 200)}") from error
    if not isinstance(fields, Mapping):
        raise _BadAction("the arguments must be a JSON object")
    return dict(fields)


def _fields(observation: Any) -> dict[str, Any]:
    if isinstance(observation, Mapping):
        return dict(observation)
    if hasattr(observation, "model_dump"):
        return dict(observation.model_dump(mode="json"))
    if dataclasses.is_dataclass(observation) and not isinstance(observation, type):
        return dataclasses.asdict(observation)
    return dict(vars(observation))
