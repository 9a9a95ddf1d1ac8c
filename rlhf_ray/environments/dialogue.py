r"""Conversations as tokens, append only: what was sampled stays, and what follows it is rendered once.

::

    prompt                       sampled              suffix                                       sampled
    <|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n
                                 4<|im_end|>          \n<|im_start|>user\n3+3?<|im_end|>\n<|im_start|>assistant\n
                                                                                                   6<|im_end|>

The caller keeps the tokens; a dialogue keeps the messages, and says what to append.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_ray.environments.chat_format import ChatFormat, text_suffix_ids
from rlhf_ray.environments.messages import (
    REASONING_KEYS,
    calls_of,
    canonical_arguments,
    content_text,
    reasoning_text,
)
from rlhf_ray.types import ChatMessage

__all__ = ["ChatFormat", "Dialogue", "HistoryRewritten", "text_suffix_ids"]

# What clients add to messages and no template reads, whatever words it has.
_UNREAD_KEYS = frozenset({"refusal", "annotations", "audio", "function_call", *REASONING_KEYS})
_COMPARED_KEYS = frozenset({"role", "content", "tool_calls", "tool_call_id"})


class HistoryRewritten(Exception):
    """The template writes earlier turns differently now: begin a further sequence with :meth:`Dialogue.prompt_ids`."""


class Dialogue:
    """One sequence of a trajectory: its messages, and what is appended to its tokens.

    The caller keeps the tokens. They are :meth:`prompt_ids`, then in turn what was sampled and what :meth:`append`
    returns.

    Args:
        chat: The format, shared by dialogues.
        messages: The prompt.
        tools: Schemas of functions.
        keep_reasoning: Whether earlier reasoning stays where the template would drop it, or write the history
            differently in another way; False: :meth:`append` raises :class:`HistoryRewritten` there.

    Example:
        ::

            dialogue = Dialogue(chat, [{"role": "user", "content": "2+2?"}])
            ids = dialogue.prompt_ids()
            dialogue.add_sampled(sampled, {"role": "assistant", "content": "4"})
            ids += sampled + dialogue.append([{"role": "user", "content": "3+3?"}])
    """

    def __init__(
        self,
        chat: ChatFormat,
        messages: Sequence[ChatMessage],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        keep_reasoning: bool = True,
    ) -> None:
        self.messages: list[ChatMessage] = copy.deepcopy(list(messages))
        """All so far, the sampled ones too."""
        self.tools: list[Mapping[str, Any]] = copy.deepcopy(list(tools))
        self._chat = chat
        self._keep_reasoning = keep_reasoning
        self._sampled_ids: list[int] | None = None

    def prompt_ids(self) -> list[int]:
        """``[P]``, tokens of all messages as the template writes them now, ready for an answer.

        Raises:
            DataError: As :meth:`ChatFormat.prompt_ids`.
        """
        return self._chat.prompt_ids(self.messages, self.tools)

    def add_sampled(self, token_ids: Sequence[int], message: ChatMessage) -> None:
        """Record what the policy answered.

        Args:
            token_ids: ``[T]``, all that was sampled, stop tokens included.
            message: The same as a message. If the chat ended in a message of the assistant, it continues that one.
        """
        message = copy.deepcopy(dict(message))
        if self.messages and self.messages[-1].get("role") == "assistant":
            begun = self.messages.pop()
            message = {**begun, **message, "content": content_text(begun) + content_text(message)}
        self.messages.append(message)
        self._sampled_ids = [int(token_id) for token_id in token_ids]

    def append(self, new: Sequence[ChatMessage]) -> list[int]:
        """Add what the policy reads next.

        Args:
            new: Messages; none: nothing is added, and the policy continues its turn.

        Returns:
            ``[N]`` tokens to append to the sequence: see :meth:`ChatFormat.suffix_ids`.

        Raises:
            HistoryRewritten: With ``keep_reasoning=False``: the template writes earlier turns differently now. The
                messages were added; a further sequence begins with :meth:`prompt_ids`.
            DataError: As :meth:`ChatFormat.suffix_ids`; nothing was added.
            ValueError: Nothing was sampled since messages were added.
        """
        if self._sampled_ids is None:
            raise ValueError("no answer was recorded since the last messages were added")
        if not new:
            return []
        new = copy.deepcopy(list(new))
        answer = self.messages[-1]
        rewritten = not self._keep_reasoning and self._chat.rewrites(self.messages, new, self.tools)
        ids = [] if rewritten else self._chat.suffix_ids(answer, self._sampled_ids, new, self.tools)
        self.messages += new
        self._sampled_ids = None
        if rewritten:
            raise HistoryRewritten("the chat template writes earlier turns differently now")
        return ids

    def extension(
        self, messages: Sequence[ChatMessage], tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[ChatMessage] | None:
        """The messages that a longer chat has beyond this one.

        An answer is the same if it comes back without its reasoning, with another spelling of nothing (``None``, an
        empty text) or of a call's arguments (JSON text or a mapping), or with keys that the template does not read.

        Args:
            messages: A whole chat.
            tools: Schemas of functions.

        Returns:
            Copies of the further messages, maybe none; ``None`` if the chat does not continue this one: it is shorter,
            an earlier message differs, or the tools do.
        """
        recorded = len(self.messages)
        if len(messages) < recorded or list(tools or ()) != self.tools:
            return None
        if not all(map(self._same, self.messages, messages)):
            return None
        return copy.deepcopy(list(messages[recorded:]))

    def _same(self, ours: ChatMessage, given: ChatMessage) -> bool:
        if ours is given or ours == given:
            return True
        if self._compared(ours) != self._compared(given):
            return False
        return reasoning_text(given) in ("", reasoning_text(ours))

    def _compared(self, message: ChatMessage) -> dict[str, Any]:
        compared = {
            key: value
            for key, value in message.items()
            if value is not None and key not in _UNREAD_KEYS and (key in _COMPARED_KEYS or self._chat.mentions(key))
        }
        calls = [
            (call.get("id"), call["function"]["name"], canonical_arguments(call["function"].get("arguments")))
            for call in calls_of(message)
        ]
        return {**compared, "content": content_text(message), "tool_calls": calls}
