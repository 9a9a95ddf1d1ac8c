from __future__ import annotations

import copy
import functools
import json
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from environments.chat_templates import (
    CHATML,
    DEEPSEEK_R1,
    DEEPSEEK_V3,
    FALCON,
    GEMMA_2,
    GLM_4,
    LLAMA_2,
    LLAMA_3_1,
    MISTRAL_V3,
    PHI_3,
    QUICKSTART,
    QWEN_2_5,
    QWEN_3,
    QWEN_3_NO_THINKING,
    TEMPLATES,
    ZEPHYR,
    Template,
    byte_tokenizer,
)

from rlhf_ray.environments.dialogue import ChatFormat, Dialogue, HistoryRewritten, text_suffix_ids
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.types import ChatMessage

NO_TOOL_ROLE = {"llama-2", "mistral-v1", "gemma-2", "gemma-3", "phi-3", "phi-4", "zephyr", "vicuna", "olmo-2", "yi"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add numbers.",
            "parameters": {"type": "object", "properties": {"value": {"type": "string"}}},
        },
    }
]
USER = {"role": "user", "content": "1+1?"}
PIECES = ["", "4", "hello", " ", "\n", "\n\n", "\t", "é", "e\u0301", "日本", "🙂", "\u200d", "{{ x }}", "<b>", '"}}', "\\n"]


@functools.cache
def tokenizer_of(template: Template) -> Any:
    return byte_tokenizer(template)


@functools.cache
def format_of(template: Template) -> ChatFormat:
    return ChatFormat(tokenizer_of(template), arguments=dict(template.arguments))


def ids_of(template: Template, text: str) -> list[int]:
    return list(tokenizer_of(template)(text, add_special_tokens=False)["input_ids"])


def text_of(template: Template, ids: Sequence[int]) -> str:
    return str(tokenizer_of(template).decode(ids, clean_up_tokenization_spaces=False))


def own_rendering(template: Template, messages: list[ChatMessage], tools: Any = None, generate: bool = True) -> str:
    """By transformers alone."""
    return str(
        tokenizer_of(template).apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=generate, **dict(template.arguments)
        )
    )


@functools.cache
def end_of_prompt(template: Template) -> str:
    """What prompts end with after their last user message."""
    one, other = (own_rendering(template, [{"role": "user", "content": content}])[::-1] for content in "12")
    end = next(i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
    return text_of(template, ids_of(template, one[:end][::-1]))


def call(template: Template, value: str, name: str = "add", call_id: str = "a1b2c3d4e") -> ChatMessage:
    """A call of a tool, as this template takes it."""
    deepseek = template in (DEEPSEEK_V3, DEEPSEEK_R1)
    arguments: Any = {"value": value}
    function = {"name": name, "arguments": json.dumps(arguments) if deepseek else arguments}
    calls = [{"id": call_id, "type": "function", "function": function}]
    return {"role": "assistant", "content": None if deepseek else "", "tool_calls": calls}


# --- contract 1: random conversations by every template ---------------------------------------------------------------


class RandomWorld:
    """Plays a random conversation, and knows whether the template itself would have written the same."""

    def __init__(self, template: Template, seed: int, *, tools: bool) -> None:
        self.template = template
        self.random = random.Random(f"{template.name} {seed} {tools}")
        self.tools = TOOLS if tools else []
        self.exact = not template.rewrites
        messages = [{"role": "user", "content": self.content()}]
        if template.system and self.random.random() < 0.5:
            messages.insert(0, {"role": "system", "content": self.content()})
        self.dialogue = Dialogue(format_of(template), messages, self.tools)
        self.ids = self.dialogue.prompt_ids()
        assert self.ids == ids_of(template, own_rendering(template, messages, self.tools or None))

    def content(self) -> str:
        special = [*self.template.tokens, self.template.eos]
        pieces = self.random.choices(PIECES + special, k=self.random.randint(0, 6))
        return "".join(pieces)

    def turn(self) -> None:
        template, answer = self.template, self.answer()
        as_calls = bool(self.tools) and self.random.random() < 0.6
        message = call(template, answer) if as_calls else {"role": "assistant", "content": answer}
        new = self.observation(as_calls)
        sampled = self.sampled(message, new)
        before = list(self.ids)
        self.dialogue.add_sampled(sampled, message)
        suffix = self.dialogue.append(new)
        self.ids = [*before, *sampled, *suffix]
        if self.exact:
            whole = own_rendering(template, self.dialogue.messages, self.tools or None)
            assert text_of(template, self.ids) == text_of(template, ids_of(template, whole))
            assert self.ids == ids_of(template, whole)
        # In any case the new messages are there, and the generation prompt is the end.
        written = text_of(template, suffix)
        for said in new:
            assert text_of(template, ids_of(template, said["content"].strip())) in written
        if new[-1]["role"] == "user":
            assert written.endswith(end_of_prompt(template))

    def answer(self) -> str:
        text = "".join(self.random.choices(PIECES, k=self.random.randint(0, 6))).lstrip()
        return text.strip() if self.template.strips or self.tools else text

    def observation(self, as_calls: bool) -> list[ChatMessage]:
        if as_calls or (self.template.name not in NO_TOOL_ROLE | {"mistral-v3"} and self.random.random() < 0.4):
            count = 1 if as_calls else self.random.randint(1, 3)
            # The template of DeepSeek counts results over the whole chat; here each turn begins anew.
            self.exact &= not any(message["role"] == "tool" for message in self.dialogue.messages) or (
                self.template is not DEEPSEEK_V3
            )
            return [
                {"role": "tool", "name": "add", "tool_call_id": "a1b2c3d4e", "content": self.content()}
                for _ in range(count)
            ]
        # Mistral's moves the list of tools to the last user message, with which it rewrites history.
        self.exact &= not (self.template is MISTRAL_V3 and self.tools)
        return [{"role": "user", "content": self.content()}]

    def sampled(self, message: ChatMessage, new: list[ChatMessage]) -> list[int]:
        template = self.template
        stop = "<|observation|>" if template is GLM_4 and new[0]["role"] == "tool" else template.stop.strip()
        if message.get("tool_calls") and self.exact:
            history = self.dialogue.messages
            read = own_rendering(template, history, self.tools)
            written = own_rendering(template, [*history, message, *new], self.tools)
            assert written.startswith(read)
            body = written[len(read) :].partition(stop)[0]
        elif message.get("tool_calls"):
            body = "<tool_call>" + json.dumps(message["tool_calls"][0]["function"]) + "</tool_call>"
        else:
            after_results = template in (DEEPSEEK_V3, DEEPSEEK_R1) and self.dialogue.messages[-1]["role"] == "tool"
            body = ("" if after_results else template.lead) + message["content"]
            # A lone space, cut: the space before the answer, or the one behind it?
            self.exact &= not template.lead or message["content"] != ""
        how = self.random.choice(["stop", "stop", "cut", "other"])
        if how == "other":
            # Tokens that no template writes after an answer; it stays, and the turn ends behind it.
            self.exact = False
            stop = self.random.choice([*template.tokens, template.eos])
        if how == "stop" and template is LLAMA_2:
            stop = self.random.choice([" </s>", "</s>"])
            self.exact &= stop == " </s>"
        return ids_of(template, body + ("" if how == "cut" else stop))


def test_fixture_set() -> None:
    assert len({template.name for template in TEMPLATES}) == len(TEMPLATES) >= 20


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.name)
def test_random_conversations(template: Template) -> None:
    exact = 0
    for seed in range(30):
        world = RandomWorld(template, seed, tools=False)
        for _ in range(4):
            world.turn()
            exact += world.exact
    # Comparisons with the template's own rendering took place.
    assert (exact > 15) != template.rewrites


@pytest.mark.parametrize("template", [t for t in TEMPLATES if t.tools or t is DEEPSEEK_V3], ids=lambda t: t.name)
def test_random_conversations_with_tools(template: Template) -> None:
    exact = 0
    for seed in range(30):
        world = RandomWorld(template, seed, tools=True)
        for _ in range(4):
            world.turn()
            exact += world.exact
    assert (exact > 10) != template.rewrites
