"""prompts/: the special tokens that a tokenizer puts around a text, and texts that no tokenizer takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlhf_ray.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["special_tokens_around", "text_flaw", "with_special_tokens"]

_PROBES = ("a", "1", ".")


def special_tokens_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer puts before a text and after it.

    Raises:
        ConfigError: What it makes of a letter is not part of what it makes of it with special tokens.
    """
    for probe in _PROBES:
        bare = list(tokenizer(probe, add_special_tokens=False)["input_ids"])
        full = list(tokenizer(probe, add_special_tokens=True)["input_ids"])
        for start in range(len(full) - len(bare) + 1) if bare else ():
            if full[start : start + len(bare)] == bare:
                return full[:start], full[start + len(bare) :]
    remedy = "it cannot be told which special tokens it adds to a text; give prompts as chats, or another tokenizer"
    raise ConfigError("model.tokenizer_path", tokenizer.name_or_path, remedy)


def with_special_tokens(ids: Sequence[int], before: Sequence[int], after: Sequence[int] = ()) -> list[int]:
    """Put special tokens around the ids of a text, which may begin with the first or end with the last of its own.

    Args:
        ids: ``[T]``, without special tokens but those that the text itself holds.
        before: BOS and its like.
        after: EOS and its like; none for a text that a completion continues.

    Returns:
        ``[T + added]``.
    """
    start = [] if ids[:1] == before[:1] else before
    end = [] if ids[-1:] == after[-1:] else after
    return [*start, *ids, *end]


def text_flaw(text: str) -> str | None:
    """Say why no tokenizer takes a text: half of a surrogate pair, as JSON can write it, is no character."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as failure:
        half = text[failure.start]
        return f"holds a lone surrogate, {half!r}, half of a character that was cut in two; fix the text"
    return None
