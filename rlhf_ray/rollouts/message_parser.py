"""Reads what a model wrote as a chat message: its reasoning, its content, its calls of tools.

By vLLM's parsers, in the replica, where they cost nothing to import: anywhere else they take seconds and 600 MB.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rlhf_ray.config.user_code import nearest
from rlhf_ray.errors import ConfigError
from rlhf_ray.types import ChatMessage

if TYPE_CHECKING:
    from rlhf_ray.rollouts.engine import EngineSpec

__all__ = ["MessageParser", "check_parser"]

_TABLES = {
    "environment.tool_parser": ("tool_parsers", "_TOOL_PARSERS_TO_REGISTER"),
    "environment.reasoning_parser": ("reasoning", "_REASONING_PARSERS_TO_REGISTER"),
}
_ANY_TOOL = {"type": "function", "function": {"name": "any", "parameters": {"type": "object"}}}


class MessageParser:
    """A parser of one engine.

    Args:
        parser_class: vLLM's, of tool calls, reasoning, or both.
        tokenizer: The model's.
    """

    def __init__(self, parser_class: Any, tokenizer: Any) -> None:
        self._class = parser_class
        self._tokenizer = tokenizer
        self._requests: dict[str, Any] = {}

    @classmethod
    def of(cls, spec: EngineSpec) -> Self | None:
        """The parser that an engine's spec names; ``None`` where it names none.

        Raises:
            ConfigError: vLLM has no such parser, or it cannot work with the tokenizer.
        """
        if spec.tool_parser is None and spec.reasoning_parser is None:
            return None
        from vllm.parser import ParserManager

        from rlhf_ray.prompts.tokenizer import load_tokenizer

        trust = bool(spec.engine_args.get("trust_remote_code"))
        tokenizer = load_tokenizer(spec.tokenizer_path, trust_remote_code=trust)
        try:
            parser_class = ParserManager.get_parser(
                tool_parser_name=spec.tool_parser,
                reasoning_parser_name=spec.reasoning_parser,
                enable_auto_tools=True,
                tokenizer=tokenizer,
            )
        except Exception as error:  # TypeError and whatever a parser raises that misses its special tokens.
            field = "environment.tool_parser" if spec.tool_parser else "environment.reasoning_parser"
            raise ConfigError(field, spec.tool_parser or spec.reasoning_parser, str(error)) from error
        return cls(parser_class, tokenizer)

    def message(self, token_ids: list[int], tools: str = "") -> ChatMessage:
        """What was sampled as a message: ``role``, ``content``, and ``reasoning`` and ``tool_calls`` where there are.

        Args:
            token_ids: ``[T]``, as sampled.
            tools: JSON of the schemas that the prompt named: some parsers take the types of arguments from them.
        """
        ends = {self._tokenizer.eos_token_id, self._tokenizer.pad_token_id}
        while token_ids and token_ids[-1] in ends:
            token_ids = token_ids[:-1]
        text = self._tokenizer.decode(token_ids, skip_special_tokens=False)
        # Parsers keep state, and some their request's: a new one for each message.
        request = self._request(tools).model_copy(deep=True)
        parser = self._class(self._tokenizer, request.tools)
        reasoning, content, calls = parser.parse(
            text, request, enable_auto_tools=True, model_output_token_ids=token_ids
        )
        message: ChatMessage = {"role": "assistant", "content": content or ""}
        if reasoning:
            message["reasoning"] = reasoning
        if calls:
            message["tool_calls"] = [
                {
                    # One that the model did not write is random, and some templates write it.
                    "id": call.id if call.id and call.id in text else _call_id(token_ids, index),
                    "type": "function",
                    "function": {"name": call.name, "arguments": _as_text(call.arguments)},
                }
                for index, call in enumerate(calls)
            ]
        return message

    def _request(self, tools: str) -> Any:
        if tools not in self._requests:
            from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

            reads_tools = self._class.tool_parser_cls is not None
            self._requests[tools] = ChatCompletionRequest(
                messages=[],
                # Without any, parsers look for no calls.
                tools=(json.loads(tools) if tools else [_ANY_TOOL]) if reads_tools else None,
                tool_choice="auto" if reads_tools else "none",
                # Markers of calls may be special tokens.
                skip_special_tokens=False,
            )
        return self._requests[tools]


def check_parser(field: str, name: str) -> None:
    """Check that vLLM has a parser of this name, without importing it, which takes seconds.

    Raises:
        ConfigError: It has none.
    """
    known = _names(*_TABLES[field])
    if known and name not in known:
        hint = nearest(name, known) or f"; there are {', '.join(sorted(known))}"
        raise ConfigError(field, name, f"the installed vLLM has no such parser{hint}")


@cache
def _names(package: str, table: str) -> frozenset[str]:
    """The keys of the table that vLLM registers its parsers from; none where it cannot be read."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        return frozenset()
    try:
        tree = ast.parse((Path(spec.origin).parent / package / "__init__.py").read_text(encoding="utf-8"))
    except (OSError, SyntaxError):
        return frozenset()
    assigned = [node for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == table]
    keys = [key for node in assigned if isinstance(node.value, ast.Dict) for key in node.value.keys]
    return frozenset(key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str))


def _call_id(token_ids: list[int], index: int) -> str:
    """Nine letters and digits, as Mistral's template demands, the same for the same tokens."""
    return hashlib.blake2b(f"{token_ids}/{index}".encode()).hexdigest()[:9]


def _as_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
