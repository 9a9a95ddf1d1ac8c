"""Which sequence of a trajectory an agent's request continues, and which tokens it adds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from rlhf_ray.environments.dialogue import ChatFormat, Dialogue, HistoryRewritten
from rlhf_ray.environments.episode import Sampled
from rlhf_ray.types import ChatMessage

__all__ = ["Conversation", "History"]


class Conversation:
    """One sequence of a trajectory."""

    def __init__(self, index: int, dialogue: Dialogue) -> None:
        self.index = index
        """``Request.sequence``"""
        self.num_tokens = 0
        """Of all so far."""
        self.pending = True
        """Whether an answer is being sampled, so that only a fork can begin here."""
        self._dialogue = dialogue
        self._cut = False

    @property
    def num_messages(self) -> int:
        """Of all so far."""
        return len(self._dialogue.messages)

    def beyond(self, messages: Sequence[ChatMessage], tools: Sequence[Mapping[str, Any]]) -> list[ChatMessage] | None:
        """What a longer chat adds; ``None`` if it does not continue this conversation now."""
        if self.pending:
            return None
        new = self._dialogue.extension(messages, tools)
        # An answer is only continued where a limit of its length had cut it.
        return new if new or self._cut else None

    def begin(self) -> list[int]:
        """``[P]``, the prompt."""
        ids = self._dialogue.prompt_ids()
        self.num_tokens = len(ids)
        return ids

    def append(self, new: Sequence[ChatMessage]) -> list[int]:
        """``[N]``, what follows the last answer."""
        ids = self._dialogue.append(new)
        self.pending = True
        self.num_tokens += len(ids)
        return ids

    def add_sampled(self, sampled: Sampled, message: ChatMessage) -> None:
        """Record an answer."""
        self._dialogue.add_sampled(sampled.token_ids.tolist(), message)
        self.pending = False
        self.num_tokens += len(sampled.token_ids)
        self._cut = sampled.finish_reason == "length"


class History:
    """All conversations of an episode: the sequences of its trajectory.

    A request continues the longest conversation that its messages begin with. Otherwise it begins another one: its
    history was rewritten, its tools are others, or it branches off earlier or while an answer is pending.
    """

    def __init__(self, chat: ChatFormat, *, keep_reasoning: bool = True) -> None:
        self._chat = chat
        self._keep_reasoning = keep_reasoning
        self._num_conversations = 0
        # By the messages before the first answer: an episode may have hundreds.
        self._by_opening: dict[tuple[str, ...], list[Conversation]] = {}

    def place(
        self, messages: list[ChatMessage], tools: list[dict[str, Any]]
    ) -> tuple[Conversation, list[int], list[ChatMessage]]:
        """Find or begin the conversation of a request.

        Args:
            messages: A whole chat.
            tools: Schemas of functions.

        Returns:
            The conversation, the tokens that it does not have yet, and the messages that these stand for.

        Raises:
            DataError: The chat template refuses the messages.
        """
        near = self._by_opening.setdefault(_opening(messages), [])
        found = [(one, new) for one in near if (new := one.beyond(messages, tools)) is not None]
        if found:
            # Of equally long ones, the first.
            conversation, new = max(found, key=lambda pair: pair[0].num_messages)
            with suppress(HistoryRewritten):  # By the template: another conversation, in which the history is so.
                return conversation, conversation.append(new), new
        dialogue = Dialogue(self._chat, messages, tools, keep_reasoning=self._keep_reasoning)
        conversation = Conversation(self._num_conversations, dialogue)
        ids = conversation.begin()
        self._num_conversations += 1
        near.append(conversation)
        return conversation, ids, messages


def _opening(messages: Sequence[ChatMessage]) -> tuple[str, ...]:
    parts: list[str] = []
    for message in messages:
        if message["role"] == "assistant":
            break
        parts += (message["role"], message["content"])
    return tuple(parts)
