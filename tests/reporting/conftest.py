"""A result and its groups as the algorithm hands them to reporters."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_ray.quickstart.tokenizer import EOS_TOKEN_ID
from rlhf_ray.reporting import RunDirectory
from rlhf_ray.types import Prompt, PromptText, RolloutGroup, ScoredGroup, Trajectory, VersionSpan

# Tests of the report import what they share by name.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory.create(str(tmp_path / "run"), algorithm="PPO")
    directory.write_config("algorithm: PPO\ntraining:\n  lr: 0.0002\n")
    return directory


@pytest.fixture
def result() -> dict[str, Any]:
    """The third iteration, with what Tune adds."""
    return {
        "training_iteration": 3,
        "time_total_s": 4.5,
        "rollouts": {"reward_mean": np.float32(0.5), "completion_tokens_mean": 4.25, "tokens_per_s": 5123.4},
        "learner": {"approx_kl": 0.00123, "value_loss": math.nan, "ratio_max": math.inf, "policy_version": 3},
        "timers": {"iteration_s": 1.5},
        "evaluation": {"openai/gsm8k": {"reward_mean": 0.75}},
        "config": {"training": {"lr": 2e-4}},
        "hostname": "node-1",
        "trial_id": "default",
        "pid": 17,
    }


@pytest.fixture
def groups() -> list[ScoredGroup]:
    """A string prompt with two completions and a chat prompt with one."""
    chat = [{"role": "user", "content": "Grüße?"}]
    return [
        scored(7, "1+1=", [("2", 1.0, 0.5, 3), ("3", 0.0, math.nan, 2)]),
        scored(8, chat, [("Hallo", 0.25, 0.25, 3)]),
    ]


def scored(group_id: int, prompt: PromptText, completions: list[tuple[str, float, float, int]]) -> ScoredGroup:
    """Make a group from (text, reward, reward of the function ``style``, oldest version)."""
    rewards = np.array([reward for _, reward, _, _ in completions], dtype=np.float32)
    return ScoredGroup(
        group=RolloutGroup(
            group_id=group_id,
            prompt=Prompt(prompt_id=group_id, token_ids=np.array([1, 2], dtype=np.int32), text=prompt),
            trajectories=tuple(completion(text, version) for text, _, _, version in completions),
            replica_id="replica",
        ),
        rewards=rewards,
        rewards_by_function={
            "reward": rewards,
            "style": np.array([style for _, _, style, _ in completions], dtype=np.float32),
        },
        texts=tuple(text for text, _, _, _ in completions),
        reward_s=0.01,
    )


def completion(text: str, oldest_version: int) -> Trajectory:
    """Write a text as the quickstart's tokenizer does, by bytes; its last token came from a newer policy."""
    tokens = np.array([*text.encode(), EOS_TOKEN_ID], dtype=np.int32)
    return Trajectory.single_turn(
        token_ids=tokens,
        sampling_logprobs=-0.25 * np.arange(len(tokens), dtype=np.float32),
        asked_version=0,
        version_spans=(
            VersionSpan(version=oldest_version + 1, start=len(tokens) - 1, end=len(tokens)),
            VersionSpan(version=oldest_version, start=0, end=len(tokens) - 1),
        ),
        finish_reason="stop",
    )
