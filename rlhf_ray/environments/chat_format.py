"""How a chat template writes messages: whole prompts, and what follows an answer.

What follows an answer is rendered in a chat of a few messages, in which the answer is a mark, so that its cost does not
grow with the history and the template cannot change that. What the template does with marks is tried once for each
sequence of roles.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf_ray.environments.messages import (
    REASONING_KEYS,
    CallStyle,
    calls_of,
    content_text,
    prepared_call,
    reasoning_text,
    short_id,
)
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.prompts.tokenizer import template_variables, text_flaw
from rlhf_ray.types import ChatMessage
from rlhf_ray.untrusted_text import shortened

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ChatFormat", "text_suffix_ids"]

# Words that stand for contents. Templates that strip, split or capitalize leave them as they are.
_ANSWER = "Qz7Answer9x"
_TOLD = "Kv4Told{}x"
_REASON = "Jw5Reason2x"
_TOOL = "Hb6Tool2x"

_USER: ChatMessage = {"role": "user", "content": "1"}
_STUB_TOOL = {
    "type": "function",
    "function": {"name": _TOOL, "description": _TOOL, "parameters": {"type": "object", "properties": {}}},
}
# So many of the last sampled tokens are compared with the end of a turn.
_END_TOKENS = 16
_MAX_SHAPES = 1024


class _Refused(Exception):
    """The template raised, or left a message out."""


@dataclass(frozen=True, slots=True)
class _Shape:
    """What suffixes of the same roles have in common."""

    num_calls: int
    """Calls in the message that stands for the answer; 0: it is text."""
    num_marks: int
    """How often the template writes the mark of the answer."""
    body_end: str
    """What follows the mark and still belongs to the answer: the rest of a call."""
    head: str
    """What follows the answer, up to the first new content."""
    end_id: int | None
    """The first special token of the head, where there is one: the end of the turn, or the next message's start."""
    end: int
    """Where it ends in the head."""
    with_tools: bool
    """Whether the suffix depends on the tools without repeating them."""


class _AddedTokens:
    """The tokens that a tokenizer finds in a text before anything else."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        added = tokenizer.added_tokens_decoder
        self.texts: dict[int, str] = {token_id: token.content for token_id, token in added.items() if token.content}
        self.ids = {text: token_id for token_id, text in self.texts.items()}
        longest_first = sorted(self.ids, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        # One that leaves the text around it alone. EOS first: no tokenizer merges it with anything.
        plain = [i for i, token in added.items() if not (token.lstrip or token.rstrip or token.single_word)]
        preferred = [i for i in plain if i == tokenizer.eos_token_id]
        self.neutral = next(iter([*preferred, *plain]), None)


@functools.lru_cache(maxsize=8)
def _added_tokens(tokenizer: PreTrainedTokenizerBase) -> _AddedTokens:
    return _AddedTokens(tokenizer)


def text_suffix_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of an observation behind a prompt that is a text and not a chat.

    Args:
        tokenizer: The model's.
        text: The observation; special tokens are read where it spells them.

    Returns:
        ``[T]``, no special tokens added, and no space that the tokenizer puts before the first word of a text.

    Raises:
        DataError: The text holds half of a surrogate pair.
    """
    if flaw := text_flaw(text):
        raise DataError(f"the observation {flaw}")
    return _ids_behind(tokenizer, _added_tokens(tokenizer).neutral, text)


def _ids_behind(tokenizer: PreTrainedTokenizerBase, before: int | None, text: str) -> list[int]:
    """Tokenize what follows a special token: some tokenizers treat the beginning of a text differently."""
    if not text:
        return []
    if before is not None:
        whole = _added_tokens(tokenizer).texts[before] + text
        ids = list(tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"])
        if ids[:1] == [before]:
            return ids[1:]
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


class ChatFormat:
    """How messages become tokens, by a tokenizer's chat template. One serves all the episodes of a process.

    Args:
        tokenizer: The model's.
        template: The chat template; unset: the tokenizer's own.
        arguments: Further variables of the template, as ``data.chat_template_kwargs`` has them.

    Raises:
        ConfigError: There is no template, it is no template, it refuses a user's message after an answer, or it writes
            one differently the longer the chat is.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: str | None = None,
        arguments: Mapping[str, Any] = {},
    ) -> None:
        self.tokenizer = tokenizer
        self._given = template
        self._added = _added_tokens(tokenizer)
        self._own_tools: Sequence[Mapping[str, Any]] = arguments.get("tools") or ()
        self._arguments = {name: value for name, value in arguments.items() if name != "tools"}
        self._variables = {**tokenizer.special_tokens_map, "documents": None, **self._arguments}
        # A tokenizer may have another template for chats with tools.
        self._texts = {with_tools: self._template_text(with_tools) for with_tools in (False, True)}
        self._templates = {with_tools: self._compiled(text) for with_tools, text in self._texts.items()}
        self._shapes: dict[tuple[object, ...], _Shape] = {}
        self._call_style: CallStyle | None = None
        self._reasoning_key: str | None = None
        self._reasoning_in_content = False
        self._check_user_turns()
        self._closing = self._written({"role": "assistant", "content": _ANSWER}).rpartition(_ANSWER)[2]
        found = self._added.pattern.search(self._closing)
        self._turn_end = found[0] if found else ""
        self._strips = _ANSWER + " \n" not in self._written({"role": "assistant", "content": _ANSWER + " \n"}, _USER)
        self._call_style = self._find_call_style()
        self._reasoning_key = self._find_reasoning_key()
        # Some read it there only to leave it out.
        self._reasoning_in_content = self.mentions("</think>") and _REASON in self._written(
            {"role": "assistant", "content": f"<think>\n{_REASON}\n</think>\n\n1"}
        )

    # --- what episodes call -------------------------------------------------------------------------------------------

    def prompt_ids(self, messages: Sequence[ChatMessage], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Tokens of a whole prompt.

        Args:
            messages: The chat. If the last is the assistant's, it is continued; else the generation prompt follows.
            tools: Schemas of functions, as the template takes them.

        Returns:
            ``[P]``

        Raises:
            DataError: A message is none, holds half of a surrogate pair, or the template refuses the chat.
        """
        tools = tools or self._own_tools
        prepared = self._all_prepared(messages)
        try:
            if prepared and prepared[-1]["role"] == "assistant":
                text = self._continued(prepared, tools)
            else:
                text = self._render(prepared, tools, generate=True)
        except _Refused as failure:
            raise DataError(f"{self._whose} refused the prompt: {failure}") from failure
        if flaw := text_flaw(text):
            raise DataError(f"the prompt {flaw}")
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def suffix_ids(
        self,
        assistant: ChatMessage,
        sampled_ids: Sequence[int],
        new: Sequence[ChatMessage],
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> list[int]:
        """Tokens that follow an answer so that the policy reads new messages and then answers again.

        They are the end of the assistant's turn as far as it was not sampled, what separates turns, the new messages
        and the generation prompt. An answer that ends in another stop token than the template's keeps it, and the
        template's end follows. Where the template puts the list of tools in front of the last user message, it is not
        repeated.

        Args:
            assistant: The answer as a message.
            sampled_ids: ``[T]``, what was sampled for it.
            new: What comes next; if empty, nothing follows, and the policy continues where it stopped.
            tools: Schemas of functions, those of the prompt.

        Returns:
            ``[N]``

        Raises:
            DataError: A message is none, holds half of a surrogate pair, or the template refuses it or leaves it out.
        """
        if not new:
            return []
        prepared = self._all_prepared(new)
        shape, text = self._suffix_text(self._prepared(assistant), prepared, tools or self._own_tools)
        if flaw := text_flaw(text):
            raise DataError(f"the observation {flaw}")
        head = _common_start(text, shape.head)
        end = [int(token_id) for token_id in sampled_ids[-_END_TOKENS:]]
        rest = text[self._num_sampled(head, shape, assistant, end) :]
        before = end[-1] if end and end[-1] in self._added.texts else self._added.neutral
        return _ids_behind(self.tokenizer, before, rest)

    def supports_tools(self) -> bool:
        """Whether the template reads ``tools``."""
        return "tools" in template_variables(self._texts[True])

    def check_tools(self, tools: Sequence[Mapping[str, Any]]) -> None:
        """Raise at the start what every episode would fail with.

        Raises:
            ConfigError: The template does not read ``tools``, or refuses a result or leaves it out. One that does not
                write calls will do: those that were sampled are not rendered again.
        """
        if not self.supports_tools():
            raise self._unusable("does not read `tools`, so the policy would not know them")
        result = {"role": "tool", "tool_call_id": "call00000", "name": "f", "content": "1"}
        try:
            self.prompt_ids([_USER], tools)
            self.suffix_ids(_calling("call00000", "1"), (), [result], tools)
        except DataError as failure:
            raise self._unusable(f"is none for tools: {failure}") from failure

    def rewrites(
        self, messages: Sequence[ChatMessage], new: Sequence[ChatMessage], tools: Sequence[Mapping[str, Any]] = ()
    ) -> bool:
        """Whether the template writes a chat's beginning differently once new messages follow.

        Args:
            messages: The chat, which ends in an answer.
            new: What follows.
            tools: Schemas of functions.

        Returns:
            True if what was read for the last answer is no longer the beginning, or its reasoning is left out.

        Raises:
            DataError: A message is none, or the template refuses the chat.
        """
        tools = tools or self._own_tools
        reasoned = bool(reasoning_text(messages[-1])) and self._knows_reasoning
        last = {**messages[-1], "reasoning": _REASON} if reasoned else messages[-1]
        before = [self._prepared(message) for message in messages[:-1]]
        after = [*before, *(self._prepared(message) for message in (last, *new))]
        try:
            read = self._render(before, tools, generate=True)
            now = self._render(after, tools, generate=True)
        except _Refused as failure:
            raise DataError(f"{self._whose} refused the chat: {failure}") from failure
        return not now.startswith(read) or (reasoned and _REASON not in now)

    def mentions(self, key: str) -> bool:
        """Whether the template may read this key of a message: the word is in its text."""
        return any(key in text for text in self._texts.values())

    # --- the template -------------------------------------------------------------------------------------------------

    @property
    def _whose(self) -> str:
        return "data.chat_template" if self._given else "the tokenizer's chat template"

    def _unusable(self, reason: str) -> ConfigError:
        given = None if self._given is None else shortened(self._given, 80)
        return ConfigError("data.chat_template", given, f"{self._whose} {reason}; give another one")

    def _template_text(self, with_tools: bool) -> str:
        try:
            return str(self.tokenizer.get_chat_template(self._given, tools=[_STUB_TOOL] if with_tools else None))
        except ValueError as failure:
            remedy = f"the tokenizer has no chat template ({shortened(failure, 200)}); give one, or prompts as text"
            raise ConfigError("data.chat_template", self._given, remedy) from failure

    def _compiled(self, text: str) -> Any:
        from transformers.utils.chat_template_utils import _compile_jinja_template

        try:
            return _compile_jinja_template(text)
        # Jinja's own errors, and what its extensions raise.
        except Exception as failure:
            raise self._unusable(f"is no Jinja template: {shortened(failure, 200)}") from failure

    def _render(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[Mapping[str, Any]],
        *,
        generate: bool,
        of_tools: bool | None = None,
    ) -> str:
        """Write a chat; ``of_tools`` chooses the template where the tools are left out of a chat that has some."""
        template = self._templates[bool(tools) if of_tools is None else of_tools]
        try:
            text: str = template.render(
                messages=messages, tools=list(tools) or None, add_generation_prompt=generate, **self._variables
            )
        # A template is a program that came with the model: it may raise anything.
        except Exception as failure:
            raise _Refused(shortened(failure, 400)) from failure
        return text

    def _continued(self, prepared: list[ChatMessage], tools: Sequence[Mapping[str, Any]]) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    prepared,
                    tools=list(tools) or None,
                    chat_template=self._given,
                    continue_final_message=True,
                    tokenize=False,
                    **self._arguments,
                )
            )
        except Exception as failure:  # As above.
            raise _Refused(shortened(failure, 400)) from failure

    # --- what the template does, found by trying ----------------------------------------------------------------------

    def _written(self, *after_user: ChatMessage) -> str:
        """A chat that goes on after a user's message, as written; empty if the template refuses it."""
        try:
            return self._render([_USER, *(self._prepared(m) for m in after_user)], (), generate=False, of_tools=True)
        except _Refused:
            return ""

    def _check_user_turns(self) -> None:
        answer, told = {"role": "assistant", "content": _ANSWER}, {"role": "user", "content": _TOLD.format(0)}
        try:
            self._shape(0, answer, [told], ())
            longer = [_USER, {"role": "assistant", "content": "1"}, _USER, answer, told]
            tails = [self._render(chat, (), generate=True).rpartition(_ANSWER)[2] for chat in (longer, longer[2:])]
        except _Refused as failure:
            raise self._unusable(f"refused a user's message after an answer: {failure}") from failure
        if tails[0] != tails[1]:
            raise self._unusable("writes a message differently the longer the chat is, as if it numbered them")

    def _find_call_style(self) -> CallStyle | None:
        for short_ids, content, as_text in itertools.product((False, True), ("", None), (False, True)):
            self._call_style = CallStyle(content, as_text, short_ids)
            if _ANSWER in self._written(_calling("call-of-0123456789", _ANSWER)):
                return self._call_style
        return None

    def _find_reasoning_key(self) -> str | None:
        answer = {"role": "assistant", "content": "1"}
        for key in REASONING_KEYS:
            self._reasoning_key = key
            if _REASON in self._written({**answer, "reasoning": _REASON}):
                return key
        return None

    @property
    def _knows_reasoning(self) -> bool:
        return self._reasoning_key is not None or self.mentions("</think>")

    # --- messages as the template takes them --------------------------------------------------------------------------

    def _all_prepared(self, messages: Sequence[ChatMessage]) -> list[ChatMessage]:
        prepared = [self._prepared(message) for message in messages]
        if self._call_style is None and any(map(calls_of, prepared)):
            raise DataError(f"{self._whose} does not write calls of tools, so a chat that has some cannot be rendered")
        return prepared

    def _prepared(self, message: ChatMessage) -> ChatMessage:
        """A message with its content as text, its calls in the template's style and its reasoning under its key."""
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DataError(f"a chat message is {shortened(repr(message), 200)}; it must hold 'role' and 'content'")
        made = {key: value for key, value in message.items() if value is not None and key not in REASONING_KEYS}
        made["content"] = content_text(message)
        style = self._call_style
        if calls := calls_of(message):
            made["tool_calls"] = [prepared_call(call, style) for call in calls]
            made["content"] = made["content"] or (style.content if style else "")
        else:
            made.pop("tool_calls", None)
        if style and style.short_ids and "tool_call_id" in made:
            made["tool_call_id"] = short_id(made["tool_call_id"])
        if reasoning := reasoning_text(message):
            if self._reasoning_key is not None:
                made[self._reasoning_key] = reasoning
            elif self._reasoning_in_content:
                made["content"] = f"<think>\n{reasoning}\n</think>\n\n{made['content'] or ''}"
        return made

    # --- suffixes -----------------------------------------------------------------------------------------------------

    def _suffix_text(
        self, assistant: ChatMessage, new: Sequence[ChatMessage], tools: Sequence[Mapping[str, Any]]
    ) -> tuple[_Shape, str]:
        """What the template writes behind an answer: as text or as calls, as it is, else the other way."""
        num_calls = len(assistant.get("tool_calls", ()))
        num_results = sum(message["role"] == "tool" for message in new)
        attempts = dict.fromkeys([num_calls, min(num_calls, 1), 0, num_results] if self._call_style else [0])
        reasons = []
        for attempt in attempts:
            try:
                shape = self._shape(attempt, assistant, new, tools)
                stub = [_USER, self._stub(attempt, assistant, new)]
                whole = self._render(
                    [*stub, *new], tools if shape.with_tools else (), generate=True, of_tools=bool(tools)
                )
                parts = whole.split(_ANSWER, shape.num_marks)
                if len(parts) > shape.num_marks and parts[-1].startswith(shape.body_end):
                    return shape, parts[-1][len(shape.body_end) :]
                reasons.append("it writes an answer differently before different messages")
            except _Refused as failure:
                reasons.append(str(failure))
        roles = ", ".join(message["role"] for message in new)
        raise DataError(f"{self._whose} refused messages of {roles} after an answer: {reasons[0]}")

    def _stub(self, num_calls: int, assistant: ChatMessage, new: Sequence[ChatMessage]) -> ChatMessage:
        """The answer, with the mark in place of its text or of the last argument of its last call."""
        if num_calls == 0:
            return {"role": "assistant", "content": _ANSWER}
        results = [message for message in new if message["role"] == "tool"]
        known = [
            *((call.get("id"), call["function"]["name"]) for call in assistant.get("tool_calls", ())),
            *((result.get("tool_call_id"), result.get("name")) for result in results),
        ][:num_calls]
        calls = [
            _call(call_id or "call00000", name or "f", _ANSWER if i == num_calls else "1")
            for i, (call_id, name) in enumerate(known, 1)
        ]
        return self._prepared({"role": "assistant", "content": "", "tool_calls": calls})

    def _shape(
        self, num_calls: int, assistant: ChatMessage, new: Sequence[ChatMessage], tools: Sequence[Mapping[str, Any]]
    ) -> _Shape:
        key = (num_calls, bool(tools), *(message["role"] for message in new))
        if (shape := self._shapes.get(key)) is None:
            shape = self._find_shape(num_calls, assistant, new, tools)
            if len(self._shapes) >= _MAX_SHAPES:
                self._shapes.clear()
            self._shapes[key] = shape
        return shape

    def _find_shape(
        self, num_calls: int, assistant: ChatMessage, new: Sequence[ChatMessage], tools: Sequence[Mapping[str, Any]]
    ) -> _Shape:
        stub = [_USER, self._stub(num_calls, assistant, new)]
        marked = [{**message, "content": _TOLD.format(i)} for i, message in enumerate(new)]

        def tail(tools: Sequence[Mapping[str, Any]]) -> tuple[int, str]:
            whole = self._render([*stub, *marked], tools, generate=True, of_tools=of_tools)
            return whole.count(_ANSWER), whole.rpartition(_ANSWER)[2]

        of_tools = bool(tools)
        with_tools = False
        if tools:
            # Tools that come again before the last user message are in the prompt already.
            try:
                with_tools = tail((_STUB_TOOL,)) != tail(()) and _TOOL not in tail((_STUB_TOOL,))[1]
            except _Refused:
                with_tools = True
        num_marks, after = tail(tools if with_tools else ())
        if num_marks == 0:
            raise _Refused("it leaves the answer out")
        for message in marked:
            if message["role"] != "assistant" and message["content"] not in after:
                raise _Refused(f"it leaves out what the role {message['role']!r} says")
        head = min((after.partition(message["content"])[0] for message in marked), key=len)
        body_end = self._body_end(stub, head) if num_calls else ""
        head = head[len(body_end) :]
        found = self._added.pattern.search(head)
        return _Shape(
            num_calls=num_calls,
            num_marks=num_marks,
            body_end=body_end,
            head=head,
            end_id=self._added.ids[found[0]] if found else None,
            end=found.end() if found else 0,
            with_tools=with_tools,
        )

    def _body_end(self, stub: list[ChatMessage], head: str) -> str:
        """What closes a call: it follows the mark whether messages come or not, and is not the end of the turn."""
        try:
            alone = self._render(stub, (), generate=False, of_tools=True).rpartition(_ANSWER)[2]
        except _Refused:
            alone = head
        common = _common_start(alone, head)
        if self._turn_end and self._turn_end in common:
            return common.partition(self._turn_end)[0]
        return common.removesuffix(self._closing)

    def _num_sampled(self, head: str, shape: _Shape, assistant: ChatMessage, end: list[int]) -> int:
        """How many characters at the beginning of the suffix the sampled tokens end with."""
        if not end:
            return 0
        # The first special token counts even if the template writes a space before it.
        if end[-1] == shape.end_id and shape.end <= len(head):
            return shape.end
        starts = self._added.pattern.match(head)
        if starts and self._added.ids[starts[0]] not in end:
            return 0
        said = self._end_text(end)
        for length in range(min(len(said), len(head)), 0, -1):
            if said.endswith(head[:length]) and self._ends_turn(head[:length], said, assistant, end):
                return length
        return 0

    def _ends_turn(self, overlap: str, said: str, assistant: ChatMessage, end: list[int]) -> bool:
        if self._added.pattern.search(overlap):
            # Not if the policy spelled the special token with others.
            ids = list(self.tokenizer(overlap, add_special_tokens=False)["input_ids"])
            return end[-len(ids) :] == ids
        if calls_of(assistant):
            return True
        content = content_text(assistant)
        # What the answer itself ends with is not the end of the turn: a newline of its own, cut by a limit.
        return said[: -len(overlap)].endswith((content.rstrip() if self._strips else content)[-8:])

    def _end_text(self, end: list[int]) -> str:
        texts = self._added.texts
        return "".join(
            "".join(map(texts.__getitem__, run))
            if added
            else str(self.tokenizer.decode(list(run), clean_up_tokenization_spaces=False))
            for added, run in itertools.groupby(end, key=texts.__contains__)
        )


def _common_start(one: str, other: str) -> str:
    length = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:length]


def _call(call_id: str, name: str, value: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": {"value": value}}}


def _calling(call_id: str, value: str) -> ChatMessage:
    return {"role": "assistant", "content": "", "tool_calls": [_call(call_id, "f", value)]}
