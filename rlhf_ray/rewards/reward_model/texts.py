"""Rewards, in front of a reward model: prompt and completion -> the text that it reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_ray.errors import DataError
from rlhf_ray.types import PromptText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["conversation", "writes_chats"]


def writes_chats(tokenizer: PreTrainedTokenizerBase, as_chat: bool | None) -> bool:
    """Whether sequences go through the tokenizer's chat template; ``as_chat`` is ``RewardModelReward``'s."""
    return tokenizer.chat_template is not None if as_chat is None else as_chat


def conversation(prompt: PromptText, completion: str, tokenizer: PreTrainedTokenizerBase, *, chat: bool) -> str:
    """One text.

    Args:
        prompt: A string, which is a user's message where chats are written, or a chat list.
        completion: The assistant's answer, or the rest of it where the prompt ends in its beginning.
        tokenizer: The reward model's.
        chat: Write it with the tokenizer's template, which then adds special tokens itself.

    Raises:
        DataError: The prompt is a chat and no template is used.
    """
    if not chat:
        if isinstance(prompt, str):
            return prompt + completion
        raise DataError(
            "the prompt is a chat, and the reward model's tokenizer has no chat template (or as_chat is off): name one "
            "that has it in tokenizer_path, or give string prompts"
        )
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    answer = {"role": "assistant", "content": completion}
    if messages and messages[-1]["role"] == "assistant":  # The completion continues it: one message, not two.
        *messages, begun = messages
        answer = {**begun, "content": begun["content"] + completion}
    text: str = tokenizer.apply_chat_template([*messages, answer], tokenize=False, add_generation_prompt=False)
    return text
