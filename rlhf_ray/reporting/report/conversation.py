"""A trajectory of several turns as the page reads it: which tokens are of which turn, and what its messages said."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

from rlhf_ray.reporting.report.page import rounded

__all__ = ["conversation", "is_conversation"]

Message: TypeAlias = Mapping[str, Any]

_TOKEN_LISTS = ("sequence", "turn", "sampled")
_MAX_CALLS = 16
"""Of one turn."""
_MAX_CHARACTERS = 1000
"""Of the arguments of a tool call; its tokens are in the page too."""


def is_conversation(row: Mapping[str, Any]) -> bool:
    """Whether a row of a table has more than one turn, or observed tokens; never one of an old or damaged table."""
    texts, lists = row.get("token_texts"), [row.get(name) for name in _TOKEN_LISTS]
    if texts is None or any(one is None or len(one) != len(texts) for one in lists):
        return False
    return not all(row["sampled"]) or len(row.get("turn_rewards") or ()) > 1


def conversation(row: Mapping[str, Any], kept: Callable[[list[Any]], list[Any]]) -> dict[str, Any]:
    """The segments of a row, each sampled in one turn or observed after it, and its turns.

    Args:
        row: Of a table; :func:`is_conversation`.
        kept: Takes those entries of a list per token that the page shows.
    """
    places = list(zip(*(kept(row[name]) for name in _TOKEN_LISTS), strict=True))
    segments, start = [], 0
    for (sequence, turn, sampled), tokens in itertools.groupby(places):
        segments.append({"start": start, "sequence": sequence, "turn": turn, "observed": not sampled})
        start += len(list(tokens))
    said = _messages(row)
    rewards = row.get("turn_rewards") or []
    shown = sorted({segment["turn"] for segment in segments} & set(range(len(rewards))))
    return {
        "numTurns": len(rewards),
        "numObserved": row["sampled"].count(False),
        "segments": segments,
        "turns": {str(turn): {"reward": rounded(rewards[turn]), **_said(said[turn])} for turn in shown},
        "furtherPrompts": [len(prompt) for prompt in row.get("further_prompts") or ()],
    }


def _messages(row: Mapping[str, Any]) -> defaultdict[int, list[Message]]:
    """Turn -> its messages; empty where they cannot be read."""
    said: defaultdict[int, list[Message]] = defaultdict(list)
    try:
        chat = json.loads(row.get("messages") or "[]")
    # A policy can nest the arguments of a call as deep as it likes.
    except (ValueError, RecursionError):
        return said
    turns = row.get("message_turns") or []
    if isinstance(chat, list) and len(chat) == len(turns):
        for turn, message in zip(turns, chat, strict=True):
            if isinstance(message, dict):
                said[turn].append(message)
    return said


def _said(messages: list[Message]) -> dict[str, Any]:
    """Tool calls of the assistant's message, which is the first, and who answered."""
    own = next((message for message in messages[:1] if message.get("role") == "assistant"), None)
    others = messages if own is None else messages[1:]
    calls = list(itertools.islice(_calls(own or {}), _MAX_CALLS))
    roles = list(dict.fromkeys(str(message.get("role", "")) for message in others))
    return ({"calls": calls} if calls else {}) | ({"roles": roles} if roles else {})


def _calls(message: Message) -> Iterator[dict[str, str]]:
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict):
            given = function.get("arguments", "")
            text = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
            cut = text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]} [...]"
            yield {"name": str(function.get("name", ""))[:_MAX_CHARACTERS], "arguments": cut}
