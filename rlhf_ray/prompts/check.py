"""prompts/: what can be known about a dataset in a second, before any engine starts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.prompts.builder import NumberedRow, Overlong, PromptBuilder
from rlhf_ray.prompts.chat_template import turn_end
from rlhf_ray.prompts.source import PromptSource
from rlhf_ray.prompts.text_encoding import special_tokens_around
from rlhf_ray.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["check_source", "log_choices"]

logger = logging.getLogger(__name__)

_CHECKED_ROWS = 1000


def check_source(
    source: PromptSource,
    builder: PromptBuilder,
    tokenizer: PreTrainedTokenizerBase,
    check_row: Callable[[Mapping[str, Any]], None] | None = None,
) -> list[Prompt]:
    """Make prompts of the first 1,000 rows in this process, and have the rewards look at their columns.

    Args:
        source: The rows.
        builder: Makes prompts of them.
        tokenizer: The model's.
        check_row: Raises ``DataError`` for columns that a reward cannot use; unset: rewards look at nothing.

    Returns:
        Those that are not dropped for their length.

    Raises:
        ConfigError: A setting does not go with the rows.
        DataError: The source cannot be read or is empty, a row makes no prompt or has an answer that a reward cannot
            use, or none of the rows fits the limit.
    """
    rows = source.sample(_CHECKED_ROWS)
    if not rows:
        raise DataError(f"{source.name} is empty: it has no rows")
    numbered = [NumberedRow(prompt_id=i, dataset_row=i, row=row) for i, row in enumerate(rows)]
    outcomes = builder.build(numbered, tokenizer)
    lengths: list[int] = []
    for row, outcome in enumerate(outcomes):
        if isinstance(outcome, (DataError, ConfigError)):
            raise outcome
        if check_row is not None and isinstance(outcome, Prompt):
            try:
                check_row(outcome.columns)
            except DataError as error:
                raise DataError(f"{source.name}, row {row} (from 0): {error}") from error
        lengths.append(outcome.num_tokens if isinstance(outcome, Overlong) else len(outcome.token_ids))
    if min(lengths) > builder.max_prompt_tokens:
        raise builder.none_fits(f"none of the first {len(rows)} rows", min(lengths))
    return [outcome for outcome in outcomes if isinstance(outcome, Prompt)]


def log_choices(
    prompts: Sequence[Prompt],
    builder: PromptBuilder,
    tokenizer: PreTrainedTokenizerBase,
    *,
    stop_token_ids: Collection[int] | None = None,
) -> None:
    """Log what was decided about prompts that could be read in two ways, where it changes what a tokenizer would do.

    Args:
        prompts: Of one source.
        builder: What made them.
        tokenizer: The model's.
        stop_token_ids: What ends a completion; ``None``: not looked at.
    """
    texts = [prompt.text for prompt in prompts if isinstance(prompt.text, str)]
    if texts:
        _log_special_tokens(texts, builder.source_name, tokenizer)
    chats = [prompt.text for prompt in prompts if isinstance(prompt.text, list)]
    unfinished = sum(chat[-1]["role"] == "assistant" for chat in chats)
    if unfinished and builder.final_assistant is None:
        logger.warning(
            "%s: %d of the first %d chats end in an assistant message, and completions continue it; set "
            "data.final_assistant to 'continue' if that is meant, or to 'drop' if these are the dataset's answers",
            builder.source_name,
            unfinished,
            len(chats),
        )
    if chats and stop_token_ids is not None:
        end = turn_end(tokenizer, builder.chat_template, builder.chat_template_kwargs)
        if end is not None and end not in stop_token_ids:
            logger.warning(
                "the chat template ends an assistant's turn with %s (%d), which does not end a completion; to let it, "
                "add %d to rollouts.stop_token_ids",
                tokenizer.convert_ids_to_tokens(end),
                end,
                end,
            )


def _log_special_tokens(texts: Sequence[str], source_name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    before, after = special_tokens_around(tokenizer)
    own = sum(text.startswith(tokenizer.decode(before[:1])) for text in texts) if before else 0
    if not (own or after):
        return
    logger.warning(
        "%s: string prompts begin with %s, which %d of the first %d have in their text and are not given again; at the "
        "end the tokenizer would append %s, which is left out",
        source_name,
        tokenizer.decode(before) or "no special token",
        own,
        len(texts),
        tokenizer.decode(after) or "nothing",
    )
