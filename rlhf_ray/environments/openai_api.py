"""The part of OpenAI's Chat Completions API that agents reach the policy through: requests in, responses out.

What a request asks for either works or is refused with an error that names the field. Nothing is dropped silently that
would change the answer; ``temperature``, ``top_p`` and ``seed`` are the run's, and a request that differs is logged. So
is one that demands a call or JSON: the policy reads the tools and the prompt, and learns what its agent makes of it.
"""

from __future__ import annotations

import functools
import json
import logging
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_ray.types import ChatMessage
from rlhf_ray.untrusted_text import shortened

__all__ = ["Answer", "ChatCall", "Offer", "Refused", "answer_of", "models", "parse_call", "shown_message"]

_logger = logging.getLogger(__name__)

_ROLES = ("system", "developer", "user", "assistant", "tool")
# These do not change what is sampled.
_WITHOUT_EFFECT = frozenset(
    {
        "metadata",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
_READ = frozenset(
    {
        "logprobs",
        "max_completion_tokens",
        "max_tokens",
        "messages",
        "model",
        "seed",
        "stop",
        "stream",
        "stream_options",
        "temperature",
        "tools",
        "top_p",
    }
)
# Field -> the values that can be served, and what to do instead.
_ONLY: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "audio": ((), "only text is generated"),
    "frequency_penalty": ((0,), "tokens are sampled from the policy's own distribution"),
    "function_call": (("none",), "use tools and tool_choice"),
    "functions": (([],), "use tools"),
    "logit_bias": (({},), "tokens are sampled from the policy's own distribution"),
    "modalities": ((["text"],), "only text is generated"),
    "n": ((1,), "send several requests, in parallel if you like"),
    "parallel_tool_calls": ((True,), "the policy may call several tools at once"),
    "prediction": ((), "leave it out"),
    "presence_penalty": ((0,), "tokens are sampled from the policy's own distribution"),
    "reasoning_effort": ((), "set data.chat_template_kwargs, if the chat template reads it"),
    "response_format": (({"type": "text"},), "decoding is not constrained, so the prompt must ask for the format"),
    "tool_choice": (("auto", "none"), "decoding is not constrained, so the policy decides whether it calls a tool"),
    "top_logprobs": ((0,), "only the sampled token's own log-probability is known"),
    "verbosity": ((), "ask for it in the prompt"),
    "web_search_options": ((), "give the search as a tool"),
}
# What the prompt says too: of tools the template writes the schemas, and this format has to be asked for in words.
_WISHES: Mapping[str, Any] = {"response_format": {"type": "json_object"}, "tool_choice": "required"}


class Refused(Exception):
    """A request that gets an error instead of an answer.

    Args:
        message: What is wrong, and what to do.
        param: The field.
        code: For programs.
        status: Of HTTP.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status

    @property
    def answer(self) -> Answer:
        """The error, as OpenAI's clients read it."""
        error = {"message": str(self), "type": "invalid_request_error", "param": self.param, "code": self.code}
        return Answer(body=json.dumps({"error": error}).encode(), status=self.status)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A response, for whatever transport carries it."""

    body: bytes
    status: int = 200
    content_type: str = "application/json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What requests may ask for."""

    model_name: str = "policy"
    """Listed under ``/models``; requests may have any name."""
    parses_tools: bool = False
    """Whether the engine reads calls of tools from what was sampled, and the chat template writes tools."""
    temperature: float = 1.0
    """What the run samples at: requests for another one are logged."""
    top_p: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ChatCall:
    """A request for a chat completion."""

    messages: list[ChatMessage]
    """Contents are texts; a developer's messages are the system's."""
    tools: list[dict[str, Any]]
    """Empty with ``tool_choice="none"``."""
    model: str
    max_tokens: int | None
    stop: tuple[str, ...]
    logprobs: bool
    stream: bool
    include_usage: bool
    """Whether a stream ends with the numbers of tokens."""

    @functools.cached_property
    def sort_key(self) -> str:
        """Orders the requests of a moment, whichever arrived first."""
        return json.dumps([self.messages, self.tools, self.max_tokens, self.stop], sort_keys=True)


# --- requests ---------------------------------------------------------------------------------------------------------


def parse_call(body: bytes, offer: Offer) -> ChatCall:
    """Read a request for a chat completion.

    Args:
        body: JSON.
        offer: What it may ask for.

    Raises:
        Refused: It is no request, or asks for something that is not offered.
    """
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as failure:
        raise Refused(f"the request is no JSON: {failure}") from failure
    if not isinstance(given, dict):
        raise Refused("the request must be a JSON object")
    given = {name: value for name, value in given.items() if value is not None}
    _check_fields(given, offer)
    limit = "max_completion_tokens" if "max_completion_tokens" in given else "max_tokens"
    return ChatCall(
        messages=_messages(given.get("messages")),
        tools=_tools(given, offer),
        model=str(given.get("model", offer.model_name)),
        max_tokens=_max_tokens(given.get(limit), limit),
        stop=_stop(given.get("stop")),
        logprobs=_flag(given, "logprobs"),
        stream=_flag(given, "stream"),
        include_usage=_include_usage(given.get("stream_options")),
    )


def _check_fields(given: Mapping[str, Any], offer: Offer) -> None:
    for name, value in given.items():
        if name in _ONLY:
            served, remedy = _ONLY[name]
            if value == _WISHES.get(name):
                _log_ignored(name, remedy)
            elif value not in served:
                raise Refused(f"{name} = {shortened(json.dumps(value), 80)} is not supported: {remedy}", param=name)
        elif name not in _READ and name not in _WITHOUT_EFFECT:
            raise Refused(f"{name} is not supported: leave it out", param=name)
    if given.get("temperature", offer.temperature) != offer.temperature:
        _log_ignored("temperature", "the policy is sampled at rollouts.temperature")
    if given.get("top_p", offer.top_p) != offer.top_p:
        _log_ignored("top_p", "the policy is sampled at rollouts.top_p")
    if "seed" in given:
        _log_ignored("seed", "it follows from the run's seed")


@functools.cache
def _log_ignored(name: str, reason: str) -> None:
    """Log once per process."""
    _logger.info("An agent's request sets %s, which is ignored: %s.", name, reason)


def _messages(given: Any) -> list[ChatMessage]:
    if not isinstance(given, list) or not given:
        raise Refused("messages must be a list of at least one message", param="messages")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(given)]


def _message(given: Any, where: str) -> ChatMessage:
    role = given.get("role") if isinstance(given, dict) else None
    if role not in _ROLES:
        raise Refused(f"{where}.role = {shortened(repr(role), 80)}: must be one of {', '.join(_ROLES)}", param=where)
    message = {key: value for key, value in given.items() if value is not None}
    message["role"] = "system" if role == "developer" else role
    message["content"] = _text(message.get("content"), where)
    if calls := message.pop("tool_calls", None):
        message["tool_calls"] = _tool_calls(calls, f"{where}.tool_calls")
    return message


def _text(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    for part in content if isinstance(content, list) else [content]:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise Refused(f"{where}.content has a part of type {kind!r}: only text is supported", param=where)
    # As vLLM joins them.
    return "\n".join(part["text"] for part in content)


def _tool_calls(given: Any, where: str) -> list[dict[str, Any]]:
    for call in given if isinstance(given, list) else [given]:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Refused(f"{where} must be a list of calls of functions", param=where)
    return list(given)


def _tools(given: Mapping[str, Any], offer: Offer) -> list[dict[str, Any]]:
    tools = given.get("tools")
    if not tools:
        return []
    for tool in tools if isinstance(tools, list) else [tools]:
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Refused("tools must be a list of tools of type 'function'", param="tools")
    if not offer.parses_tools:
        message = "tools are not supported in this run: set environment.tool_parser, and use a chat template with tools"
        raise Refused(message, param="tools")
    return [] if given.get("tool_choice") == "none" else list(tools)


def _max_tokens(given: Any, name: str) -> int | None:
    if given is not None and (not isinstance(given, int) or isinstance(given, bool) or given < 1):
        raise Refused(f"{name} = {shortened(repr(given), 80)}: must be a positive integer", param=name)
    return given


def _stop(given: Any) -> tuple[str, ...]:
    texts = [given] if isinstance(given, str) else ([] if given is None else given)
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise Refused("stop must be a text or a list of texts, none of them empty", param="stop")
    return tuple(texts)


def _flag(given: Mapping[str, Any], name: str) -> bool:
    value = given.get(name, False)
    if not isinstance(value, bool):
        raise Refused(f"{name} = {shortened(repr(value), 80)}: must be true or false", param=name)
    return value


def _include_usage(given: Any) -> bool:
    if given is not None and not isinstance(given, dict):
        raise Refused("stream_options must be an object", param="stream_options")
    return bool(given and given.get("include_usage"))


# --- responses --------------------------------------------------------------------------------------------------------


def models(offer: Offer) -> Answer:
    """The list of models: the policy."""
    model = {"id": offer.model_name, "object": "model", "created": 0, "owned_by": "rlhf_ray"}
    return Answer(body=json.dumps({"object": "list", "data": [model]}).encode())


def answer_of(
    call: ChatCall,
    message: ChatMessage,
    *,
    finish_reason: str,
    num_prompt_tokens: int,
    num_sampled_tokens: int,
    logprobs: Sequence[tuple[str, float]] = (),
) -> Answer:
    """The response to a request, whole or as a stream of events.

    Args:
        call: The request.
        message: What was sampled.
        finish_reason: ``stop`` or ``length``.
        num_prompt_tokens: Of all the tokens before.
        num_sampled_tokens: Stop tokens included.
        logprobs: Text and log-probability of each sampled token, where the request asks for them.
    """
    shown = shown_message(message)
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": call.model}
    reason = "tool_calls" if finish_reason == "stop" and "tool_calls" in shown else finish_reason
    usage = {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_sampled_tokens,
        "total_tokens": num_prompt_tokens + num_sampled_tokens,
    }
    found = {"content": [_logprob(*one) for one in logprobs]} if call.logprobs else None
    if call.stream:
        chunks = _chunks(shown, reason, found, usage if call.include_usage else None)
        events = [json.dumps({**head, "object": "chat.completion.chunk", **chunk}) for chunk in chunks]
        body = "".join(f"data: {event}\n\n" for event in [*events, "[DONE]"])
        return Answer(body=body.encode(), content_type="text/event-stream")
    choice = {"index": 0, "message": shown, "finish_reason": reason, "logprobs": found}
    completion = {**head, "object": "chat.completion", "choices": [choice], "usage": usage}
    return Answer(body=json.dumps(completion).encode())


def shown_message(message: ChatMessage) -> dict[str, Any]:
    """A sampled message as OpenAI's clients read it; reasoning is where vLLM's server has it."""
    shown: dict[str, Any] = {"role": "assistant", "content": message.get("content") or ""}
    if reasoning := message.get("reasoning"):
        shown["reasoning_content"] = reasoning
    if calls := message.get("tool_calls"):
        shown["content"] = shown["content"] or None
        shown["tool_calls"] = [_shown_call(call) for call in calls]
    return shown


def _shown_call(call: Mapping[str, Any]) -> dict[str, Any]:
    arguments = call["function"].get("arguments", "{}")
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {"id": call["id"], "type": "function", "function": {"name": call["function"]["name"], "arguments": text}}


def _logprob(token: str, logprob: float) -> dict[str, Any]:
    # A token may be part of a character, whose bytes its text does not tell.
    whole = "\ufffd" not in token
    return {"token": token, "logprob": logprob, "bytes": list(token.encode()) if whole else None, "top_logprobs": []}


def _chunks(
    shown: Mapping[str, Any], reason: str, logprobs: dict[str, Any] | None, usage: dict[str, int] | None
) -> Iterator[dict[str, Any]]:
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    if "reasoning_content" in shown:
        deltas.append({"reasoning_content": shown["reasoning_content"]})
    if shown["content"]:
        deltas.append({"content": shown["content"]})
    for index, call in enumerate(shown.get("tool_calls", ())):
        deltas.append({"tool_calls": [{"index": index, **call}]})
    for delta in deltas:
        yield {"choices": [{"index": 0, "delta": delta, "finish_reason": None, "logprobs": None}]}
    yield {"choices": [{"index": 0, "delta": {}, "finish_reason": reason, "logprobs": logprobs}]}
    if usage is not None:
        yield {"choices": [], "usage": usage}
