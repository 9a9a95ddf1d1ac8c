from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.errors import ConfigError
from rlhf_ray.prompts.tokenizer import (
    load_tokenizer,
    read_chat_template,
    template_variables,
    turn_end,
    with_chat_template,
)

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_text_a_file_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "chat.jinja").write_text(CHATML, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for given in (CHATML, "chat.jinja", str(tmp_path / "chat.jinja"), "~/chat.jinja"):
        assert read_chat_template(given) == CHATML
    assert read_chat_template(None) is None


@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        ("no/such/file.jinja", "there is no such file (/"),
        ("{% for m in messages %}{{ m }}", "no Jinja template"),
        ("{{ bos_token }}hello", "never uses `messages`"),
        (".", "no such file"),
        ("binary", "cannot be read"),
        ("words", "never uses `messages`"),
    ],
)
def test_what_is_no_template(given: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("binary").write_bytes(b"\xff\xfe\x00")
    Path("words").write_text("hello")
    with pytest.raises(ConfigError) as caught:
        read_chat_template(given)
    assert caught.value.field == "data.chat_template"
    assert remedy in caught.value.remedy


def test_variables_are_those_that_are_given_from_outside() -> None:
    template = "{% set a = b %}{{ a }}{% for m in messages %}{% generation %}{{ m | tojson }}{% endgeneration %}"
    assert template_variables(template + "{% break %}{% endfor %}") == {"b", "messages"}


def test_the_end_of_a_turn(tokenizer_path: str, make_tokenizer: Any) -> None:
    tokenizer = load_tokenizer(tokenizer_path)
    assert turn_end(tokenizer, CHATML, {}) == 1
    assert turn_end(tokenizer, "{{ messages[0].content }}{{ messages[-1].content }}.", {}) is None
    assert turn_end(tokenizer, "{{ raise_exception('no') }}{{ messages }}", {}) is None


def test_another_template_leaves_the_loaded_tokenizer_alone(tokenizer_path: str) -> None:
    tokenizer = load_tokenizer(tokenizer_path)
    before = tokenizer.chat_template
    changed = with_chat_template(tokenizer, CHATML)
    assert (changed.chat_template, tokenizer.chat_template) == (CHATML, before)
    assert with_chat_template(tokenizer, None) is tokenizer
