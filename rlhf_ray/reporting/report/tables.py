"""Completion tables of a run as the report embeds them: some iterations, some groups of each, all within a budget."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["MAX_COMPLETIONS", "Tables", "read_tables", "spread"]

Item = TypeVar("Item")

MAX_COMPLETIONS = 64
_MAX_TOKENS = 2000
"""Of one completion; the middle of a longer one is left out."""
_MAX_CHARACTERS = 8000
"""Of a prompt, and of a completion without tokens."""
_CHARACTERS_A_TOKEN = 4

_NEEDED = ("group_id", "prompt", "completion", "reward")
_TOKEN_LISTS = {
    "token_ids": "ids",
    "token_texts": "texts",
    "sampling_logprobs": "logprobs",
    "token_versions": "versions",
    "advantages": "advantages",
}
"""Column -> its name in the page."""
_DIGITS, _TOKEN_DIGITS = 6, 3
"""Significant ones, of a reward and of a token's numbers, which are most of the page's size."""


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
    chosen = _chosen_rows(table, max_tokens)
    groups = _groups(table)
    rows = table.take(pa.array(chosen, pa.int64())).to_pylist()
    numbers = {group: number for number, group in enumerate(dict.fromkeys(row["group_id"] for row in rows))}
    prompts = {row["group_id"]: row["prompt"] for row in rows}
    return {
        "step": int(rows[0]["step"]) if rows and "step" in rows[0] else _step_of_name(path),
        "total": table.num_rows,
        "groups": [
            {"id": group, "prompt": _prompt(prompts[group]), "mean": _rounded(_mean(groups[group]["rewards"]))}
            for group in numbers
        ],
        "rows": [_row(row, numbers[row["group_id"]]) for row in rows],
    }


def _chosen_rows(table: pa.Table, max_tokens: int) -> list[int]:
    """Rows of whole groups spread over the table, as far as the limits go."""
    groups = list(_groups(table).values())
    costs = _costs(table)
    size = max((len(group["rows"]) for group in groups), default=1)
    chosen: list[int] = []
    spent = 0
    for group in spread(groups, max(1, MAX_COMPLETIONS // size)):
        for row in group["rows"]:
            if chosen and (len(chosen) == MAX_COMPLETIONS or spent + costs[row] > max_tokens):
                return chosen
            chosen.append(row)
            spent += costs[row]
    return chosen


def _groups(table: pa.Table) -> dict[int, dict[str, list[Any]]]:
    groups: dict[int, dict[str, list[Any]]] = {}
    pairs = zip(table["group_id"].to_pylist(), table["reward"].to_pylist(), strict=True)
    for row, (group, reward) in enumerate(pairs):
        of_group = groups.setdefault(group, {"rows": [], "rewards": []})
        of_group["rows"].append(row)
        of_group["rewards"].append(reward)
    return groups


def _costs(table: pa.Table) -> list[int]:
    """What each row weighs in tokens."""
    if "num_tokens" in table.column_names:
        return [min(_MAX_TOKENS, count or 1) for count in table["num_tokens"].to_pylist()]
    import pyarrow.compute as pc

    characters = pc.utf8_length(table["completion"]).to_pylist()
    return [min(_MAX_TOKENS, 1 + (count or 0) // _CHARACTERS_A_TOKEN) for count in characters]


def _row(row: Mapping[str, Any], group: int) -> dict[str, Any]:
    functions = {
        name.removeprefix("rewards/"): _rounded(value)
        for name, value in row.items()
        if name.startswith("rewards/") and value is not None
    }
    content = {
        "group": group,
        "reward": _rounded(row["reward"]),
        "functions": functions if len(functions) > 1 else {},
        "finish": row.get("finish_reason"),
        "tokens": row.get("num_tokens"),
        "version": row.get("version"),
    }
    lists = _token_lists(row)
    if "texts" in lists:
        return content | _cut_tokens(lists)
    return content | {"text": _cut_text(row["completion"])}


def _token_lists(row: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The row's token lists that fit its text, by their names in the page; none without the texts of the tokens."""
    texts = row.get("token_texts")
    if texts is None or "".join(texts) != row["completion"]:
        return {}
    found = {name: row[column] for column, name in _TOKEN_LISTS.items() if row.get(column) is not None}
    return {name: values for name, values in found.items() if len(values) == len(texts)}


def _cut_tokens(lists: Mapping[str, list[Any]]) -> dict[str, Any]:
    length, half = len(lists["texts"]), _MAX_TOKENS // 2
    cut: dict[str, Any] = {}
    for name, values in lists.items():
        kept = values if length <= _MAX_TOKENS else values[:half] + values[-half:]
        cut[name] = [_rounded(value, _TOKEN_DIGITS) for value in kept] if name in ("logprobs", "advantages") else kept
    if length > _MAX_TOKENS:
        cut["omitted"] = {"at": half, "count": length - 2 * half}
    return cut


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


def _step_of_name(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))


def _mean(rewards: Sequence[float | None]) -> float | None:
    known = [reward for reward in rewards if reward is not None]
    return sum(known) / len(known) if known else None


def _rounded(value: float | None, digits: int = _DIGITS) -> float | None:
    # NaN and infinities have no name in JSON.
    return float(f"{value:.{digits}g}") if value is not None and math.isfinite(value) else None
