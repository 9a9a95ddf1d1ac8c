"""Completion tables of a run as the report embeds them: some iterations, some groups of each, all within a budget."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rlhf_ray.reporting.report.conversation import conversation, is_conversation
from rlhf_ray.reporting.report.page import rounded

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["MAX_COMPLETIONS", "Tables", "read_tables", "spread"]

Item = TypeVar("Item")

MAX_COMPLETIONS = 64
_MAX_TOKENS = 2000
"""Of one completion; the middle of a longer one is left out."""
_HALF = _MAX_TOKENS // 2
_MAX_CHARACTERS = 8000
"""Of a prompt, and of a completion without tokens."""
_CHARACTERS_PER_TOKEN = 4

_NEEDED = ("group_id", "prompt", "completion", "reward")
_TOKEN_LISTS = {
    "token_ids": "ids",
    "token_texts": "texts",
    "sampling_logprobs": "logprobs",
    "token_versions": "versions",
    "advantages": "advantages",
    "values": "values",
}
"""Column -> its name in the page."""
_TOKEN_DIGITS = 3
"""Significant ones of a token's numbers, which are most of the page's size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tables:
    """The tables of a run."""

    contents: Sequence[Mapping[str, Any]]
    """As the page reads them, in the order of iterations."""
    notes: Sequence[str]
    """What a reader of the report should know is missing."""


def read_tables(folder: Path, *, count: int, max_tokens: int) -> Tables:
    """Read tables spread over the run, the first and the last among them.

    Args:
        folder: ``completions/`` of a run directory.
        count: Tables at most.
        max_tokens: Of each table, at most; a table has one completion at least.
    """
    import pyarrow as pa

    paths = sorted(folder.glob("step_*.parquet"))
    if not paths:
        return Tables(contents=(), notes=("There are no completions (reporting.completions_interval).",))
    contents, notes = [], []
    for path in spread(paths, count):
        try:
            contents.append(_read(path, max_tokens))
        # One table that was cut by a full disk, or is something else, must not cost the report.
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            notes.append(f"completions/{path.name} cannot be read ({type(error).__name__}).")
    return Tables(contents=contents, notes=notes)


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """At most ``count`` of the items, evenly spaced, the first and the last among them; of one, the last."""
    if count >= len(items):
        return list(items)
    if count == 1:
        return [items[-1]]
    return [items[index * (len(items) - 1) // (count - 1)] for index in range(count)]


def _read(path: Path, max_tokens: int) -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    if missing := [name for name in _NEEDED if name not in table.column_names]:
        raise KeyError(*missing)
    rows_of: dict[int, list[int]] = {}
    for row, group in enumerate(table["group_id"].to_pylist()):
        rows_of.setdefault(group, []).append(row)
    chosen = _chosen_rows(list(rows_of.values()), _costs(table), max_tokens)
    rows = table.take(pa.array(chosen, pa.int64())).to_pylist()
    prompts = {row["group_id"]: row["prompt"] for row in rows}
    numbers = {group: number for number, group in enumerate(prompts)}
    rewards = table["reward"].to_pylist()
    return {
        "step": int(rows[0]["step"]) if rows and "step" in rows[0] else int(path.stem.removeprefix("step_")),
        "total": table.num_rows,
        "groups": [
            {"id": group, "prompt": _prompt(prompt), "mean": rounded(_mean([rewards[row] for row in rows_of[group]]))}
            for group, prompt in prompts.items()
        ],
        "rows": [_row(row, numbers[row["group_id"]]) for row in rows],
    }


def _chosen_rows(groups: Sequence[Sequence[int]], costs: Sequence[int], max_tokens: int) -> list[int]:
    """Rows of whole groups spread over the table, as far as the limits allow."""
    size = max((len(rows) for rows in groups), default=1)
    chosen: list[int] = []
    spent = 0
    for row in itertools.chain.from_iterable(spread(groups, max(1, MAX_COMPLETIONS // size))):
        if chosen and (len(chosen) == MAX_COMPLETIONS or spent + costs[row] > max_tokens):
            break
        chosen.append(row)
        spent += costs[row]
    return chosen


def _costs(table: pa.Table) -> list[int]:
    """What each row weighs in tokens."""
    if "num_tokens" in table.column_names:
        return [min(_MAX_TOKENS, count or 1) for count in table["num_tokens"].to_pylist()]
    import pyarrow.compute as pc

    characters = pc.utf8_length(table["completion"]).to_pylist()
    return [min(_MAX_TOKENS, 1 + (count or 0) // _CHARACTERS_PER_TOKEN) for count in characters]


def _row(row: Mapping[str, Any], group: int) -> dict[str, Any]:
    functions = {
        name.removeprefix("rewards/"): rounded(value)
        for name, value in row.items()
        if name.startswith("rewards/") and value is not None
    }
    content = {
        "group": group,
        "reward": rounded(row["reward"]),
        "functions": functions if len(functions) > 1 else {},
        "finish": row.get("finish_reason"),
        "tokens": row.get("num_tokens"),
        "version": row.get("version"),
    }
    if row.get("environment"):
        content["environment"] = row["environment"]
    texts, several = row.get("token_texts"), is_conversation(row)
    # Lists that do not fit the text, as of a run under another version, are not shown.
    if texts is None or ("".join(texts) != row["completion"] and not several):
        return content | {"text": _cut_text(row["completion"])}
    if several:
        content |= conversation(row, _kept)
    for column, name in _TOKEN_LISTS.items():
        values = row.get(column)
        if values is not None and len(values) == len(texts):
            kept = _kept(values)
            numbers = name in ("logprobs", "advantages", "values")
            content[name] = [rounded(value, _TOKEN_DIGITS) for value in kept] if numbers else kept
    if len(texts) > _MAX_TOKENS:
        content["omitted"] = {"at": _HALF, "count": len(texts) - 2 * _HALF}
    return content


def _kept(values: list[Any]) -> list[Any]:
    """What the page shows of a list with an entry per token."""
    return values if len(values) <= _MAX_TOKENS else values[:_HALF] + values[-_HALF:]


def _prompt(prompt: str) -> list[dict[str, str]]:
    """The prompt's messages; a plain one is a message without a role."""
    return [{"role": role, "text": _cut_text(text)} for role, text in _messages(prompt)]


def _messages(prompt: str) -> Iterator[tuple[str, str]]:
    try:
        chat = json.loads(prompt) if prompt.startswith("[{") else None
    except ValueError:
        chat = None
    if isinstance(chat, list) and all(isinstance(message, dict) and "role" in message for message in chat):
        yield from ((str(message["role"]), str(message.get("content", ""))) for message in chat)
    else:
        yield "", prompt


def _cut_text(text: str) -> str:
    half = _MAX_CHARACTERS // 2
    if len(text) <= _MAX_CHARACTERS:
        return text
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters left out ...]\n{text[-half:]}"


def _mean(rewards: Sequence[float | None]) -> float | None:
    known = [reward for reward in rewards if reward is not None]
    return sum(known) / len(known) if known else None
