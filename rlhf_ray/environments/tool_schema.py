"""The JSON schema of a Python function, and calls that do not fit it."""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, Literal, NoReturn, TypeAlias, Union, get_args, get_origin

from rlhf_ray.errors import ConfigError
from rlhf_ray.untrusted_text import shortened

__all__ = ["ArgumentCheck", "Schema", "function_schema", "tool_name"]

Schema: TypeAlias = dict[str, Any]

_JSON_TYPES: Final = (int, float, str, bool, type(None), list, tuple, dict, Any)
_EXAMPLE: Final = 'write """What it does.\n\nArgs:\n    <parameter>: What it means.\n"""'


def tool_name(schema: Schema) -> str:
    """The name of the function that a schema describes."""
    return str(schema["function"]["name"])


def function_schema(function: Callable[..., Any], *, hidden: set[str], field: str, value: object) -> Schema:
    """The schema of a function as transformers makes it, without the parameters that the policy does not write.

    Args:
        function: Typed, with a docstring in Google's style.
        hidden: Names of parameters to leave out; they need no type and no description.
        field: The setting that names the function, for the error.
        value: What that setting holds, for the error.

    Returns:
        ``{"type": "function", "function": {"name": ..., "description": ..., "parameters": {...}}}``

    Raises:
        ConfigError: The function has no docstring, types that JSON does not have, or parameters without a name.
    """

    def refuse(remedy: str) -> NoReturn:
        raise ConfigError(field, value, remedy)

    name = getattr(function, "__name__", "")
    if not name.isidentifier():
        refuse("a lambda has no name: write 'def', with a docstring and types")
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        refuse(f"{name} yields: return the result")
    try:
        parameters = inspect.signature(function).parameters
        hints = typing.get_type_hints(function)
    except Exception as error:  # Annotations that are text are evaluated: they may raise anything.
        refuse(f"the signature of {name} cannot be read ({type(error).__name__}: {error})")
    visible = {key: item for key, item in parameters.items() if key not in hidden}
    for key, item in visible.items():
        if problem := _parameter_problem(name, item, hints.get(key, inspect.Parameter.empty)):
            refuse(problem)
    doc = inspect.getdoc(function)
    if not doc:
        refuse(f"{name} has no docstring, which the policy reads: {_EXAMPLE}")
    return _from_transformers(name, doc, visible, hints, refuse)


def _from_transformers(
    name: str,
    doc: str,
    parameters: Mapping[str, inspect.Parameter],
    hints: Mapping[str, Any],
    refuse: Callable[[str], NoReturn],
) -> Schema:
    from transformers.utils import get_json_schema
    from transformers.utils.chat_template_utils import DocstringParsingException, TypeHintParsingException

    def visible() -> None: ...

    visible.__name__, visible.__doc__ = name, doc
    visible.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
    visible.__annotations__ = {key: hint for key, hint in hints.items() if key in parameters}
    try:
        schema: Schema = get_json_schema(visible)
    except DocstringParsingException as error:
        refuse(f"{error}; {_EXAMPLE}")
    except (TypeHintParsingException, ValueError) as error:  # ValueError: (choices: ...) that are no JSON.
        refuse(f"{name}: {error}")
    if not schema["function"]["description"]:
        refuse(f"the docstring of {name} does not say what it does: {_EXAMPLE}")
    return schema


def _parameter_problem(function: str, parameter: inspect.Parameter, hint: Any) -> str:
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        return f"no schema can describe {parameter} of {function}: write each parameter, or a list"
    name = parameter.name
    if parameter.kind is parameter.POSITIONAL_ONLY:
        return f"{function} is called with keywords, but {name!r} is positional only"
    if hint is parameter.empty:
        return f"{name!r} of {function} has no type: write '{name}: str', or another one"
    for part in _parts(hint):
        if part not in _JSON_TYPES and not typing.is_typeddict(part):
            wrong = getattr(part, "__name__", part)
            remedy = "use int, float, str, bool, list, dict, Literal or None, alone or combined"
            return f"JSON has no {wrong}, the type of {name!r} of {function}: {remedy}"
    return ""


def _parts(hint: Any) -> Iterator[Any]:
    """The types that a type hint is made of; values of ``Literal`` are left out."""
    origin = get_origin(hint)
    if origin is None:
        yield hint
    elif origin is not Literal:
        if origin not in (Union, types.UnionType):
            yield origin
        for part in get_args(hint):
            if part is not ...:  # transformers has a message of its own for it.
                yield from _parts(part)


class ArgumentCheck:
    """What is wrong with the arguments that the policy wrote; nothing is converted.

    Args:
        schema: Of the function, from :func:`function_schema`.
    """

    def __init__(self, schema: Schema) -> None:
        self._function = tool_name(schema)
        parameters = schema["function"]["parameters"]
        self._required: list[str] = parameters.get("required", [])
        self._properties: dict[str, Schema] = parameters["properties"]

    def problem(self, arguments: Mapping[str, Any]) -> str | None:
        """A sentence for the policy; ``None``: the arguments fit."""
        takes = f"its arguments are: {', '.join(self._properties)}" if self._properties else "it has no arguments"
        for key in arguments:
            if key not in self._properties:
                return f"{self._function} has no argument {shortened(key, 80)!r}; {takes}"
        for key in self._required:
            if key not in arguments:
                return f"{self._function} needs the argument {key!r}; {takes}"
        for key, value in arguments.items():
            validator = _validator_class()(_with_null(self._properties[key]))
            for error in validator.iter_errors(value):
                return f"the argument {key!r} of {self._function} does not fit: {shortened(error.message, 300)}"
        return None


@functools.cache
def _validator_class() -> Any:
    from jsonschema import Draft202012Validator
    from jsonschema.validators import extend

    def is_integer(checker: Any, value: object) -> bool:  # By JSON Schema's own definition, 3.0 is one too.
        return isinstance(value, int) and not isinstance(value, bool)

    return extend(Draft202012Validator, type_checker=Draft202012Validator.TYPE_CHECKER.redefine("integer", is_integer))


def _with_null(schema: Schema) -> Schema:
    """The schema of a type, in which transformers' ``nullable`` is written the way JSON Schema does."""
    inner = dict(schema)
    for key in ("items", "additionalProperties"):
        if isinstance(inner.get(key), dict):
            inner[key] = _with_null(inner[key])
    for key in ("anyOf", "prefixItems"):
        if key in inner:
            inner[key] = [_with_null(item) for item in inner[key]]
    return {"anyOf": [inner, {"type": "null"}]} if inner.pop("nullable", False) else inner
