from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_ray.config.settings import DataSettings
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.prompts.builder import Outcome, Overlong, PromptBuilder
from rlhf_ray.prompts.tokenizer import load_tokenizer
from rlhf_ray.types import Prompt

USER = {"role": "user", "content": "1+1?"}
CHAT_TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}<assistant>"


def build(
    tokenizer_path: str,
    *rows: dict[str, Any],
    max_prompt_tokens: int = 1000,
    vocabulary_size: int | None = None,
    **settings: Any,
) -> list[Outcome]:
    builder = PromptBuilder(
        DataSettings(**settings),
        source_name="data.jsonl",
        max_prompt_tokens=max_prompt_tokens,
        tokenizer_name=tokenizer_path,
        vocabulary_size=vocabulary_size,
    )
    return builder.build(rows, load_tokenizer(tokenizer_path), first_id=100)


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


# Special tokens around string prompts.


@pytest.mark.parametrize("begin", [False, True])
@pytest.mark.parametrize("end", [False, True])
@pytest.mark.parametrize("own_begin", ["", "<s>"])
@pytest.mark.parametrize("settings", [{}, {"prompt_template": "{own}Q: {prompt} A:"}])
def test_a_string_prompt_begins_with_one_bos_and_ends_open(
    make_tokenizer: Any, begin: bool, end: bool, own_begin: str, settings: dict[str, str]
) -> None:
    path = make_tokenizer(begin=begin, end=end)
    settings = {name: template.replace("{own}", own_begin) for name, template in settings.items()}
    prompt = build_one(path, {"prompt": "ab" if settings else f"{own_begin}ab"}, **settings)
    begins = "<s>" if begin or own_begin else ""
    assert decode(path, prompt) == begins + ("Q: ab A:" if settings else "ab")


def test_a_rendered_chat_in_a_string_gets_no_second_bos(make_tokenizer: Any) -> None:
    path = make_tokenizer(begin=True, end=True)
    tokenizer = load_tokenizer(path)
    rendered = "<s>" + tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
    assert decode(path, build_one(path, {"prompt": rendered})) == rendered


def test_an_eos_of_the_texts_own_stays(make_tokenizer: Any) -> None:
    path = make_tokenizer(end=True)
    assert decode(path, build_one(path, {"prompt": "ab</s>"})) == "ab</s>"


def test_chats_have_only_the_special_tokens_of_their_template(make_tokenizer: Any) -> None:
    path = make_tokenizer(begin=True, end=True, chat_template="<s>" + CHAT_TEMPLATE)
    assert decode(path, build_one(path, {"prompt": [USER]})) == "<s><user>1+1?</s><assistant>"


# Chats that end in an assistant message.

BEGUN = [USER, {"role": "assistant", "content": "It is"}]


@pytest.mark.parametrize("settings", [{}, {"final_assistant": "continue"}])
def test_a_completion_continues_the_final_assistant_message(tokenizer_path: str, settings: dict[str, str]) -> None:
    prompt = build_one(tokenizer_path, {"prompt": BEGUN}, **settings)
    assert prompt.text == BEGUN
    assert decode(tokenizer_path, prompt) == "<user>1+1?</s><assistant>It is"
    # Chats that end in a user message are asked for an answer as ever.
    assert decode(tokenizer_path, build_one(tokenizer_path, {"prompt": [USER]}, **settings)).endswith("</s><assistant>")


def test_the_answer_of_the_dataset_is_dropped(tokenizer_path: str) -> None:
    chat = [*BEGUN, {"role": "user", "content": "sure?"}, {"role": "assistant", "content": "yes"}]
    prompt = build_one(tokenizer_path, {"prompt": chat}, final_assistant="drop")
    assert prompt.text == chat[:3]
    assert decode(tokenizer_path, prompt) == "<user>1+1?</s><assistant>It is</s><user>sure?</s><assistant>"
    several = build_one(tokenizer_path, {"prompt": [*BEGUN, BEGUN[1]]}, final_assistant="drop")
    assert several.text == [USER]
    error = problem(tokenizer_path, {"prompt": BEGUN[1:]}, final_assistant="drop")
    assert "row 0 (from 0): the chat holds assistant messages alone" in str(error)


def test_calls_of_tools_cannot_be_continued(tokenizer_path: str) -> None:
    chat = [USER, {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}]
    assert "set data.final_assistant to 'drop'" in str(problem(tokenizer_path, {"prompt": chat}))
    assert build_one(tokenizer_path, {"prompt": chat}, final_assistant="drop").text == [USER]


# Texts that no tokenizer takes.


def test_a_lone_surrogate_is_named_and_spoils_no_other_row(tokenizer_path: str) -> None:
    half = "\ud83d"
    rows = [{"prompt": "a"}, {"prompt": f"b{half}"}, {"prompt": [USER]}, {"prompt": [{**USER, "content": half}]}]
    outcomes = build(tokenizer_path, *rows, {"prompt": "c"})
    assert [type(outcome) for outcome in outcomes] == [Prompt, DataError, Prompt, DataError, Prompt]
    for index in (1, 3):
        message = f"data.jsonl, row {index} (from 0): the prompt in column 'prompt' holds a lone surrogate, '\\ud83d'"
        assert str(outcomes[index]).startswith(message)


def test_what_a_tokenizer_refuses_falls_on_its_row(tokenizer_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(tokenizer_path)

    class Picky:
        chat_template = None

        def __call__(self, texts: str | list[str], **options: Any) -> Any:
            if "b" in texts:
                raise ValueError("no b here")
            return tokenizer(texts, **options)

    builder = PromptBuilder(DataSettings(), source_name="data.jsonl", max_prompt_tokens=9, tokenizer_name="picky")
    outcomes = builder.build([{"prompt": text} for text in "abc"], Picky())  # type: ignore[arg-type]
    assert [type(outcome) for outcome in outcomes] == [Prompt, DataError, Prompt]
    assert str(outcomes[1]) == "data.jsonl, row 1 (from 0): the tokenizer refused the prompt: no b here"


@pytest.mark.parametrize("value", [float("nan"), b"bytes", {"role": "user"}, True, np.float32(1)])
def test_prompts_of_other_types(tokenizer_path: str, value: Any) -> None:
    good, bad = build(tokenizer_path, {"prompt": "a"}, {"prompt": value})
    assert isinstance(good, Prompt)
    assert f"row 1 (from 0): the prompt in column 'prompt' is of type {type(value).__name__}" in str(bad)


# The chat template and its arguments.

THINKING = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>"
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
    "{% if budget is defined %}[{{ budget }}]{% endif %}{% endif %}"
)
"""As Qwen3's."""


@pytest.mark.parametrize(
    ("of_run", "of_row", "expected"),
    [
        ({}, None, "<assistant>"),
        ({"enable_thinking": False}, None, "<assistant><think></think>"),
        ({"enable_thinking": False}, {"enable_thinking": True}, "<assistant>"),
        ({"enable_thinking": False}, {"budget": 5}, "<assistant><think></think>[5]"),
        ({}, {"enable_thinking": False}, "<assistant><think></think>"),
    ],
)
def test_arguments_of_the_template(
    make_tokenizer: Any, of_run: dict[str, Any], of_row: dict[str, Any] | None, expected: str
) -> None:
    path = make_tokenizer(chat_template=THINKING)
    row = {"prompt": [USER], "chat_template_kwargs": of_row}
    assert decode(path, build_one(path, row, chat_template_kwargs=of_run)) == f"<user>1+1?</s>{expected}"
    as_chat = build_one(path, row | {"prompt": "1+1?"}, chat_template_kwargs=of_run, as_chat=True)
    assert decode(path, as_chat) == f"<user>1+1?</s>{expected}"


@pytest.mark.parametrize("name", ["enable_thinkin", "messages", "tokenize", "add_generation_prompt"])
def test_arguments_that_the_template_does_not_read(make_tokenizer: Any, name: str) -> None:
    path = make_tokenizer(chat_template=THINKING)
    error = problem(path, {"prompt": [USER]}, chat_template_kwargs={name: False})
    assert isinstance(error, ConfigError)
    assert error.field == "data.chat_template_kwargs"
    assert f"does not read {name!r}; it reads budget, enable_thinking" in error.remedy
    error = problem(path, {"prompt": [USER], "chat_template_kwargs": {name: False}})
    assert isinstance(error, DataError)
    assert str(error).startswith("data.jsonl, row 0 (from 0): in column 'chat_template_kwargs', the chat template")


def test_arguments_of_a_row_are_a_mapping_and_for_chats(tokenizer_path: str) -> None:
    error = problem(tokenizer_path, {"prompt": [USER], "chat_template_kwargs": "enable_thinking"})
    assert "'chat_template_kwargs' is 'enable_thinking', not a mapping" in str(error)
    error = problem(tokenizer_path, {"prompt": "a", "chat_template_kwargs": {"budget": 1}})
    assert "the prompt is a string; set data.as_chat" in str(error)


def test_a_template_of_the_run(make_tokenizer: Any, tmp_path: Path) -> None:
    path = make_tokenizer(chat_template=None)
    (tmp_path / "chat.jinja").write_text(THINKING)
    for given in (THINKING, str(tmp_path / "chat.jinja")):
        prompt = build_one(path, {"prompt": [USER]}, chat_template=given, chat_template_kwargs={"budget": 2})
        assert decode(path, prompt) == "<user>1+1?</s><assistant>[2]"
    refuses = "{{ messages }}{{ raise_exception('no') }}"
    assert "data.chat_template refused the prompt: no" in str(problem(path, {"prompt": [USER]}, chat_template=refuses))


@pytest.mark.parametrize(
    "settings", [{"chat_template": THINKING}, {"chat_template_kwargs": {"budget": 1}}, {"system_prompt": "Be brief."}]
)
def test_settings_of_chats_and_string_prompts(tokenizer_path: str, settings: dict[str, Any]) -> None:
    error = problem(tokenizer_path, {"prompt": "a"}, **settings)
    assert isinstance(error, ConfigError)
    assert error.field == f"data.{next(iter(settings))}"
    assert "set data.as_chat" in error.remedy


def test_calls_of_tools_may_have_no_content(make_tokenizer: Any) -> None:
    path = make_tokenizer(chat_template="{% for m in messages %}{{ m.content }}{{ m.tool_calls | tojson }}{% endfor %}")
    call = {"function": {"name": "f", "arguments": {"a": None}}}
    prompt = build_one(path, {"prompt": [{"role": "tool", "content": None, "tool_calls": [call]}]})
    assert decode(path, prompt) == '[{"function": {"name": "f", "arguments": {"a": null}}}]'


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
