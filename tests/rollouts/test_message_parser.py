"""What a model wrote as a message, by vLLM's own parsers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from environments.chat_templates import CHATML, byte_tokenizer

from rlhf_ray.errors import ConfigError
from rlhf_ray.rollouts.message_parser import MessageParser, check_parser
from rlhf_ray.types import ChatMessage

pytest.importorskip("vllm")

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add.",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
        },
    }
]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 37, "b": 58}}\n</tool_call>'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    thinking = (*CHATML.tokens, "<think>", "</think>", "<tool_call>", "</tool_call>", "<|python_tag|>")
    byte_tokenizer(replace(CHATML, tokens=thinking)).save_pretrained(path)
    return path


def parser_of(folder: Path, **parsers: str) -> MessageParser:
    names = {"tool_parser": None, "reasoning_parser": None, **parsers}
    spec: Any = SimpleNamespace(tokenizer_path=str(folder), engine_args={}, **names)
    parser = MessageParser.of(spec)
    assert parser is not None
    return parser


def message_of(parser: MessageParser, folder: Path, text: str, tools: str = json.dumps(TOOLS)) -> ChatMessage:
    from rlhf_ray.prompts.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(folder), trust_remote_code=False)
    return parser.message(tokenizer.encode(text, add_special_tokens=False), tools)


def calls_of(message: ChatMessage) -> list[tuple[str, Any]]:
    functions = [call["function"] for call in message.get("tool_calls", [])]
    return [(function["name"], json.loads(function["arguments"])) for function in functions]


def test_hermes_reads_calls_and_what_stands_before_them(folder: Path) -> None:
    parser = parser_of(folder, tool_parser="hermes")
    message = message_of(parser, folder, f"Let me see. {CALL}\n{CALL.replace('58', '1')}<|im_end|>")
    assert message["role"] == "assistant"
    assert message["content"].strip() == "Let me see."
    assert calls_of(message) == [("add", {"a": 37, "b": 58}), ("add", {"a": 37, "b": 1})]
    ids = [call["id"] for call in message["tool_calls"]]
    assert len(set(ids)) == 2
    again = message_of(parser, folder, f"Let me see. {CALL}\n{CALL.replace('58', '1')}<|im_end|>")
    assert again == message, "the same tokens are the same message, ids of calls included"


@pytest.mark.parametrize(
    "text",
    ["The sum is 95.", "", CALL.removesuffix("}\n</tool_call>"), '<tool_call>\n{"name": "add", "argu'],
    ids=["an answer", "nothing", "without its end", "cut"],
)
def test_what_is_no_whole_call_stays_text(folder: Path, text: str) -> None:
    message = message_of(parser_of(folder, tool_parser="hermes"), folder, text)
    assert calls_of(message) == []
    assert message["content"] == text


def test_llama_writes_json_alone(folder: Path) -> None:
    parser = parser_of(folder, tool_parser="llama3_json")
    message = message_of(parser, folder, '{"name": "add", "parameters": {"a": 1, "b": 2}}<|im_end|>')
    assert calls_of(message) == [("add", {"a": 1, "b": 2})]


def test_calls_are_found_where_the_prompt_named_no_tools(folder: Path) -> None:
    assert calls_of(message_of(parser_of(folder, tool_parser="hermes"), folder, CALL, tools="")) != []


def test_reasoning_is_apart_from_calls_and_from_answers(folder: Path) -> None:
    parser = parser_of(folder, tool_parser="hermes", reasoning_parser="qwen3")
    message = message_of(parser, folder, f"<think>\nI had better add.\n</think>\n\n{CALL}<|im_end|>")
    assert message["reasoning"].strip() == "I had better add."
    assert calls_of(message) == [("add", {"a": 37, "b": 58})]
    answer = message_of(parser_of(folder, reasoning_parser="qwen3"), folder, "<think>\nYes.\n</think>\n\n95<|im_end|>")
    assert (answer["reasoning"].strip(), answer["content"].strip()) == ("Yes.", "95")


def test_names_of_parsers_are_those_that_vllm_has(folder: Path) -> None:
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    for name in ToolParserManager.list_registered():
        check_parser("environment.tool_parser", name)
    for name in ReasoningParserManager.list_registered():
        check_parser("environment.reasoning_parser", name)
    with pytest.raises(ConfigError, match="hermes"):
        check_parser("environment.tool_parser", "hermess")
    assert MessageParser.of(SimpleNamespace(tool_parser=None, reasoning_parser=None)) is None  # type: ignore[arg-type]


def test_a_parser_that_misses_its_tokens_is_refused(tmp_path: Path) -> None:
    byte_tokenizer(CHATML).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"environment\.reasoning_parser"):
        message_of(parser_of(tmp_path, reasoning_parser="deepseek_r1"), tmp_path, "x")
