"""What the model wrote and which rewards it got, as a Parquet table per iteration."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_ray.config.settings import Settings
from rlhf_ray.reporting.reporter import Reporter
from rlhf_ray.reporting.run_directory import RunDirectory
from rlhf_ray.reporting.token_texts import TokenTexts
from rlhf_ray.types import Float32Array, PromptText, ScoredGroup

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["CompletionsReporter", "completions_path", "prompt_text"]


def completions_path(run_dir: RunDirectory, step: int) -> Path:
    """Name the table of one iteration."""
    return run_dir.completions / f"step_{step:06d}.parquet"


def prompt_text(text: PromptText) -> str:
    """A prompt as text: a chat as JSON."""
    return text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)


class CompletionsReporter(Reporter):
    """Writes ``completions/step_000001.parquet`` every ``reporting.completions_interval`` iterations.

    One row per completion: ``step``, ``group_id``, ``prompt`` (a chat as JSON), ``completion``, ``reward``,
    ``rewards/<function>`` (null where the function did not apply), ``finish_reason``, ``num_tokens`` and ``version``
    (the oldest policy version that wrote a token of it). ``extra/<function>/<column>`` is what a reward function gave
    to ``log_extra``: numbers, texts or bools, as text where they are mixed.

    And lists with an entry per token: ``token_ids``, ``token_texts`` (joined they are ``completion``; null where a
    tokenizer's text does not come apart), ``sampling_logprobs`` in nats, ``token_versions`` and ``advantages`` as they
    entered the loss (null where the completion, or its first tokens, were left out of it).
    """

    def __init__(self, settings: Settings, run_dir: RunDirectory) -> None:
        run_dir.completions.mkdir(exist_ok=True)
        self._run_dir = run_dir
        self._model = settings.model

    def report_completions(
        self, step: int, groups: Sequence[ScoredGroup], advantages: Sequence[Float32Array] | None = None
    ) -> None:
        """Write the iteration's table."""
        import pyarrow.parquet as pq

        path = completions_path(self._run_dir, step)
        unfinished = path.with_suffix(".tmp")
        pq.write_table(_table(step, groups, advantages, self._token_texts), unfinished)
        # A reader that follows the folder must never open half a table.
        os.replace(unfinished, path)

    @cached_property
    def _token_texts(self) -> TokenTexts:
        from rlhf_ray.prompts.tokenizer import load_tokenizer
        from rlhf_ray.quickstart import model_path

        path = self._model.tokenizer_path or self._model.path or model_path()
        return TokenTexts(load_tokenizer(path, trust_remote_code=self._model.trust_remote_code))


def _table(
    step: int, groups: Sequence[ScoredGroup], advantages: Sequence[Float32Array] | None, token_texts: TokenTexts
) -> pa.Table:
    import pyarrow as pa

    functions = list(dict.fromkeys(name for scored in groups for name in scored.rewards_by_function))
    schema = pa.schema(
        [
            ("step", pa.int64()),
            ("group_id", pa.int64()),
            ("prompt", pa.string()),
            ("completion", pa.string()),
            ("reward", pa.float32()),
            *((f"rewards/{name}", pa.float32()) for name in functions),
            ("finish_reason", pa.string()),
            ("num_tokens", pa.int32()),
            ("version", pa.int32()),
            ("token_ids", pa.list_(pa.int32())),
            ("token_texts", pa.list_(pa.string())),
            ("sampling_logprobs", pa.list_(pa.float32())),
            ("token_versions", pa.list_(pa.int32())),
            ("advantages", pa.list_(pa.float32())),
        ]
    )
    rows = [
        _row(step, scored, index, token_texts) for scored in groups for index in range(len(scored.group.trajectories))
    ]
    if advantages is not None:
        for row, own in zip(rows, advantages, strict=True):
            row["advantages"] = _or_none(own)
    table = pa.Table.from_pylist(rows, schema=schema)
    for name in dict.fromkeys(name for scored in groups for name in scored.extras):
        values = [value for scored in groups for value in scored.extras.get(name, [None] * len(scored.texts))]
        table = table.append_column(f"extra/{name}", _column(values))
    return table


def _column(values: Sequence[Any]) -> pa.Array:
    import pyarrow as pa

    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):  # of several types, or numbers of more than 64 bits
        return pa.array([None if value is None else str(value) for value in values])


def _or_none(values: Float32Array) -> list[float | None] | None:
    """One value per token, ``None`` at tokens that do not enter the losses; unset where none does."""
    listed = [None if value != value else value for value in values.tolist()]
    return listed if any(value is not None for value in listed) else None


def _row(step: int, scored: ScoredGroup, index: int, token_texts: TokenTexts) -> dict[str, Any]:
    completion, text = scored.group.trajectories[index], scored.texts[index]
    ids: list[int] = completion.token_ids.tolist()
    by_function = {f"rewards/{name}": float(rewards[index]) for name, rewards in scored.rewards_by_function.items()}
    versions: list[int | None] = [None] * len(ids)
    for span in completion.version_spans:
        versions[span.start : span.end] = [span.version] * (span.end - span.start)
    return {
        "step": step,
        "group_id": scored.group.group_id,
        "prompt": prompt_text(scored.group.prompt.text),
        "completion": text,
        "reward": float(scored.rewards[index]),
        # NaN stands for a function's None; it is the one number that differs from itself.
        **{name: reward if reward == reward else None for name, reward in by_function.items()},
        "finish_reason": completion.finish_reason,
        "num_tokens": len(ids),
        "version": min((span.version for span in completion.version_spans), default=None),
        "token_ids": ids,
        "token_texts": token_texts.split(ids, text),
        "sampling_logprobs": completion.sampling_logprobs,
        "token_versions": versions,
    }
