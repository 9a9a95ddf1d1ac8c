"""Run directories for the tests of the report, written by the library's own reporters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from rlhf_ray.config.settings import Settings
from rlhf_ray.quickstart.tokenizer import EOS_TOKEN_ID
from rlhf_ray.reporting import RunDirectory, flatten
from rlhf_ray.reporting.completions import CompletionsReporter
from rlhf_ray.reporting.jsonl import JsonlReporter
from rlhf_ray.types import Float32Array, Prompt, PromptText, RolloutGroup, ScoredGroup, Trajectory, VersionSpan

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
) -> Path:
    """Write a run: by default five iterations and a table after the last; all tables have the same advantages."""
    directory = RunDirectory.create(str(folder), algorithm="PPO")
    directory.write_config(yaml.safe_dump(dict(settings)))
    metrics = JsonlReporter(Settings(), directory)
    for result in iterations(5) if results is None else results:
        metrics.report(flatten(result))
    metrics.stop()
    completions = CompletionsReporter(Settings(), directory)
    for step, groups in ({5: additions()} if tables is None else tables).items():
        completions.report_completions(step, groups, advantages)
    return directory.path


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
