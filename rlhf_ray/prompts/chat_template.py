"""The template that renders chats, the tokenizer's or one of the run's: its text, its variables, its end of turn."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_ray.errors import ConfigError
from rlhf_ray.untrusted_text import shortened

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedTokenizerBase

__all__ = ["read_chat_template", "template_variables", "turn_end", "with_chat_template"]

_MARKS = ("{{", "{%")


def read_chat_template(given: str | None, field: str = "data.chat_template") -> str | None:
    """The text of a template that a setting gives as text or as a file's path.

    Raises:
        ConfigError: The file cannot be read, or the text is no chat template.
    """
    if given is None:
        return None
    text = given if any(mark in given for mark in _MARKS) else _file_text(given, field)
    try:
        variables = template_variables(text)
    except Exception as failure:  # Jinja's own, and what its extensions raise.
        raise ConfigError(field, shortened(given, 80), f"it is no Jinja template: {failure}") from failure
    if "messages" not in variables:
        raise ConfigError(
            field, shortened(given, 80), "it never uses `messages`, so every chat would be the same prompt"
        )
    return text


@functools.lru_cache(maxsize=8)
def template_variables(template: str) -> frozenset[str]:
    """Names that a template reads and does not set itself."""
    import jinja2.meta
    from transformers.utils.chat_template_utils import _compile_jinja_template

    # transformers' own environment: it has the tags and filters that templates of models use.
    environment = _compile_jinja_template(template).environment
    return frozenset(jinja2.meta.find_undeclared_variables(environment.parse(template)))


def turn_end(tokenizer: PreTrainedTokenizerBase, template: str | None, arguments: Mapping[str, Any]) -> int | None:
    """The special token by which the template ends an assistant's turn; ``None`` where it has none, or cannot say."""
    chat = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    try:
        written = tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False, **arguments)
        begun = tokenizer.apply_chat_template(
            chat, chat_template=template, tokenize=False, continue_final_message=True, **arguments
        )
    # A template is a program that came with the model: it may raise anything.
    except Exception:
        return None
    ids = tokenizer(written[len(begun) :], add_special_tokens=False)["input_ids"]
    return next((token_id for token_id in ids if token_id in tokenizer.added_tokens_decoder), None)


def with_chat_template(tokenizer: PreTrainedTokenizerBase, template: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer with another template; itself where none is given."""
    if template is None:
        return tokenizer
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def _file_text(path: str, field: str) -> str:
    file = Path(path).expanduser()
    if not file.is_file():
        remedy = f"there is no such file ({file.absolute()}); a template's own text has {{{{ or {{% in it"
        raise ConfigError(field, path, remedy)
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as failure:
        raise ConfigError(field, path, f"the file cannot be read: {failure}") from failure
