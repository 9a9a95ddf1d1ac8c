"""Run directories for the tests of the report, written by the library's own reporters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from rlhf_ray.config.settings import Settings
from rlhf_ray.quickstart.tokenizer import EOS_TOKEN_ID
from rlhf_ray.reporting import RunDirectory, flatten
from rlhf_ray.reporting.completions import CompletionsReporter
from rlhf_ray.reporting.jsonl import JsonlReporter
from rlhf_ray.types import (
    ChatMessage,
    Float32Array,
    FurtherSequence,
    Prompt,
    PromptText,
    RolloutGroup,
    ScoredGroup,
    TokenEstimates,
    Trajectory,
    Turn,
    VersionSpan,
)

HOSTILE = (
    "</script><script>window.hacked = 'script'</script>",
    "<img src=x onerror=\"window.hacked = 'image'\">",
    "javascript:window.hacked='address'",
    "-->]]>{{script}}{{data}}</textarea></title>&lt;b&gt;'\"`",
    "line\u2028separator\u2029and\u202eturned\u200bunseen\x00\x1b[31m",
    "<!--<script>",
)

SETTINGS = {
    "algorithm": "PPO",
    "model": {"path": None},
    "data": {"path": None, "batch_size": 64},
    "training": {"iterations": 5, "lr": 2e-4, "kl_coef": 0.0},
    "debugging": {"seed": 0},
}


def iteration(number: int, *, evaluated: bool = False, **learner: float) -> dict[str, Any]:
    """A result as the algorithm returns it."""
    result: dict[str, Any] = {
        "training_iteration": number,
        "time_total_s": 1.5 * number,
        "rollouts": {
            "num_completions": 256,
            "reward_mean": number / 10,
            "completion_tokens_mean": 4.0,
            "completion_tokens_max": 8 + number % 2,
            "staleness_mean": 0.5,
            "staleness_max": 2,
        },
        "learner": {"approx_kl": 0.001 * number, "entropy": 1 / number} | learner,
        "timers": {"rollout_s": 0.5, "reward_s": 0.1, "advantage_s": 0.1, "update_s": 0.6, "weight_sync_s": 0.1},
    }
    if evaluated:
        result["evaluation"] = {"quickstart": {"reward_mean": number / 8}}
    return result


def iterations(count: int) -> list[dict[str, Any]]:
    """The first is evaluated and the last."""
    return [iteration(number, evaluated=number in (1, count)) for number in range(1, count + 1)]


def write_run(
    folder: Path,
    *,
    settings: Mapping[str, Any] = SETTINGS,
    results: Iterable[Mapping[str, Any]] | None = None,
    tables: Mapping[int, Sequence[ScoredGroup]] | None = None,
    advantages: Sequence[Float32Array] | None = None,
    values: Sequence[Float32Array] | None = None,
) -> Path:
    """Write a run: by default five iterations and a table after the last; all tables have the same estimates."""
    directory = RunDirectory.create(str(folder), algorithm="PPO")
    directory.write_config(yaml.safe_dump(dict(settings)))
    metrics = JsonlReporter(Settings(), directory)
    for result in iterations(5) if results is None else results:
        metrics.report(flatten(result))
    metrics.stop()
    completions = CompletionsReporter(Settings(), directory)
    for step, groups in ({5: additions()} if tables is None else tables).items():
        completions.report_completions(step, groups, None if advantages is None else estimates(advantages, values))
    return directory.path


def estimates(
    advantages: Sequence[Sequence[float] | Float32Array],
    values: Sequence[Sequence[float] | Float32Array] | None = None,
) -> list[TokenEstimates]:
    """Of each sequence."""
    parts = [[None] * len(advantages) if values is None else values, advantages]
    arrays = [[None if one is None else np.asarray(one, dtype=np.float32) for one in part] for part in parts]
    return [TokenEstimates(advantages=own, values=value) for value, own in zip(*arrays, strict=True)]


def additions() -> list[ScoredGroup]:
    """Two groups of two."""
    return [group(3, "1+1=", ["2", "3"], [1.0, 0.0]), group(4, "20+22=", ["42", "42"], [1.0, 1.0])]


def group(
    group_id: int, prompt: PromptText, texts: Sequence[str], rewards: Sequence[float], *, finish: str = "stop"
) -> ScoredGroup:
    """Completions of one prompt; their last tokens are of version 4, the others of version 3."""
    of_function = np.asarray(rewards, dtype=np.float32)
    return ScoredGroup(
        group=RolloutGroup(
            group_id=group_id,
            prompt=Prompt(prompt_id=group_id, token_ids=np.asarray([1], dtype=np.int32), text=prompt),
            trajectories=tuple(_completion(text, finish) for text in texts),
            replica_id="replica",
        ),
        rewards=of_function,
        rewards_by_function={"correct": of_function},
        texts=tuple(texts),
        reward_s=0.01,
    )


def _completion(text: str, finish: str) -> Trajectory:
    ids = np.asarray([*text.encode(), EOS_TOKEN_ID], dtype=np.int32)
    return Trajectory.single_turn(
        token_ids=ids,
        sampling_logprobs=-0.5 * np.arange(len(ids), dtype=np.float32),
        version_spans=(
            VersionSpan(version=3, start=0, end=len(ids) - 1),
            VersionSpan(version=4, start=len(ids) - 1, end=len(ids)),
        ),
        asked_version=3,
        finish_reason=finish,
    )


def tries(*, further: Sequence[str] = ()) -> ScoredGroup:
    """Guesses of a number as texts: ``4``, observed ``no``, ``7``; then texts of further sequences for 0.25 each."""
    observed = ({"role": "user", "content": "no"},)
    turns = (Turn(start=0, end=1, reward=-0.5, observation=observed), Turn(start=3, end=4, reward=1.0))
    first = _trajectory(b"4no7", [-0.5, 0.0, 0.0, -0.25], turns, versions=(3, 4))
    sequences = tuple(
        FurtherSequence(
            prompt_token_ids=np.asarray([1, 2, 3], dtype=np.int32),
            trajectory=_trajectory(
                text.encode(), [-1.0] * len(text), (Turn(start=0, end=len(text), reward=0.25),), versions=(2,)
            ),
        )
        for text in further
    )
    return _played("guess", "Guess: ", replace(first, further=sequences), "4no7")


def tool_chat(*, arguments: str = '{"sum": "37+58"}', name: str = "calculator", answer: str = "95") -> ScoredGroup:
    """A chat in which the policy calls a tool, is answered ``95``, and says so."""
    call = f"<tool_call>{name}</tool_call>".encode()
    said = answer.encode("utf-8", "replace")
    ids = [*call, EOS_TOKEN_ID, *b"\ntool: ", *said, *b"\nassistant: ", *b"It is 95.", EOS_TOKEN_ID]
    second = len(ids) - len(b"It is 95.") - 1
    message: ChatMessage = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}],
    }
    turns = (
        Turn(start=0, end=len(call) + 1, message=message, observation=({"role": "tool", "content": answer},)),
        Turn(start=second, end=len(ids), reward=1.0, message={"role": "assistant", "content": "It is 95."}),
    )
    logprobs = [-0.5 if index <= len(call) or index >= second else 0.0 for index in range(len(ids))]
    trajectory = _trajectory(ids, logprobs, turns, versions=(3, 4))
    chat = [{"role": "user", "content": "What is 37+58?"}]
    return _played("shop", chat, trajectory, bytes(i for i in ids if i < EOS_TOKEN_ID).decode())


def _trajectory(
    ids: Iterable[int], logprobs: Sequence[float], turns: Sequence[Turn], *, versions: Sequence[int]
) -> Trajectory:
    return Trajectory(
        token_ids=np.asarray(list(ids), dtype=np.int32),
        sampling_logprobs=np.asarray(logprobs, dtype=np.float32),
        turns=tuple(turns),
        version_spans=tuple(
            VersionSpan(version=version, start=turn.start, end=turn.end)
            for version, turn in zip(versions, turns, strict=True)
        ),
        asked_version=3,
        finish_reason="turns",
    )


def _played(environment: str, prompt: PromptText, trajectory: Trajectory, text: str) -> ScoredGroup:
    rewards = np.asarray([trajectory.environment_reward], dtype=np.float32)
    return ScoredGroup(
        group=RolloutGroup(
            group_id=9,
            prompt=Prompt(prompt_id=9, token_ids=np.asarray([1], dtype=np.int32), text=prompt),
            trajectories=(trajectory,),
            replica_id="replica",
            environment=environment,
        ),
        rewards=rewards,
        rewards_by_function={"environment": rewards},
        texts=(text,),
        reward_s=0.01,
    )
