"""After each iteration: what the model wrote and what it got for it, as a Parquet table."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_ray.config.settings import ModelSettings, Settings
from rlhf_ray.reporting.reporter import Reporter
from rlhf_ray.reporting.run_directory import RunDirectory
from rlhf_ray.reporting.token_texts import TokenTexts
from rlhf_ray.types import Float32Array, PromptText, ScoredGroup, Trajectory

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["CompletionsReporter", "completions_path"]


def completions_path(run_dir: RunDirectory, step: int) -> Path:
    """Name the table of one iteration."""
    return run_dir.completions / f"step_{step:06d}.parquet"


class CompletionsReporter(Reporter):
    """Writes ``completions/step_000001.parquet`` every ``reporting.completions_interval`` iterations.

    One row a completion: ``step``, ``group_id``, ``prompt`` (a chat as JSON), ``completion``, ``reward``,
    ``rewards/<function>`` (null where the function did not apply), ``finish_reason``, ``num_tokens`` and ``version``
    (the oldest policy version that wrote a token of it). ``extra/<function>/<column>`` is what a reward function gave
    to ``log_extra``: numbers, texts or bools, as text where they are mixed.

    And lists with an entry a token: ``token_ids``, ``token_texts`` (joined they are ``completion``; null where a
    tokenizer's text does not come apart), ``sampling_logprobs`` in nats, ``token_versions`` and ``advantages`` as they
    entered the loss (null where the completion, or its first tokens, were left out of it).
    """

    def __init__(self) -> None:
        self._run_dir: RunDirectory | None = None
        self._interval = 0
        self._model = ModelSettings()

    def start(self, settings: Settings, run_dir: RunDirectory) -> None:
        """Make the folder."""
        run_dir.completions.mkdir(exist_ok=True)
        self._run_dir = run_dir
        self._interval = settings.reporting.completions_interval
        self._model = settings.model

    def report_completions(
        self, step: int, groups: Sequence[ScoredGroup], advantages: Sequence[Float32Array] | None = None
    ) -> None:
        """Write the iteration's table if it is due."""
        if self._run_dir is None:
            raise RuntimeError("report_completions() before start()")
        if not self._interval or step % self._interval:
            return
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
    extras = list(dict.fromkeys(name for scored in groups for name in scored.extras))
    places = [(scored, index) for scored in groups for index in range(len(scored.group.trajectories))]
    known: Sequence[Float32Array | None] = [None] * len(places) if advantages is None else advantages
    rows = [
        _row(step, scored, index)
        | _tokens(scored.group.trajectories[index], scored.texts[index], token_texts)
        | {"advantages": None if own is None else _or_none(own)}
        for (scored, index), own in zip(places, known, strict=True)
    ]
    table = pa.Table.from_pylist(rows, schema=schema)
    for name in extras:
        values = [scored.extras[name][index] if name in scored.extras else None for scored, index in places]
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


def _row(step: int, scored: ScoredGroup, index: int) -> dict[str, Any]:
    completion = scored.group.trajectories[index]
    by_function = {f"rewards/{name}": float(rewards[index]) for name, rewards in scored.rewards_by_function.items()}
    return {
        "step": step,
        "group_id": scored.group.group_id,
        "prompt": _prompt_text(scored.group.prompt.text),
        "completion": scored.texts[index],
        "reward": float(scored.rewards[index]),
        # NaN stands for a function's None; it is the one number that differs from itself.
        **{name: reward if reward == reward else None for name, reward in by_function.items()},
        "finish_reason": completion.finish_reason,
        "num_tokens": len(completion.token_ids),
        "version": _oldest_version(completion),
    }


def _tokens(completion: Trajectory, text: str, token_texts: TokenTexts) -> dict[str, Any]:
    ids: list[int] = completion.token_ids.tolist()
    return {
        "token_ids": ids,
        "token_texts": token_texts.split(ids, text),
        "sampling_logprobs": completion.sampling_logprobs,
        "token_versions": _versions(completion),
    }


def _versions(completion: Trajectory) -> list[int | None]:
    versions: list[int | None] = [None] * len(completion.token_ids)
    for span in completion.version_spans:
        versions[span.start : span.end] = [span.version] * (span.end - span.start)
    return versions


def _prompt_text(text: PromptText) -> str:
    return text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)


def _oldest_version(completion: Trajectory) -> int | None:
    return min((span.version for span in completion.version_spans), default=None)
