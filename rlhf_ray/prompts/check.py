"""What can be known about a dataset in a second, before any engine starts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.prompts.builder import Overlong, PromptBuilder
from rlhf_ray.prompts.sources import PromptSource
from rlhf_ray.prompts.tokenizer import special_tokens_around, turn_end
from rlhf_ray.types import ChatMessage, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["check_source"]

logger = logging.getLogger(__name__)

_CHECKED_ROWS = 1000


def check_source(
    source: PromptSource,
    builder: PromptBuilder,
    tokenizer: PreTrainedTokenizerBase,
    *,
    check_row: Callable[[Mapping[str, Any]], None] | None = None,
    stop_token_ids: Collection[int] | None = None,
) -> None:
    """Make prompts of the first 1,000 rows in this process, and have the rewards look at their columns.

    What could be read in two ways, and is not read as the tokenizer would by itself, is logged.

    Args:
        source: The rows.
        builder: Makes prompts of them.
        tokenizer: The model's.
        check_row: Raises ``DataError`` for columns that a reward cannot use; unset: rewards look at nothing.
        stop_token_ids: What ends a completion, to be compared with the chat template; ``None``: not compared.

    Raises:
        ConfigError: A setting does not go with the rows.
        DataError: The source cannot be read or is empty, a row makes no prompt or has an answer that a reward cannot
            use, or none of the rows fits the limit.
    """
    rows = source.sample(_CHECKED_ROWS)
    if not rows:
        raise DataError(f"{source.name} is empty: it has no rows")
    outcomes = builder.build(rows, tokenizer)
    texts = []
    for index, outcome in enumerate(outcomes):
        if isinstance(outcome, (DataError, ConfigError)):
            raise outcome
        if isinstance(outcome, Prompt):
            texts.append(outcome.text)
            try:
                if check_row is not None:
                    check_row(outcome.columns)
            except DataError as error:
                raise DataError(f"{builder.where(index)}: {error}") from error
    if not texts:
        shortest = min(outcome.num_tokens for outcome in outcomes if isinstance(outcome, Overlong))
        raise builder.none_fits(f"none of the first {len(rows)} rows", shortest)
    if strings := [text for text in texts if isinstance(text, str)]:
        _log_special_tokens(strings, builder.source_name, tokenizer)
    if chats := [text for text in texts if not isinstance(text, str)]:
        _log_unfinished(chats, builder)
        if stop_token_ids is not None:
            _log_turn_end(builder, tokenizer, stop_token_ids)


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


def _log_unfinished(chats: Sequence[list[ChatMessage]], builder: PromptBuilder) -> None:
    unfinished = sum(chat[-1]["role"] == "assistant" for chat in chats)
    if unfinished and builder.settings.final_assistant is None:
        logger.warning(
            "%s: %d of the first %d chats end in an assistant message, and completions continue it; set "
            "data.final_assistant to 'continue' if that is meant, or to 'drop' if these are the dataset's answers",
            builder.source_name,
            unfinished,
            len(chats),
        )


def _log_turn_end(builder: PromptBuilder, tokenizer: PreTrainedTokenizerBase, stop_token_ids: Collection[int]) -> None:
    end = turn_end(tokenizer, builder.settings.chat_template, builder.settings.chat_template_kwargs)
    if end is not None and end not in stop_token_ids:
        logger.warning(
            "the chat template ends an assistant's turn with %s (%d), which does not end a completion; to let it, "
            "add %d to rollouts.stop_token_ids",
            tokenizer.convert_ids_to_tokens(end),
            end,
            end,
        )
