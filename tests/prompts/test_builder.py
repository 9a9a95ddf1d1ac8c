from typing import Any

import numpy as np
import pytest

from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.prompts.builder import NumberedRow, Outcome, Overlong, PromptBuilder
from rlhf_ray.prompts.tokenizer import load_tokenizer
from rlhf_ray.settings import DataSettings
from rlhf_ray.types import Prompt

USER = {"role": "user", "content": "1+1?"}


def build(
    tokenizer_path: str,
    *rows: dict[str, Any],
    max_prompt_tokens: int = 1000,
    vocabulary_size: int | None = None,
    **settings: Any,
) -> list[Outcome]:
    builder = PromptBuilder.from_settings(
        DataSettings(**settings),
        source_name="data.jsonl",
        max_prompt_tokens=max_prompt_tokens,
        tokenizer_name=tokenizer_path,
        vocabulary_size=vocabulary_size,
    )
    numbered = [NumberedRow(prompt_id=100 + i, dataset_row=i, row=row) for i, row in enumerate(rows)]
    return builder.build(numbered, load_tokenizer(tokenizer_path))


def build_one(tokenizer_path: str, row: dict[str, Any], **settings: Any) -> Prompt:
    [outcome] = build(tokenizer_path, row, **settings)
    assert isinstance(outcome, Prompt)
    return outcome


def problem(tokenizer_path: str, row: dict[str, Any], **settings: Any) -> DataError | ConfigError:
    [outcome] = build(tokenizer_path, row, **settings)
    assert isinstance(outcome, (DataError, ConfigError))
    return outcome


def decode(tokenizer_path: str, prompt: Prompt) -> str:
    text: str = load_tokenizer(tokenizer_path).decode(prompt.token_ids)
    return text


def test_a_string_and_the_row_around_it(tokenizer_path: str) -> None:
    prompt = build_one(tokenizer_path, {"prompt": "2+2=", "answer": 4, "meta": {"tags": ["a"], "n": None}})
    assert prompt.prompt_id == 100
    assert prompt.text == "2+2="
    assert prompt.token_ids.dtype == np.int32
    assert prompt.token_ids.shape == (4,)
    assert decode(tokenizer_path, prompt) == "2+2="
    assert prompt.columns == {"answer": 4, "meta": {"tags": ["a"], "n": None}}


def test_strings_get_the_tokenizers_special_tokens_and_chats_only_the_templates(make_tokenizer: Any) -> None:
    path = make_tokenizer(begin=True)
    assert decode(path, build_one(path, {"prompt": "ab"})) == "<s>ab"
    assert decode(path, build_one(path, {"prompt": [USER]})) == "<user>1+1?</s><assistant>"


def test_a_template_goes_around_a_string_and_may_hold_other_braces(tokenizer_path: str) -> None:
    prompt = build_one(tokenizer_path, {"prompt": "1+1?"}, prompt_template="Q: {prompt}\nEnd with \\boxed{}.")
    assert prompt.text == "Q: 1+1?\nEnd with \\boxed{}."
    assert decode(tokenizer_path, prompt) == prompt.text


def test_a_chat_goes_through_the_chat_template(tokenizer_path: str) -> None:
    chat = [USER, {"role": "assistant", "content": "2"}, {"role": "user", "content": "sure?"}]
    prompt = build_one(tokenizer_path, {"prompt": chat})
    assert prompt.text == chat
    expected = "<user>1+1?</s><assistant>2</s><user>sure?</s><assistant>"
    assert decode(tokenizer_path, prompt) == expected
    assert prompt.token_ids.dtype == np.int32


def test_a_system_prompt_comes_first(tokenizer_path: str) -> None:
    prompt = build_one(tokenizer_path, {"prompt": [USER]}, system_prompt="Be brief.")
    assert prompt.text == [{"role": "system", "content": "Be brief."}, USER]
    assert decode(tokenizer_path, prompt) == "<system>Be brief.</s><user>1+1?</s><assistant>"


def test_a_string_as_a_chat(tokenizer_path: str) -> None:
    prompt = build_one(
        tokenizer_path, {"prompt": "1+1"}, as_chat=True, prompt_template="{prompt}?", system_prompt="Be brief."
    )
    assert prompt.text == [{"role": "system", "content": "Be brief."}, USER]
    assert decode(tokenizer_path, prompt) == "<system>Be brief.</s><user>1+1?</s><assistant>"


def test_null_keys_that_arrow_adds_to_messages_are_left_out(tokenizer_path: str) -> None:
    assert build_one(tokenizer_path, {"prompt": [{**USER, "name": None}]}).text == [USER]


def test_strings_chats_and_problems_of_one_batch_keep_their_places(tokenizer_path: str) -> None:
    rows = [{"prompt": "a"}, {"prompt": 5}, {"prompt": [USER]}, {"prompt": [USER, USER]}, {"prompt": "bc"}]
    outcomes = build(tokenizer_path, *rows)
    assert [type(outcome) for outcome in outcomes] == [Prompt, DataError, Prompt, DataError, Prompt]
    texts = [decode(tokenizer_path, outcome) for outcome in outcomes if isinstance(outcome, Prompt)]
    assert texts == ["a", "<user>1+1?</s><assistant>", "bc"]
    assert "data.jsonl, row 3 (from 0): the tokenizer's chat template refused" in str(outcomes[3])
    assert "roles must alternate" in str(outcomes[3])


def test_the_limit_is_the_longest_that_fits(tokenizer_path: str) -> None:
    fits, too_long = build(tokenizer_path, {"prompt": "abcd"}, {"prompt": "abcde"}, max_prompt_tokens=4)
    assert isinstance(fits, Prompt)
    assert too_long == Overlong(num_tokens=5)


def test_too_long_as_an_error(tokenizer_path: str) -> None:
    message = str(problem(tokenizer_path, {"prompt": "abcde"}, max_prompt_tokens=4, overlong_prompts="error"))
    assert "row 0 (from 0)" in message
    assert "5 tokens" in message
    assert "rollouts.max_prompt_tokens = 4" in message


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ({"question": "a", "answer": "b"}, ["no column 'prompt'", "'answer', 'question'", "Set data.prompt_column"]),
        ({"prompts": "a"}, ["no column 'prompt'", "Did you mean 'prompts'?"]),
        ({"prompt": "a", "completions": []}, ["'completions'", "rename it"]),
        ({"prompt": None}, ["column 'prompt' is null", '[{"role": "user"']),
        ({"prompt": 17}, ["of type int", "a string or a chat list"]),
        ({"prompt": ""}, ["the prompt is empty"]),
        ({"prompt": ["a"]}, ["a chat message is 'a'"]),
        ({"prompt": [{"role": "user"}]}, ["'content' of a chat message is None, not a string"]),
        ({"prompt": [{"role": 1, "content": "a"}]}, ["'role' of a chat message is 1"]),
        ({"prompt": []}, ["refused the prompt", "empty conversation"]),
    ],
)
def test_rows_that_make_no_prompt(tokenizer_path: str, row: dict[str, Any], parts: list[str]) -> None:
    error = problem(tokenizer_path, row)
    assert isinstance(error, DataError)
    assert str(error).startswith("data.jsonl, row 0 (from 0): ")
    for part in parts:
        assert part in str(error)


def test_a_prompt_column_may_bear_a_reward_arguments_name(tokenizer_path: str) -> None:
    assert build_one(tokenizer_path, {"prompts": "a", "n": 1}, prompt_column="prompts").columns == {"n": 1}


@pytest.mark.parametrize(
    ("row", "settings", "field", "part"),
    [
        ({"prompt": "a"}, {"system_prompt": "Be brief."}, "data.system_prompt", "data.as_chat"),
        ({"prompt": [USER]}, {"prompt_template": "{prompt}!"}, "data.prompt_template", "holds chats"),
        (
            {"prompt": [{"role": "system", "content": "x"}, USER]},
            {"system_prompt": "Be brief."},
            "data.system_prompt",
            "a system message of its own",
        ),
    ],
)
def test_settings_that_do_not_go_with_the_rows(
    tokenizer_path: str, row: dict[str, Any], settings: dict[str, Any], field: str, part: str
) -> None:
    error = problem(tokenizer_path, row, **settings)
    assert isinstance(error, ConfigError)
    assert error.field == field
    assert part in error.remedy


def test_a_template_without_a_place_for_the_prompt(tokenizer_path: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.prompt_template = 'Answer\.': write \{prompt\}"):
        build(tokenizer_path, {"prompt": "a"}, prompt_template="Answer.")


def test_a_tokenizer_without_a_chat_template(make_tokenizer: Any) -> None:
    path = make_tokenizer(chat_template=None)
    chat = problem(path, {"prompt": [USER]})
    assert isinstance(chat, DataError)
    assert "has no chat template; name a column of strings in data.prompt_column" in str(chat)
    wrapped = problem(path, {"prompt": "a"}, as_chat=True)
    assert isinstance(wrapped, ConfigError)
    assert wrapped.field == "data.as_chat"


def test_a_token_beyond_the_embedding_is_named_with_its_row(tokenizer_path: str) -> None:
    # Anywhere in the dataset, not only in the rows that are looked at before a run.
    last = max(load_tokenizer(tokenizer_path)("1+1=")["input_ids"])
    fits, short = (build(tokenizer_path, {"prompt": "1+1="}, vocabulary_size=size)[0] for size in (last + 1, last))
    assert isinstance(fits, Prompt)
    assert isinstance(short, DataError)
    assert f"data.jsonl, row 0 (from 0): the prompt has token id {last}, and the model's embedding ends with" in str(
        short
    )
    assert "model.tokenizer_path" in str(short)
