"""prompts/: what can be known about a dataset in a second, before any engine starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.prompts.builder import NumberedRow, Overlong, PromptBuilder
from rlhf_ray.prompts.source import PromptSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["check_source"]

_CHECKED_ROWS = 1000


def check_source(source: PromptSource, builder: PromptBuilder, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make prompts of the first 1,000 rows in this process.

    Raises:
        ConfigError: A setting does not go with the rows.
        DataError: The source cannot be read or is empty, a row makes no prompt, or none of the rows fits the limit.
    """
    rows = source.sample(_CHECKED_ROWS)
    if not rows:
        raise DataError(f"{source.name} is empty: it has no rows")
    numbered = [NumberedRow(prompt_id=i, dataset_row=i, row=row) for i, row in enumerate(rows)]
    outcomes = builder.build(numbered, tokenizer)
    lengths: list[int] = []
    for outcome in outcomes:
        if isinstance(outcome, (DataError, ConfigError)):
            raise outcome
        lengths.append(outcome.num_tokens if isinstance(outcome, Overlong) else len(outcome.token_ids))
    if min(lengths) > builder.max_prompt_tokens:
        raise builder.none_fits(f"none of the first {len(rows)} rows", min(lengths))
