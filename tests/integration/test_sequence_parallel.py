"""Two learners that read slices of the same sequences are one learner, with real engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_ray import PPOConfig

pytestmark = [pytest.mark.engine, pytest.mark.slow]

METRICS = ("policy_loss", "value_loss", "advantage_std", "grad_norm", "critic_grad_norm", "kl_to_reference")


def trained(run_dir: Path, *, num_learners: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The result of one iteration, and the weights of policy and critic after it."""
    config = (
        PPOConfig()
        .data(batch_size=8)
        .rollouts(num_replicas=1, group_size=2, max_prompt_tokens=16, num_threads=1)
        .learners(
            num_learners=num_learners,
            sequence_parallel=num_learners,
            num_threads=1,
            max_tokens_per_microbatch=256 // num_learners,
            gradient_checkpointing=True,
        )
        .training(iterations=1, num_minibatches=2, kl_coef=1e-2)
        .reporting(run_dir=str(run_dir))
    )
    algorithm = config.build()
    try:
        result = algorithm.train()
        algorithm.export_hf(run_dir / "model")
    finally:
        algorithm.stop()
    folders = {"policy": run_dir / "model", "critic": run_dir / "model" / "critic"}
    weights = {
        f"{part} {name}": weight
        for part, folder in folders.items()
        for name, weight in load_file(folder / "model.safetensors").items()
    }
    return result, weights


def test_learners_with_slices_train_what_one_learner_does(tmp_path: Path) -> None:
    result, weights = trained(tmp_path / "slices", num_learners=2)
    wanted, wanted_weights = trained(tmp_path / "whole", num_learners=1)

    assert result["rollouts"]["reward_mean"] == wanted["rollouts"]["reward_mean"]
    assert result["learner"]["sampling_logprob_diff_max"] < 1e-3
    for name in METRICS:
        assert result["learner"][name] == pytest.approx(wanted["learner"][name], rel=1e-3, abs=1e-5), name
    assert weights.keys() == wanted_weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, wanted_weights[name], rtol=0.0, atol=1e-5, msg=name)
