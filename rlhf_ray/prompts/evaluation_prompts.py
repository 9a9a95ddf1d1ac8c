"""prompts/: a held-out set, all at once and in its own order."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from rlhf_ray.config.settings import DataSettings
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.prompts.builder import Overlong, PromptBuilder
from rlhf_ray.prompts.check import check_source, log_choices
from rlhf_ray.prompts.order import PromptOrder
from rlhf_ray.prompts.reader import PromptReader
from rlhf_ray.prompts.shared_tokenizer import SharedTokenizer
from rlhf_ray.prompts.source import PromptSource, find_eval_source
from rlhf_ray.prompts.tokenizer import load_tokenizer
from rlhf_ray.types import Prompt

__all__ = ["check_prompts", "load_prompts"]

logger = logging.getLogger(__name__)


def check_prompts(
    settings: DataSettings,
    *,
    field: str,
    tokenizer_path: str,
    max_prompt_tokens: int,
    vocabulary_size: int | None = None,
    trust_remote_code: bool = False,
    check_row: Callable[[Mapping[str, Any]], None] | None = None,
) -> None:
    """Find what is wrong with a held-out set without Ray, in about a second.

    Arguments as :func:`load_prompts`, and ``check_row`` as :func:`check_source`'s.

    Raises:
        ConfigError: As in :func:`load_prompts`.
        DataError: The same, as far as the first rows show it.
    """
    source, builder = _checkable(settings, field, tokenizer_path, max_prompt_tokens, vocabulary_size)
    tokenizer = load_tokenizer(tokenizer_path, trust_remote_code=trust_remote_code)
    log_choices(check_source(source, builder, tokenizer, check_row), builder, tokenizer)


def load_prompts(
    settings: DataSettings,
    *,
    field: str,
    tokenizer_path: str,
    max_prompt_tokens: int,
    limit: int | None = None,
    vocabulary_size: int | None = None,
    trust_remote_code: bool = False,
) -> tuple[Prompt, ...]:
    """Load the prompts of a held-out set; those of the quickstart task where its settings name no path.

    Args:
        settings: The set's own settings, its path in ``path``.
        field: The setting that names the set, for messages.
        tokenizer_path: Local folder or hub id.
        max_prompt_tokens: Longest prompt in tokens; longer ones are left out, with a warning, or an error.
        limit: Most prompts, taken from the start of the set; none: all.
        vocabulary_size: Rows of the model's embedding; a prompt with a token beyond them is an error.
        trust_remote_code: Whether to run code that ships with the tokenizer.

    Returns:
        The prompts in the order of the rows; ``prompt_id`` is the number of the row.

    Raises:
        ConfigError: A setting does not go with the rows, or the tokenizer cannot be loaded.
        DataError: The set is missing, cannot be read or is empty, a row makes no prompt, or no prompt fits.
    """
    source, builder = _checkable(settings, field, tokenizer_path, max_prompt_tokens, vocabulary_size)
    check_source(source, builder, load_tokenizer(tokenizer_path, trust_remote_code=trust_remote_code))
    store = source.load()
    order = PromptOrder(store.num_rows, seed=0, shuffle=False)
    tokenizer = SharedTokenizer(tokenizer_path, trust_remote_code=trust_remote_code)
    reader = PromptReader(store, order, builder, tokenizer)
    prompts: list[Prompt] = []
    dropped = 0
    for outcome in reader.outcomes(0, store.num_rows):
        if isinstance(outcome, (DataError, ConfigError)):
            raise outcome
        if isinstance(outcome, Overlong):
            dropped += 1
            continue
        prompts.append(outcome)
        if len(prompts) == limit:
            break
    if dropped:
        logger.warning("%s: %d prompts longer than %d tokens were left out", source.name, dropped, max_prompt_tokens)
    return tuple(prompts)


def _checkable(
    settings: DataSettings, field: str, tokenizer_path: str, max_prompt_tokens: int, vocabulary_size: int | None
) -> tuple[PromptSource, PromptBuilder]:
    source = find_eval_source(settings, field=field)
    builder = PromptBuilder.from_settings(
        settings,
        source_name=source.name,
        max_prompt_tokens=max_prompt_tokens,
        tokenizer_name=tokenizer_path,
        vocabulary_size=vocabulary_size,
    )
    return source, builder
