from collections.abc import Callable, Mapping
from typing import Any

import pytest

from rlhf_ray.config.settings import DataSettings
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.prompts.builder import PromptBuilder
from rlhf_ray.prompts.check import check_source
from rlhf_ray.prompts.rows import Row, RowSource, RowTable
from rlhf_ray.prompts.tokenizer import load_tokenizer


class Rows(RowSource):
    """A source of rows that are here."""

    def __init__(self, *rows: Row) -> None:
        super().__init__("data.jsonl", lambda: iter(rows))

    def load(self) -> RowTable:
        raise AssertionError("a check reads no more than a sample")


def no_seven(row: Mapping[str, Any]) -> None:
    if row["answer"] == 7:
        raise DataError("seven is no answer")


def check(
    tokenizer_path: str,
    *rows: Row,
    max_prompt_tokens: int = 10,
    check_row: Callable[[Mapping[str, Any]], None] | None = None,
    **settings: Any,
) -> None:
    builder = PromptBuilder(
        DataSettings(**settings),
        source_name="data.jsonl",
        max_prompt_tokens=max_prompt_tokens,
        tokenizer_name=tokenizer_path,
    )
    check_source(Rows(*rows), builder, load_tokenizer(tokenizer_path), check_row=check_row)


def told(tokenizer_path: str, *rows: Row, stop_token_ids: set[int] | None = None, **settings: Any) -> None:
    tokenizer = load_tokenizer(tokenizer_path)
    builder = PromptBuilder(
        DataSettings(**settings), source_name="data.jsonl", max_prompt_tokens=99, tokenizer_name=tokenizer_path
    )
    check_source(Rows(*rows), builder, tokenizer, stop_token_ids=stop_token_ids)


def test_good_rows_pass(tokenizer_path: str) -> None:
    check(tokenizer_path, {"prompt": "1+1="}, {"prompt": "too long, and dropped"})


def test_no_rows(tokenizer_path: str) -> None:
    with pytest.raises(DataError, match=r"data\.jsonl is empty: it has no rows"):
        check(tokenizer_path)


def test_the_first_bad_row_is_named(tokenizer_path: str) -> None:
    with pytest.raises(DataError, match=r"data\.jsonl, row 1 \(from 0\): the prompt in column 'prompt' is null"):
        check(tokenizer_path, {"prompt": "a"}, {"prompt": None}, {})


def test_a_row_that_a_reward_cannot_use_is_named(tokenizer_path: str) -> None:
    rows = [{"prompt": "too long, and dropped", "answer": 7}, {"prompt": "a", "answer": 6}]
    check(tokenizer_path, *rows, check_row=no_seven)
    with pytest.raises(DataError, match=r"^data\.jsonl, row 2 \(from 0\): seven is no answer$"):
        check(tokenizer_path, *rows, {"prompt": "a", "answer": 7}, check_row=no_seven)


def test_a_message_of_a_row_is_cut(tokenizer_path: str) -> None:
    for message in ("x" * 50_000, {"role": "user", "content": ["x" * 50_000]}):
        with pytest.raises(DataError, match=r"row 0 \(from 0\)") as caught:
            check(tokenizer_path, {"prompt": [message]})
        assert len(str(caught.value)) < 1000


def test_a_row_beyond_the_sample_is_not_looked_at(tokenizer_path: str) -> None:
    check(tokenizer_path, *[{"prompt": "a"}] * 1000, {"prompt": None})


def test_settings_that_do_not_go_with_the_rows(tokenizer_path: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.system_prompt"):
        check(tokenizer_path, {"prompt": "a"}, system_prompt="Be brief.")


def test_rows_that_are_all_too_long(tokenizer_path: str) -> None:
    with pytest.raises(
        DataError,
        match=r"none of the first 2 rows fits rollouts\.max_prompt_tokens = 2; the shortest prompt has 3 tokens",
    ):
        check(tokenizer_path, {"prompt": "abcd"}, {"prompt": "abc"}, max_prompt_tokens=2)


def test_one_that_is_too_long_where_that_is_an_error(tokenizer_path: str) -> None:
    with pytest.raises(DataError, match=r"row 1 \(from 0\): the prompt has 3 tokens"):
        check(tokenizer_path, {"prompt": "a"}, {"prompt": "abc"}, max_prompt_tokens=2, overlong_prompts="error")


def test_what_was_done_about_special_tokens_is_told(make_tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    for options, text in (({}, "<s>a"), ({"begin": True}, "a")):  # Nothing but what a tokenizer does by itself.
        told(make_tokenizer(**options), {"prompt": text})
    assert not caplog.messages
    told(make_tokenizer(begin=True, end=True), {"prompt": "a"}, {"prompt": "<s>b"})
    assert caplog.messages == [
        "data.jsonl: string prompts begin with <s>, which 1 of the first 2 have in their text and are not given again; "
        "at the end the tokenizer would append </s>, which is left out"
    ]


def test_final_assistant_messages_are_told_of_unless_the_setting_says_what_they_are(
    tokenizer_path: str, caplog: pytest.LogCaptureFixture
) -> None:
    user, assistant = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    rows = [{"prompt": [user]}, {"prompt": [user, assistant]}]
    for choice in ("continue", "drop"):
        told(tokenizer_path, *rows, final_assistant=choice)
    told(tokenizer_path, rows[0])
    assert not caplog.messages
    told(tokenizer_path, *rows)
    (message,) = caplog.messages
    assert message.startswith(
        "data.jsonl: 1 of the first 2 chats end in an assistant message, and completions continue"
    )
    assert "data.final_assistant" in message


def test_an_end_of_turn_that_ends_no_completion_is_told(tokenizer_path: str, caplog: pytest.LogCaptureFixture) -> None:
    chat = {"prompt": [{"role": "user", "content": "a"}]}
    told(tokenizer_path, chat, stop_token_ids={1})
    told(tokenizer_path, chat, stop_token_ids=None)
    told(tokenizer_path, {"prompt": "a"}, stop_token_ids={0})
    assert not caplog.messages
    told(tokenizer_path, chat, stop_token_ids={0})
    (message,) = caplog.messages
    assert "ends an assistant's turn with </s> (1)" in message
    assert "add 1 to rollouts.stop_token_ids" in message
