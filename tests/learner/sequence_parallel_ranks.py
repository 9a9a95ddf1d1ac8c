"""One rank of several that read sequences in slices: ``python sequence_parallel_ranks.py FOLDER RANK WORLD_SIZE SIZE``.

Leaves a ``SlicedResult`` in ``FOLDER/rank<RANK>.pt``.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import learner_scenarios as runs
import numpy as np
import torch
import torch.distributed as dist
from learner_scenarios import Outcome, Scenario

from rlhf_ray.errors import ConfigError, LearnerError
from rlhf_ray.learner.batch import SequenceBatch
from rlhf_ray.learner.layout import lay_out
from rlhf_ray.learner.learner import Learner
from rlhf_ray.weight_sync.buckets import ByteArray

NAMES = (
    "token_mean",
    "packed",
    "kl_in_loss",
    "grpo",
    "stale_m2po",
    "lora",
    # No rank but the first has a token to score, or a sequence of its own.
    "empty_microbatch",
)
ON_FOUR_RANKS = ("token_mean", "packed", "grpo", "stale_m2po", "critic_from_the_mean", "idle_rank")
SCORED = ("padded", "packed", "eager", "one_kv_head")
NOT_SLICED = ("lfm2", "codegen")
"""Families with a convolution, and with attention that does not come from transformers' interface."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlicedResult:
    """What one rank leaves behind."""

    outcomes: dict[str, Outcome]
    scores: dict[str, tuple[torch.Tensor, torch.Tensor]]
    """Log-probabilities and values, ``[B, T]`` each, before any update."""
    buckets: list[list[ByteArray] | None]
    refusal: str
    not_sliced: dict[str, str]
    """Family -> why it cannot be read in slices."""


def sliced(scenario: Scenario, size: int) -> Scenario:
    """The same run, in which ``size`` ranks read each sequence and recompute their activations."""
    return replace(scenario, spec=scenario.spec | {"sequence_parallel": size, "gradient_checkpointing": True})


def scored(folder: Path, name: str, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and values of four sequences of 32 tokens, of which rounding knows no part."""
    spec = {"attn_implementation": "eager"} if name == "eager" else {}
    if name == "one_kv_head":
        spec = {"policy_path": str(folder / "one_kv_head")}
    scenario = sliced(Scenario(packed=name == "packed", spec=spec), size)
    learner = runs.build(folder, scenario)
    micro = lay_out(even_batch(), range(4), packed=scenario.packed, device=torch.device("cpu"))
    with torch.no_grad():
        return learner._models.score(micro)[0], learner._models.values(micro)[micro.value_index]


def even_batch() -> SequenceBatch:
    """Four sequences of 20 prompt and 12 completion tokens."""
    rng = np.random.default_rng(5)
    prompts, completions = np.full(4, 20, dtype=np.int32), np.full(4, 12, dtype=np.int32)
    tokens = rng.integers(2, runs.VOCABULARY, size=128).astype(np.int32)
    return SequenceBatch.single_turn(token_ids=tokens, prompt_lengths=prompts, completion_lengths=completions)


def refusal(folder: Path, size: int) -> str:
    """What the learner says of a batch with a number that is not finite."""
    learner = Learner(runs.make_spec(folder, sliced(runs.REFUSED, size)))
    try:
        runs.update(learner, sliced(runs.REFUSED, size), 0)
    except LearnerError as error:
        return str(error)
    return "no refusal"


def recalled(folder: Path, size: int) -> None:
    """An update that is made again after its state was taken back ends in the same bits."""
    scenario = sliced(runs.RESUMED, size)
    learner = Learner(runs.make_spec(folder, scenario))
    runs.update(learner, scenario, 0)
    before = copy.deepcopy(learner.state())
    learner.keep_state(1)
    runs.update(learner, scenario, 1)
    after = copy.deepcopy(learner.state())
    learner.recall(1)
    runs.update(learner, scenario, 1)
    assert runs.same_state(after, learner.state())
    assert not runs.same_state(before, after)


def saved(folder: Path, size: int) -> list[list[ByteArray] | None]:
    """The first part of ``RESUMED``, saved to ``folder / "checkpoint"``; what was published before it."""
    scenario = sliced(runs.RESUMED, size)
    learner = Learner(runs.make_spec(folder, scenario))
    buckets = copy.deepcopy([pieces for _, pieces in learner.weight_buckets()])
    runs.update(learner, scenario, 0)
    learner.save(str(folder / "checkpoint")).result()
    learner.close()
    return buckets


def not_sliced(folder: Path, size: int) -> dict[str, str]:
    """Why each of ``NOT_SLICED`` is refused when it starts."""
    reasons = {}
    for family in NOT_SLICED:
        spec = {"policy_path": str(folder / family), "critic_path": None}
        try:
            Learner(runs.make_spec(folder, sliced(Scenario(spec=spec, training={"advantage": "grpo"}), size)))
        except ConfigError as error:
            reasons[family] = str(error)
    return reasons


def main(folder: Path, rank: int, world_size: int, size: int) -> None:
    """One rank's part."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    names = NAMES if world_size == 2 else ON_FOUR_RANKS
    two = world_size == 2
    scenarios = {name: sliced(runs.SCENARIOS[name], size) for name in names}
    if two:
        scenarios["empty_microbatch"] = runs.in_small_microbatches(scenarios["empty_microbatch"])
    result = SlicedResult(
        outcomes={name: runs.run(scenario, folder) for name, scenario in scenarios.items()},
        scores={name: scored(folder, name, size) for name in SCORED},
        buckets=saved(folder, size) if two else [],
        refusal=refusal(folder, size) if two else "",
        not_sliced=not_sliced(folder, size) if two else {},
    )
    if two:
        recalled(folder, size)
    torch.save(result, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    # Under its own name, or the results would be pickled as classes of ``__main__``.
    import sequence_parallel_ranks

    sequence_parallel_ranks.main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
