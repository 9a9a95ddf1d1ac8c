"""prompts/: what can be known about a dataset in a second, before any engine starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.prompts.builder import NumberedRow, Overlong, PromptBuilder
from rlhf_ray.prompts.source import PromptSource
from rlhf_ray.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["check_source"]

_CHECKED_ROWS = 1000


def check_source(
    source: PromptSource,
    builder: PromptBuilder,
    tokenizer: PreTrainedTokenizerBase,
    check_row: Callable[[Mapping[str, Any]], None] | None = None,
) -> None:
    """Make prompts of the first 1,000 rows in this process, and have the rewards look at their columns.

    Args:
        source: The rows.
        builder: Makes prompts of them.
        tokenizer: The model's.
        check_row: Raises ``DataError`` for columns that a reward cannot use; unset: rewards look at nothing.

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
