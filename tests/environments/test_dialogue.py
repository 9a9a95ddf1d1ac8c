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
PIECES = [
    "",
    "4",
    "hello",
    " ",
    "\n",
    "\n\n",
    "\t",
    "é",
    "e\u0301",
    "日本",
    "🙂",
    "\u200d",
    "{{ x }}",
    "<b>",
    '"}}',
    "\\n",
]


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


# --- the end of a turn ------------------------------------------------------------------------------------------------


def suffix(template: Template, said: str, new: list[ChatMessage] | None = None, content: str = "4") -> str:
    message = {"role": "assistant", "content": content}
    new = [{"role": "user", "content": "ok?"}] if new is None else new
    return text_of(template, format_of(template).suffix_ids(message, ids_of(template, said), new))


@pytest.mark.parametrize(
    ("template", "said", "rest"),
    [
        (CHATML, "4<|im_end|>", "\n<|im_start|>user\nok?<|im_end|>\n<|im_start|>assistant\n"),
        # Cut by a limit: the end is added. Sampled beyond the end: nothing is repeated.
        (CHATML, "4", "<|im_end|>\n<|im_start|>user\nok?<|im_end|>\n<|im_start|>assistant\n"),
        (CHATML, "4<|im_end|>\n", "<|im_start|>user\nok?<|im_end|>\n<|im_start|>assistant\n"),
        (CHATML, "4<|im_end|>\n<|im_start|>", "user\nok?<|im_end|>\n<|im_start|>assistant\n"),
        (CHATML, "", "<|im_end|>\n<|im_start|>user\nok?<|im_end|>\n<|im_start|>assistant\n"),
        # Another stop token stays, and the turn ends behind it.
        (CHATML, "4<s>", "<|im_end|>\n<|im_start|>user\nok?<|im_end|>\n<|im_start|>assistant\n"),
        (LLAMA_2, " 4 </s>", "<s>[INST] ok? [/INST]"),
        (LLAMA_2, "4</s>", "<s>[INST] ok? [/INST]"),
        (LLAMA_2, "4 ", "</s><s>[INST] ok? [/INST]"),
        # The newline behind these tokens is none of their text.
        (PHI_3, "4<|end|>", "<|user|>ok?<|end|><|assistant|>"),
        # The next message's first token ends the turn.
        (GLM_4, "4<|user|>", "\nok?<|assistant|>\n"),
        (GLM_4, "4", "<|user|>\nok?<|assistant|>\n"),
        (GLM_4, "4<|observation|>", "<|user|>\nok?<|assistant|>\n"),
        # No token ends a turn; a stop string may have been sampled, whole or in part.
        (FALCON, " 4", "\nUser: ok?\nFalcon:"),
        (FALCON, " 4\n", "User: ok?\nFalcon:"),
        (FALCON, " 4\nUser:", " ok?\nFalcon:"),
        (FALCON, " 4<|endoftext|>", "\nUser: ok?\nFalcon:"),
        (QUICKSTART, "4<eos>", "\nuser: ok?\nassistant: "),
    ],
)
def test_end_of_turn_is_written_once(template: Template, said: str, rest: str) -> None:
    assert suffix(template, said) == rest


def test_newline_of_the_answer_is_not_the_end_of_the_turn() -> None:
    assert suffix(FALCON, " 4\n", content=" 4\n") == "\nUser: ok?\nFalcon:"
    assert suffix(FALCON, " 4\n\n", content=" 4\n") == "User: ok?\nFalcon:"
    template = Template(
        "lines",
        "{% for m in messages %}{{ m.content | trim }}\n\n{% endfor %}{% if add_generation_prompt %}> {% endif %}",
        "",
        strips=True,
    )
    assert suffix(template, "4\n", content="4\n") == "\nok?\n\n> "


def test_spelled_special_token_is_no_end() -> None:
    tokenizer = tokenizer_of(CHATML)
    spelled = [byte for part in ("4<|im_", "end|>") for byte in ids_of(CHATML, part)]
    assert tokenizer.decode(spelled) == "4<|im_end|>"
    ids = format_of(CHATML).suffix_ids({"role": "assistant", "content": "4"}, spelled, [USER])
    assert text_of(CHATML, ids).startswith("<|im_end|>\n<|im_start|>user")
    # Also behind a real one.
    again = format_of(CHATML).suffix_ids(
        {"role": "assistant", "content": "4"}, [ids_of(CHATML, "<|im_end|>")[0], *spelled], [USER]
    )
    assert again == ids


def test_marks_in_new_messages_are_text() -> None:
    from rlhf_ray.environments import chat_format

    said = chat_format._ANSWER * 2 + chat_format._TOLD.format(0)
    rest = suffix(CHATML, "4", [{"role": "user", "content": said}])
    assert rest == f"<|im_end|>\n<|im_start|>user\n{said}<|im_end|>\n<|im_start|>assistant\n"


def test_header_that_depends_on_the_content() -> None:
    text = FALCON.text.replace("message['role'] == 'user'", "message['role'] == 'user' and message['content']")
    assert suffix(Template("shy", text, ""), "4\nUser:", [{"role": "user", "content": ""}]) == "\n\nFalcon:"


def test_no_new_messages_leave_the_turn_open() -> None:
    dialogue = Dialogue(format_of(CHATML), [USER])
    dialogue.add_sampled(ids_of(CHATML, "4"), {"role": "assistant", "content": "4"})
    assert dialogue.append([]) == []
    assert dialogue.append([USER]) != []


# --- tools ------------------------------------------------------------------------------------------------------------


def test_consecutive_results_share_a_turn() -> None:
    results = [{"role": "tool", "content": content} for content in ("a", "", "b")]
    rest = suffix(QWEN_2_5, "4<|im_end|>", results)
    inner = "".join(f"\n<tool_response>\n{content}\n</tool_response>" for content in ("a", "", "b"))
    assert rest == f"\n<|im_start|>user{inner}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("arguments", ['{"value": "1"}', {"value": "1"}, "{broken", "", None])
def test_calls_with_any_arguments_and_ids(arguments: Any) -> None:
    function = {"name": "add", "arguments": arguments}
    for call_id in ("chatcmpl-tool-0123456789abcdef", None):
        asked = {"role": "assistant", "tool_calls": [{"id": call_id, "type": "function", "function": function}]}
        result = {"role": "tool", "tool_call_id": "chatcmpl-tool-0123456789abcdef", "content": "2"}
        for template in (MISTRAL_V3, QWEN_2_5, DEEPSEEK_V3, LLAMA_3_1, GLM_4):
            ids = format_of(template).suffix_ids(asked, ids_of(template, template.stop), [result], TOOLS)
            assert "2" in text_of(template, ids)


@pytest.mark.parametrize(("end", "at_the_end"), [("\n", ""), ("</s>\n", "<s>"), ("</s>\n", ""), ("", "")])
def test_end_of_a_call(end: str, at_the_end: str) -> None:
    text = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{% for c in m.tool_calls %}"
        "[{{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}END{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% else %}LAST{% endif %}"
    )
    text = text.replace("END", f"{{{{ {end!r} }}}}").replace("LAST", at_the_end)
    template = Template("calls", text, end)
    result = {"role": "tool", "tool_call_id": "a1b2c3d4e", "content": "2"}
    said = '[add {"value": "1"}]'
    for sampled, rest in ((said, end), (said + end, ""), (said + end.strip(), end[len(end.strip()) :])):
        ids = format_of(template).suffix_ids(call(template, "1"), ids_of(template, sampled), [result])
        assert text_of(template, ids) == f"{rest}tool: 2{end}assistant: "


def test_two_calls_of_a_template_that_writes_one() -> None:
    asked = call(LLAMA_3_1, "1")
    asked["tool_calls"] *= 2
    results = [{"role": "tool", "tool_call_id": "a1b2c3d4e", "content": content} for content in "12"]
    rest = text_of(LLAMA_3_1, format_of(LLAMA_3_1).suffix_ids(asked, [], results))
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    written = "".join(f"<|eot_id|>{header.format('ipython')}{content}" for content in "12")
    assert rest == f"{written}<|eot_id|>{header.format('assistant')}"


def test_tools_are_not_repeated() -> None:
    new = [{"role": "user", "content": "ok?"}]
    message = {"role": "assistant", "content": "4"}
    for template in (MISTRAL_V3, LLAMA_3_1, QWEN_2_5):
        chat = format_of(template)
        assert chat.suffix_ids(message, [], new, TOOLS) == chat.suffix_ids(message, [], new)


def test_template_that_needs_calls_before_a_result() -> None:
    text = (
        "{% for m in messages %}{% if m.role == 'tool' %}{% if not messages[loop.index0 - 1].tool_calls %}"
        "{{ raise_exception('a result without a call') }}{% endif %}({{ messages[loop.index0 - 1].tool_calls[0].id }}) "
        "{% endif %}{{ m.role }}: {{ m.content }}{% for c in m.tool_calls %}[{{ c.function.arguments.value }}]"
        "{% endfor %}</s>\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    template = Template("needs-calls", text, "</s>")
    result = [{"role": "tool", "tool_call_id": "x7", "content": "2"}]
    for message in (call(template, "1", call_id="x7"), {"role": "assistant", "content": "<call>"}):
        rest = format_of(template).suffix_ids(message, ids_of(template, "</s>"), result)
        assert text_of(template, rest) == "\n(x7) tool: 2</s>\nassistant: "


def test_template_for_tools_of_its_own() -> None:
    tokenizer = byte_tokenizer(CHATML)
    tokenizer.chat_template = {"default": CHATML.text, "tool_use": QWEN_2_5.text}
    chat = ChatFormat(tokenizer)
    assert chat.supports_tools()
    result = [{"role": "tool", "content": "2"}]
    with_tools = tokenizer.decode(chat.suffix_ids({"role": "assistant", "content": ""}, [], result, TOOLS))
    assert "<tool_response>" in with_tools
    assert "<tool_response>" not in tokenizer.decode(chat.suffix_ids({"role": "assistant", "content": ""}, [], result))


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.name)
def test_tools_are_checked_at_the_start(template: Template) -> None:
    chat = format_of(template)
    # SmolLM 3 reads the tools and writes results, but no calls.
    assert chat.supports_tools() == (template.tools or template.name == "smollm-3")
    if chat.supports_tools():
        chat.check_tools(TOOLS)
        return
    with pytest.raises(ConfigError) as caught:
        chat.check_tools(TOOLS)
    assert caught.value.field == "data.chat_template"
    assert "does not read `tools`" in caught.value.remedy


def test_calls_that_the_template_does_not_write() -> None:
    (template,) = (template for template in TEMPLATES if template.name == "smollm-3")
    dialogue = Dialogue(format_of(template), [USER], TOOLS)
    asked = call(template, "1")
    dialogue.add_sampled(ids_of(template, "call<|im_end|>"), asked)
    assert dialogue.append([RESULT])
    with pytest.raises(DataError, match="does not write calls of tools"):
        dialogue.prompt_ids()
    dialogue.add_sampled([], {"role": "assistant", "content": "4"})
    with pytest.raises(DataError, match="does not write calls of tools"):
        dialogue.append([asked, RESULT])


def test_template_that_drops_results_is_refused_for_tools() -> None:
    text = QWEN_2_5.text.replace('message.role == "tool"', 'message.role == "result"')
    with pytest.raises(ConfigError, match="leaves out what the role 'tool' says"):
        ChatFormat(byte_tokenizer(QWEN_2_5), template=text).check_tools(TOOLS)


# --- history that a template rewrites ---------------------------------------------------------------------------------


def reasoned(template: Template, tools: Any = (), **settings: Any) -> Dialogue:
    dialogue = Dialogue(format_of(template), [USER], tools, **settings)
    message = {"role": "assistant", "reasoning": "let me think", "content": "4"}
    dialogue.add_sampled(ids_of(template, "<think>\nlet me think\n</think>\n\n4<|im_end|>"), message)
    return dialogue


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.name)
def test_dropped_reasoning_is_detected(template: Template) -> None:
    new = [{"role": "user", "content": "ok?"}]
    assert reasoned(template).append(new)
    dialogue = reasoned(template, keep_reasoning=False)
    if not template.drops_reasoning:
        assert dialogue.append(new) == reasoned(template).append(new)
        return
    with pytest.raises(HistoryRewritten):
        dialogue.append(new)
    assert dialogue.messages[-1] == new[0]
    plain = [USER, {"role": "assistant", "content": "4"}, *new]
    assert dialogue.prompt_ids() == ids_of(template, own_rendering(template, plain))
    assert "let me think" not in text_of(template, dialogue.prompt_ids())


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.name)
def test_rewritten_plain_answers_are_detected(template: Template) -> None:
    for tools in ((), TOOLS) if template.tools else ((),):
        dialogue = Dialogue(format_of(template), [USER], tools, keep_reasoning=False)
        dialogue.add_sampled(ids_of(template, "4"), {"role": "assistant", "content": "4"})
        if template.rewrites or (tools and template is MISTRAL_V3):
            with pytest.raises(HistoryRewritten):
                dialogue.append([{"role": "user", "content": "ok?"}])
        else:
            assert dialogue.append([{"role": "user", "content": "ok?"}])


def test_reasoning_of_a_tool_loop_stays() -> None:
    dialogue = reasoned(QWEN_3, keep_reasoning=False)
    result = {"role": "tool", "content": "2"}
    assert dialogue.append([result])
    dialogue.add_sampled([], {"role": "assistant", "reasoning": "more", "content": "6"})
    with pytest.raises(HistoryRewritten):
        dialogue.append([USER])


def test_prompt_has_the_reasoning_where_the_template_keeps_it() -> None:
    messages = [
        USER,
        {"role": "assistant", "reasoning": "let me think", "content": "4"},
        {"role": "tool", "content": "2"},
    ]
    text = text_of(QWEN_3, format_of(QWEN_3).prompt_ids(messages))
    assert "<think>\nlet me think\n</think>\n\n4<|im_end|>" in text
    assert "let me think" not in text_of(CHATML, format_of(CHATML).prompt_ids(messages))


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_prompt_that_ends_in_an_answer_is_continued() -> None:
    dialogue = Dialogue(format_of(CHATML), [USER, {"role": "assistant", "content": "It is"}])
    ids = dialogue.prompt_ids()
    assert text_of(CHATML, ids).endswith("assistant\nIt is")
    sampled = ids_of(CHATML, " 4<|im_end|>")
    dialogue.add_sampled(sampled, {"role": "assistant", "content": " 4"})
    assert dialogue.messages[-1] == {"role": "assistant", "content": "It is 4"}
    ids += sampled + dialogue.append([USER])
    assert ids == ids_of(CHATML, own_rendering(CHATML, dialogue.messages))


def test_variables_and_template_of_the_settings() -> None:
    chat = ChatFormat(tokenizer_of(CHATML), template=QWEN_3.text, arguments={"enable_thinking": False, "tools": TOOLS})
    text = text_of(CHATML, chat.prompt_ids([USER]))
    assert text.endswith("<think>\n\n</think>\n\n") and '"name": "add"' in text


def test_messages_are_copies() -> None:
    messages, tools = [{"role": "user", "content": "1"}], [{"type": "function", "function": {"name": "f"}}]
    message: ChatMessage = call(QWEN_2_5, "1")
    new = [{"role": "tool", "content": "2"}]
    dialogue = Dialogue(format_of(QWEN_2_5), messages, tools)
    dialogue.add_sampled(np.array([4, 5], dtype=np.int32), message)
    dialogue.append(new)
    recorded = copy.deepcopy(dialogue.messages)
    messages[0]["content"] = new[0]["content"] = "changed"
    message["tool_calls"][0]["function"]["name"] = "changed"
    tools[0]["function"] = {}
    assert dialogue.messages == recorded and dialogue.tools[0]["function"] == {"name": "f"}
    further = [{"role": "user", "content": "3"}]
    extension = dialogue.extension([*recorded, *further], [{"type": "function", "function": {"name": "f"}}])
    assert extension == further and extension[0] is not further[0]


def test_text_parts_are_text() -> None:
    parts = [{"type": "text", "text": "1"}, {"type": "text", "text": "2"}]
    chat = format_of(CHATML)
    assert chat.prompt_ids([{"role": "user", "content": parts}]) == chat.prompt_ids(
        [{"role": "user", "content": "1\n2"}]
    )


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "new", "reason"),
    [
        (LLAMA_2, [{"role": "tool", "content": "2"}], "must alternate"),
        (GEMMA_2, [USER, USER], "must alternate"),
        (ZEPHYR, [{"role": "tool", "content": "2"}], "leaves out what the role 'tool' says"),
        (LLAMA_3_1, [{"role": "user", "content": "\ud800"}], "lone surrogate"),
        (CHATML, [{"role": "user", "content": 4}], "must be text"),
        (CHATML, [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "must be text"),
        (CHATML, [{"content": "4"}], "must hold 'role'"),
        (CHATML, ["hello"], "must hold 'role'"),
        (CHATML, [{"role": "assistant", "tool_calls": [{"name": "f"}]}], "list of function calls"),
        (CHATML, [{"role": "assistant", "content": "", "reasoning": 4}], "must be text"),
    ],
)
def test_refused_messages(template: Template, new: list[Any], reason: str) -> None:
    dialogue = Dialogue(format_of(template), [USER])
    dialogue.add_sampled([], {"role": "assistant", "content": "4"})
    with pytest.raises(DataError, match=reason):
        dialogue.append(new)
    # Nothing was added.
    assert len(dialogue.messages) == 2 and dialogue.append([{"role": "user", "content": "ok?"}])


def test_refused_prompts() -> None:
    with pytest.raises(DataError, match="the tokenizer's chat template refused the prompt: System role not supported"):
        format_of(GEMMA_2).prompt_ids([{"role": "system", "content": ""}, USER])
    with pytest.raises(DataError, match="lone surrogate"):
        format_of(CHATML).prompt_ids([{"role": "user", "content": "\udc00"}])
    chat = ChatFormat(tokenizer_of(CHATML), template=LLAMA_2.text)
    with pytest.raises(DataError, match=r"data\.chat_template refused the prompt"):
        chat.prompt_ids([USER, USER])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{{ raise_exception('never') }}{{ messages }}", "refused a user's message after an answer: never"),
        ("{{ messages[0].content }}", "leaves the answer out"),
        ("{% for m in messages[:2] %}{{ m.content }}{% endfor %}", "leaves out what the role 'user' says"),
        ("{% for m in messages %}{{ loop.index }}. {{ m.content }}{% endfor %}", "as if it numbered them"),
        ("{% for m in messages %}", "is no Jinja template"),
    ],
)
def test_unusable_templates(text: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ChatFormat(tokenizer_of(CHATML), template=text)
    assert caught.value.field == "data.chat_template" and reason in caught.value.remedy


def test_tokenizer_without_template() -> None:
    tokenizer = byte_tokenizer(CHATML)
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        ChatFormat(tokenizer)


def test_append_needs_an_answer() -> None:
    dialogue = Dialogue(format_of(CHATML), [USER])
    with pytest.raises(ValueError, match="no answer"):
        dialogue.append([USER])
    dialogue.add_sampled([1], {"role": "assistant", "content": "4"})
    dialogue.append([USER])
    with pytest.raises(ValueError, match="no answer"):
        dialogue.append([USER])


# --- chats that come back ---------------------------------------------------------------------------------------------

CALLED = {
    "role": "assistant",
    "content": None,
    "reasoning": "let me think",
    "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": "é"}'}}],
}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "2"}


def recorded() -> Dialogue:
    dialogue = Dialogue(format_of(QWEN_3), [USER], TOOLS)
    dialogue.add_sampled([1], CALLED)
    return dialogue


def changed(message: ChatMessage, **changes: Any) -> ChatMessage:
    return {**copy.deepcopy(message), **changes}


def with_function(**changes: Any) -> ChatMessage:
    message = copy.deepcopy(CALLED)
    message["tool_calls"][0]["function"].update(changes)
    return message


@pytest.mark.parametrize(
    "given",
    [
        CALLED,
        {key: value for key, value in CALLED.items() if key != "reasoning"},
        changed(CALLED, content=""),
        changed(CALLED, reasoning=None, reasoning_content="let me think"),
        changed(CALLED, refusal=None, annotations=[], audio=None, function_call=None, name=None),
        changed(CALLED, provider_specific_fields={"x": 1}),
        changed(CALLED, tool_calls=[{**CALLED["tool_calls"][0], "index": 0}]),  # type: ignore[dict-item]
        with_function(arguments={"b": "é", "a": 1}),
        with_function(arguments='{"a":1,"b":"\\u00e9"}'),
    ],
)
def test_same_answer_in_another_form(given: ChatMessage) -> None:
    assert recorded().extension([USER, given, RESULT], TOOLS) == [RESULT]
    assert recorded().extension([USER, given], TOOLS) == []


@pytest.mark.parametrize(
    "chat",
    [
        [USER],
        [],
        [changed(USER, content="other"), CALLED, RESULT],
        [changed(USER, role="system"), CALLED, RESULT],
        [USER, changed(CALLED, content="4"), RESULT],
        [USER, changed(CALLED, reasoning="other"), RESULT],
        [USER, changed(CALLED, tool_calls=[]), RESULT],
        [USER, changed(CALLED, tool_calls=[{**CALLED["tool_calls"][0], "id": "c2"}]), RESULT],  # type: ignore[dict-item]
        [USER, with_function(name="sub"), RESULT],
        [USER, with_function(arguments='{"a": 2, "b": "é"}'), RESULT],
        [USER, with_function(arguments="{broken"), RESULT],
        [RESULT, USER, CALLED],
    ],
)
def test_rewritten_chat_is_no_extension(chat: list[ChatMessage]) -> None:
    assert recorded().extension(chat, TOOLS) is None


def test_other_tools_are_no_extension() -> None:
    assert recorded().extension([USER, CALLED, RESULT]) is None
    assert Dialogue(format_of(QWEN_3), [USER]).extension([USER, RESULT]) == [RESULT]


def test_key_that_the_template_reads_counts() -> None:
    text = QUICKSTART.text.replace("message['content']", "(message.mood or '') + message['content']")
    for given, same in ((text, False), (None, True)):
        dialogue = Dialogue(ChatFormat(tokenizer_of(QUICKSTART), template=given), [USER])
        assert (dialogue.extension([changed(USER, mood="happy")]) == []) is same


# --- observations of texts --------------------------------------------------------------------------------------------


def test_text_observation() -> None:
    tokenizer = tokenizer_of(QUICKSTART)
    assert text_suffix_ids(tokenizer, " 95;") == list(b" 95;")
    assert text_suffix_ids(tokenizer, "a<eos>") == [ord("a"), tokenizer.eos_token_id]
    assert text_suffix_ids(tokenizer, "") == []
    with pytest.raises(DataError, match="the observation holds a lone surrogate"):
        text_suffix_ids(tokenizer, "4\ud83d")


def test_no_space_before_the_first_word() -> None:
    """As of Llama 2, whose tokenizer puts one before each text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate(["<unk>", "</s>", "▁", "a", "▁a", "b", "▁b"])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    assert tokenizer("a b", add_special_tokens=False)["input_ids"] == [vocab["▁a"], vocab["▁b"]]
    assert text_suffix_ids(tokenizer, "a b") == [vocab["a"], vocab["▁b"]]
    text = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    chat = ChatFormat(tokenizer, template=text)
    suffix_ids = chat.suffix_ids(
        {"role": "assistant", "content": "b"}, [vocab["b"], vocab["</s>"]], [changed(USER, content="a b")]
    )
    assert suffix_ids == [vocab["a"], vocab["▁b"]]
