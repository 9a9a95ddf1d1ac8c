"""What the model wrote and which rewards it got, as a Parquet table per iteration."""

from __future__ import annotations

import itertools
import json
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_ray.config.settings import Settings
from rlhf_ray.reporting.reporter import Reporter
from rlhf_ray.reporting.run_directory import RunDirectory
from rlhf_ray.reporting.token_texts import TokenTexts
from rlhf_ray.types import Float32Array, PromptText, ScoredGroup, TokenEstimates, Trajectory

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

    One row per trajectory: ``step``, ``group_id``, ``environment`` (null: none), ``prompt`` (a chat as JSON),
    ``completion``, ``reward``, ``rewards/<function>`` (null where the function did not apply), ``finish_reason``,
    ``num_tokens`` (observed ones too), ``num_turns`` and ``version`` (the oldest policy version that wrote a token of
    it). ``extra/<function>/<column>`` is what a reward function gave to ``log_extra``: numbers, texts or bools, as text
    where they are mixed.

    Lists with an entry per token: ``token_ids``, ``token_texts`` (joined they are ``completion`` where all was sampled
    in one turn; null where a tokenizer's text does not come apart), ``sampled`` (false: observed), ``turn`` (index of
    its turn; observed tokens have that of the turn before), ``sequence`` (0, and from 1 on the further ones, whose
    history was rewritten), ``sampling_logprobs`` in nats, ``token_versions``, ``advantages`` as they entered the loss,
    and ``values``, the critic's before the update of what was before the token, in reward (null without a critic). The
    last four are null at observed tokens; advantages and values also where the trajectory, or some of its tokens, were
    left out of the losses.

    ``turn_rewards`` has an entry per turn, ``further_prompts`` the prompt's token ids of each further sequence.
    ``messages`` is what came after the prompt as a chat in JSON (null for texts): each turn's message of the assistant,
    and what was observed after it; ``message_turns`` has the turn of each message.
    """

    def __init__(self, settings: Settings, run_dir: RunDirectory) -> None:
        run_dir.completions.mkdir(exist_ok=True)
        self._run_dir = run_dir
        self._model = settings.model

    def report_completions(
        self, step: int, groups: Sequence[ScoredGroup], estimates: Sequence[TokenEstimates] | None = None
    ) -> None:
        """Write the iteration's table."""
        import pyarrow.parquet as pq

        path = completions_path(self._run_dir, step)
        unfinished = path.with_suffix(".tmp")
        pq.write_table(_table(step, groups, estimates, self._token_texts), unfinished)
        # A reader that follows the folder must never open half a table.
        os.replace(unfinished, path)

    @cached_property
    def _token_texts(self) -> TokenTexts:
        from rlhf_ray.prompts.tokenizer import load_tokenizer
        from rlhf_ray.quickstart import model_path

        path = self._model.tokenizer_path or self._model.path or model_path()
        return TokenTexts(load_tokenizer(path, trust_remote_code=self._model.trust_remote_code))


def _table(
    step: int, groups: Sequence[ScoredGroup], estimates: Sequence[TokenEstimates] | None, token_texts: TokenTexts
) -> pa.Table:
    import pyarrow as pa

    functions = list(dict.fromkeys(name for scored in groups for name in scored.rewards_by_function))
    schema = pa.schema(
        [
            ("step", pa.int64()),
            ("group_id", pa.int64()),
            ("environment", pa.string()),
            ("prompt", pa.string()),
            ("completion", pa.string()),
            ("reward", pa.float32()),
            *((f"rewards/{name}", pa.float32()) for name in functions),
            ("finish_reason", pa.string()),
            ("num_tokens", pa.int32()),
            ("num_turns", pa.int32()),
            ("version", pa.int32()),
            ("token_ids", pa.list_(pa.int32())),
            ("token_texts", pa.list_(pa.string())),
            ("sampled", pa.list_(pa.bool_())),
            ("turn", pa.list_(pa.int32())),
            ("sequence", pa.list_(pa.int32())),
            ("sampling_logprobs", pa.list_(pa.float32())),
            ("token_versions", pa.list_(pa.int32())),
            ("advantages", pa.list_(pa.float32())),
            ("values", pa.list_(pa.float32())),
            ("turn_rewards", pa.list_(pa.float32())),
            ("further_prompts", pa.list_(pa.list_(pa.int32()))),
            ("messages", pa.string()),
            ("message_turns", pa.list_(pa.int32())),
        ]
    )
    rows = [
        _row(step, scored, index, token_texts) for scored in groups for index in range(len(scored.group.trajectories))
    ]
    if estimates is not None:
        counts = [len(trajectory.sequences) for scored in groups for trajectory in scored.group.trajectories]
        for row, own in zip(rows, _of_trajectories(estimates, counts), strict=True):
            row["advantages"] = _or_none([one.advantages for one in own])
            row["values"] = _or_none([one.values for one in own if one.values is not None])
    table = pa.Table.from_pylist(rows, schema=schema)
    for name in dict.fromkeys(name for scored in groups for name in scored.extras):
        values = [value for scored in groups for value in scored.extras.get(name, [None] * len(scored.texts))]
        table = table.append_column(f"extra/{name}", _column(values))
    return table


def _of_trajectories(
    estimates: Sequence[TokenEstimates], counts: Sequence[int]
) -> Iterator[tuple[TokenEstimates, ...]]:
    """Estimates of sequences as those of trajectories of so many sequences each."""
    if len(estimates) != sum(counts):
        raise ValueError(f"estimates of {len(estimates)} sequences, but the trajectories have {sum(counts)}")
    remaining = iter(estimates)
    for count in counts:
        yield tuple(itertools.islice(remaining, count))


def _column(values: Sequence[Any]) -> pa.Array:
    import pyarrow as pa

    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):  # of several types, or numbers of more than 64 bits
        return pa.array([None if value is None else str(value) for value in values])


def _or_none(parts: Sequence[Float32Array]) -> list[float | None] | None:
    """A number per token of all sequences, ``None`` at tokens that do not enter the losses; unset where none does."""
    listed = [None if value != value else value for part in parts for value in part.tolist()]
    return listed if any(value is not None for value in listed) else None


def _row(step: int, scored: ScoredGroup, index: int, token_texts: TokenTexts) -> dict[str, Any]:
    trajectory, text = scored.group.trajectories[index], scored.texts[index]
    by_function = {f"rewards/{name}": float(rewards[index]) for name, rewards in scored.rewards_by_function.items()}
    spans = [span for sequence in trajectory.sequences for span in sequence.version_spans]
    tokens = _token_lists(trajectory)
    return {
        "step": step,
        "group_id": scored.group.group_id,
        "environment": scored.group.environment or None,
        "prompt": prompt_text(scored.group.prompt.text),
        "completion": text,
        "reward": float(scored.rewards[index]),
        # NaN stands for a function's None; it is the one number that differs from itself.
        **{name: reward if reward == reward else None for name, reward in by_function.items()},
        "finish_reason": trajectory.finish_reason,
        "num_tokens": len(tokens["token_ids"]),
        "num_turns": len(trajectory.all_turns),
        "version": min((span.version for span in spans), default=None),
        **tokens,
        "token_texts": _texts(trajectory, text, token_texts),
        "turn_rewards": [turn.reward for turn in trajectory.all_turns],
        "further_prompts": [one.prompt_token_ids.tolist() for one in trajectory.further],
        **_messages(trajectory),
    }


def _token_lists(trajectory: Trajectory) -> dict[str, list[Any]]:
    """The columns with an entry per token, of all sequences end to end."""
    lists: defaultdict[str, list[Any]] = defaultdict(list)
    turns_before = 0
    for number, sequence in enumerate(trajectory.sequences):
        sampled, length = sequence.loss_mask.tolist(), len(sequence.token_ids)
        versions: list[int | None] = [None] * length
        for span in sequence.version_spans:
            versions[span.start : span.end] = [span.version] * (span.end - span.start)
        starts = [turn.start for turn in sequence.turns]
        begun = np.searchsorted(starts, np.arange(length), side="right")
        lists["token_ids"] += sequence.token_ids.tolist()
        lists["sampled"] += sampled
        lists["turn"] += (turns_before + begun - 1).tolist()
        lists["sequence"] += [number] * length
        lists["sampling_logprobs"] += [
            logprob if own else None for logprob, own in zip(sequence.sampling_logprobs.tolist(), sampled, strict=True)
        ]
        lists["token_versions"] += versions
        turns_before += len(sequence.turns)
    return lists


def _texts(trajectory: Trajectory, text: str, token_texts: TokenTexts) -> list[str] | None:
    """``[T]`` texts of the tokens of all sequences."""
    if len(trajectory.all_turns) == 1 and trajectory.loss_mask.all():
        return token_texts.split(trajectory.token_ids.tolist(), text)
    parts = [token_texts.split(sequence.token_ids.tolist()) for sequence in trajectory.sequences]
    known = [part for part in parts if part is not None]
    return list(itertools.chain.from_iterable(known)) if len(known) == len(parts) else None


def _messages(trajectory: Trajectory) -> dict[str, Any]:
    """The conversation after the prompt, and the turns of its messages; null where no turn was read as a message."""
    said = [
        (number, message)
        for number, turn in enumerate(trajectory.all_turns)
        for message in (*([turn.message] if turn.message else []), *turn.observation)
    ]
    if all(turn.message is None for turn in trajectory.all_turns):
        return {"messages": None, "message_turns": None}
    chat = json.dumps([message for _, message in said], ensure_ascii=False, default=str)
    # Half of a surrogate pair, which a tool call can hold, is no text to Arrow; as an escape it is still its JSON.
    text = chat.encode("utf-8", "backslashreplace").decode()
    return {"messages": text, "message_turns": [number for number, _ in said]}
