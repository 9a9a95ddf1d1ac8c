from __future__ import annotations

import pytest

from rlhf_ray.errors import DataError
from rlhf_ray.quickstart.tokenizer import build_tokenizer
from rlhf_ray.rewards.reward_model.texts import conversation, writes_chats

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1="}]


def test_chats_go_through_the_template_of_the_reward_model() -> None:
    tokenizer = build_tokenizer(max_length=64)
    assert conversation(CHAT, "2", tokenizer, chat=True) == "system: Be brief.\nuser: 1+1=\nassistant: 2<eos>\n"
    assert conversation("1+1=", "2", tokenizer, chat=True) == "user: 1+1=\nassistant: 2<eos>\n"


def test_a_completion_continues_the_message_that_the_prompt_ends_in() -> None:
    tokenizer = build_tokenizer(max_length=64)
    begun = [*CHAT, {"role": "assistant", "content": "It is "}]
    text = "system: Be brief.\nuser: 1+1=\nassistant: It is 2<eos>\n"
    assert conversation(begun, "2", tokenizer, chat=True) == text
    assert begun[-1]["content"] == "It is "


def test_without_a_template_texts_follow_each_other() -> None:
    tokenizer = build_tokenizer(max_length=64)
    assert conversation("1+1=", "2", tokenizer, chat=False) == "1+1=2"
    with pytest.raises(DataError, match=r"the prompt is a chat, .* tokenizer_path"):
        conversation(CHAT, "2", tokenizer, chat=False)


def test_the_tokenizer_decides_unless_told() -> None:
    tokenizer = build_tokenizer(max_length=64)
    assert writes_chats(tokenizer, None)
    assert not writes_chats(tokenizer, False)
    tokenizer.chat_template = None
    assert not writes_chats(tokenizer, None)
