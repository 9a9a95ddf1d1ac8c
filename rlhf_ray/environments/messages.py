"""Chat messages as users, clients and parsers write them: their content, reasoning and calls, in one form."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rlhf_ray.errors import DataError
from rlhf_ray.types import ChatMessage
from rlhf_ray.untrusted_text import shortened

__all__ = [
    "REASONING_KEYS",
    "CallStyle",
    "calls_of",
    "canonical_arguments",
    "content_text",
    "prepared_call",
    "reasoning_text",
    "short_id",
]

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_SHORT_ID = re.compile(r"[a-zA-Z0-9]{9}")


class CallStyle(NamedTuple):
    """How a template takes calls of tools."""

    content: str | None
    """In place of an empty content."""
    arguments_as_text: bool
    """As JSON text; else as a mapping."""
    short_ids: bool
    """Whether ids must be nine letters and digits."""


def content_text(message: ChatMessage) -> str:
    """The content as text: parts of a text are joined by newlines, as vLLM does.

    Raises:
        DataError: It is neither text nor a list of texts.
    """
    content = message.get("content")
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, (list, tuple)) and all(
        isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in content
    ):
        return "\n".join(part["text"] for part in content)
    raise DataError(f"'content' of a chat message is {shortened(repr(content), 200)}; it must be text")


def reasoning_text(message: ChatMessage) -> str:
    """The reasoning, under whatever key; empty if there is none.

    Raises:
        DataError: It is no text.
    """
    found = next((message[key] for key in REASONING_KEYS if message.get(key)), "")
    if not isinstance(found, str):
        raise DataError(f"the reasoning of a chat message is {shortened(repr(found), 200)}; it must be text")
    return found


def calls_of(message: ChatMessage) -> Sequence[Mapping[str, Any]]:
    """The calls of tools; empty if there are none.

    Raises:
        DataError: They are no list of calls of functions.
    """
    calls = message.get("tool_calls")
    if not calls:
        return ()
    if not isinstance(calls, (list, tuple)) or not all(map(_is_call, calls)):
        given = shortened(repr(calls), 200)
        raise DataError(f"'tool_calls' of a chat message is {given}; it must be a list of function calls")
    return calls


def _is_call(call: Any) -> bool:
    function = call.get("function") if isinstance(call, Mapping) else None
    return isinstance(function, Mapping) and isinstance(function.get("name"), str)


def prepared_call(call: Mapping[str, Any], style: CallStyle | None) -> dict[str, Any]:
    """A call as a template takes it; arguments that are no JSON object stay as they were written."""
    arguments = call["function"].get("arguments")
    if isinstance(arguments, str):
        loaded = _loaded(arguments)
        arguments = loaded if isinstance(loaded, dict) else arguments
    if style and style.arguments_as_text and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    function = {**call["function"], "arguments": {} if arguments is None else arguments}
    made = {"type": "function", **call, "function": function}
    if style and style.short_ids and made.get("id") is not None:
        made["id"] = short_id(made["id"])
    return made


def short_id(given: object) -> str:
    """An id of nine letters and digits, always the same for the same id."""
    text = str(given)
    return text if _SHORT_ID.fullmatch(text) else hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:9]


def _loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def canonical_arguments(arguments: Any) -> str:
    """Arguments of a call in one spelling, whether they are JSON text or a mapping."""
    loaded = _loaded(arguments) if isinstance(arguments, str) else arguments
    return str(arguments) if loaded is None else json.dumps(loaded, sort_keys=True, default=str)
