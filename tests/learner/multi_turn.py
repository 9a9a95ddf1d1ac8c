"""Random rollouts of several turns, whose history may have been rewritten, and one rank of several that trains on them.

``python multi_turn.py FOLDER RANK WORLD_SIZE`` runs every scenario of ``SCENARIOS`` in small microbatches and leaves
the outcomes in ``FOLDER/rank<RANK>.pt``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import learner_scenarios as runs
import numpy as np
import torch
import torch.distributed as dist
from learner_scenarios import Scenario

from rlhf_ray.types import FurtherSequence, Int32Array, Prompt, RolloutGroup, ScoredGroup, Trajectory, Turn, VersionSpan

NUM_GROUPS, GROUP_SIZE = 3, 3


def ids(rng: np.random.Generator, count: int) -> Int32Array:
    return rng.integers(2, runs.VOCABULARY, size=count).astype(np.int32)


def sequence(rng: np.random.Generator, *, stale: bool, is_cut: bool, max_turns: int) -> Trajectory:
    """Turns of 1 to 4 tokens with 1 to 3 observed ones between them; one that is cut ends with an observation."""
    turns: list[Turn] = []
    spans: list[VersionSpan] = []
    end = 0
    for number in range(int(rng.integers(1, max_turns + 1))):
        start = end + (int(rng.integers(1, 4)) if number else 0)
        end = start + int(rng.integers(1, 5))
        version = runs.NEWEST - (int(rng.integers(0, runs.MAX_STALENESS + 1)) if stale else 0)
        turns.append(Turn(start=start, end=end, reward=float(rng.normal())))
        spans.append(VersionSpan(version=version, start=start, end=end))
    length = end + (2 if is_cut else 0)
    logprobs = np.zeros(length, dtype=np.float32)
    for turn in turns:
        logprobs[turn.start : turn.end] = -rng.exponential(2.0, size=turn.end - turn.start)
    return Trajectory(
        token_ids=ids(rng, length),
        sampling_logprobs=logprobs,
        turns=tuple(turns),
        version_spans=tuple(spans),
        asked_version=min(span.version for span in spans),
        finish_reason="turns" if is_cut else "stop",
    )


def groups_of(seed: int, *, stale: bool = False, max_sequences: int = 3, max_turns: int = 3) -> list[ScoredGroup]:
    """Trajectories of 1 to ``max_sequences`` sequences; about a third of them is truncated."""
    rng = np.random.default_rng(seed)
    groups = []
    for group_id in rng.permutation(NUM_GROUPS).tolist():
        trajectories = []
        for number in range(GROUP_SIZE):
            is_cut = bool(rng.random() < 0.35 or number == 0)
            count = int(rng.integers(0, max_sequences)) + 1
            first, *rest = (
                sequence(rng, stale=stale, is_cut=is_cut and place == count - 1, max_turns=max_turns)
                for place in range(count)
            )
            further = [
                FurtherSequence(prompt_token_ids=ids(rng, int(rng.integers(2, 9))), trajectory=each) for each in rest
            ]
            reason = "turns" if is_cut else "stop"
            trajectories.append(replace(first, finish_reason=reason, further=tuple(further)))
        groups.append(scored(group_id, ids(rng, int(rng.integers(2, 9))), trajectories, rng))
    return groups


def scored(
    group_id: int, prompt: Int32Array, trajectories: Sequence[Trajectory], rng: np.random.Generator
) -> ScoredGroup:
    return ScoredGroup(
        group=RolloutGroup(
            group_id=group_id,
            prompt=Prompt(prompt_id=group_id, token_ids=prompt, text=""),
            trajectories=tuple(trajectories),
            replica_id="r",
        ),
        rewards=rng.normal(size=len(trajectories)).astype(np.float32),
        rewards_by_function={},
        texts=("",) * len(trajectories),
        reward_s=0.0,
        greedy_reward=float(rng.normal()),
        environment_weight=0.7,
    )


def whole_groups(seed: int) -> list[ScoredGroup]:
    """Trajectories of one sequence each."""
    return groups_of(seed, max_sequences=1, max_turns=4)


def cut_groups(seed: int) -> list[ScoredGroup]:
    """The same trajectories, each turn in a sequence of its own behind all that came before as its prompt."""
    return [
        replace(
            one,
            group=replace(
                one.group,
                trajectories=tuple(cut(one.group.prompt.token_ids, each) for each in one.group.trajectories),
            ),
        )
        for one in whole_groups(seed)
    ]


def cut(prompt: Int32Array, trajectory: Trajectory) -> Trajectory:
    """A trajectory as one of several sequences, a turn each."""
    pieces = []
    for number, (turn, span) in enumerate(zip(trajectory.turns, trajectory.version_spans, strict=True)):
        is_last = number == len(trajectory.turns) - 1
        tokens = slice(turn.start, None if is_last else turn.end)
        length = turn.end - turn.start
        piece = replace(
            trajectory,
            token_ids=trajectory.token_ids[tokens],
            sampling_logprobs=trajectory.sampling_logprobs[tokens],
            turns=(replace(turn, start=0, end=length),),
            version_spans=(replace(span, start=0, end=length),),
        )
        pieces.append(
            FurtherSequence(
                prompt_token_ids=np.concatenate([prompt, trajectory.token_ids[: turn.start]]), trajectory=piece
            )
        )
    return replace(pieces[0].trajectory, further=tuple(pieces[1:]))


def scenario(training: dict[str, Any], **changes: Any) -> Scenario:
    return Scenario(training=training, groups=groups_of, **changes)


SCENARIOS: dict[str, Scenario] = {
    "gae": scenario({"kl_coef": 0.3, "kl_estimator": "k3"}, num_epochs=2),
    "gae_packed": scenario({"loss_aggregation": "seq_mean_token_mean"}, packed=True),
    "turn_gae": scenario({"advantage": "turn_gae", "loss_aggregation": "seq_mean_token_sum"}),
    "grpo": scenario(
        {
            "advantage": "grpo",
            "loss_aggregation": "seq_mean_token_mean",
            "whiten_advantages": False,
            "kl_in": "loss",
            "kl_coef": 0.3,
            "entropy_coef": 0.1,
        }
    ),
    "opo": scenario({"advantage": "opo", "kl_coef": 0.3, "loss_aggregation": "seq_mean_token_sum_norm"}),
    # Nine trajectories in five minibatches: of three ranks one is idle in each.
    "reinforce_plus_plus": scenario({"advantage": "reinforce_plus_plus"}, num_minibatches=5),
}


def main(folder: Path, rank: int, world_size: int) -> None:
    """One rank's part of all scenarios."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    outcomes = {name: runs.run(runs.in_small_microbatches(each), folder) for name, each in SCENARIOS.items()}
    torch.save(outcomes, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
