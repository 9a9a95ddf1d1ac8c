"""A run that stops and goes on is the run that never stopped, on one learner and on two."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from rlhf_ray import PPOConfig

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("cluster")]

ITERATIONS, STOPPED_AFTER = 4, 2
FIGURES = ("policy_loss", "value_loss", "entropy", "kl_coef", "lr", "critic_lr", "policy_version")


def config_of(run_dir: Path, num_learners: int) -> PPOConfig:
    return (
        PPOConfig()
        .data(batch_size=8)
        .rollouts(group_size=4, max_prompt_tokens=16, num_threads=1)
        .learners(num_learners=num_learners, num_threads=1, max_tokens_per_microbatch=256)
        # Everything that has a state: schedules, both optimizers, an adapted coefficient.
        .training(iterations=ITERATIONS, num_minibatches=2, kl_coef=1e-3, kl_target=0.01, lr_schedule="cosine")
        .checkpointing(interval=STOPPED_AFTER, keep=5)
        .reporting(run_dir=str(run_dir), progress="off", wandb_project="tests")
    )


@dataclass(frozen=True)
class Finished:
    """What a run leaves."""

    run_dir: Path
    written: list[str]
    """Checkpoints that the callback was told of."""

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run_dir / "metrics.jsonl").read_text().splitlines()]

    def completions(self, step: int) -> list[tuple[Any, ...]]:
        table = pq.read_table(self.run_dir / "completions" / f"step_{step:06d}.parquet").to_pydict()
        return list(zip(table["group_id"], table["prompt"], table["completion"], table["reward"], strict=True))

    def weights(self, part: str) -> dict[str, torch.Tensor]:
        return dict(load_file(self.run_dir / "model" / part / "model.safetensors"))


def finish(config: PPOConfig) -> Finished:
    written: list[str] = []
    algorithm = config.callbacks(on_checkpoint=lambda *, algorithm, path: written.append(path)).build_algo()
    try:
        while algorithm.iteration < ITERATIONS:
            result = algorithm.train()
        assert result["done"]
        algorithm.export_hf(algorithm.run_dir / "model")
    finally:
        algorithm.stop()
    assert algorithm.run_dir is not None
    return Finished(run_dir=algorithm.run_dir, written=written)


@pytest.fixture(
    scope="module",
    params=[pytest.param(1, id="one learner"), pytest.param(2, id="two learners", marks=pytest.mark.slow)],
)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Finished]:
    return request.param, finish(config_of(tmp_path_factory.mktemp("whole") / "run", request.param))


def test_a_run_that_goes_on_is_the_run_that_never_stopped(whole: tuple[int, Finished], tmp_path: Path) -> None:
    num_learners, wanted = whole
    assert [Path(path).name for path in wanted.written] == ["iteration_000002", "iteration_000004"]
    # As if it had been killed while it wrote its last checkpoint.
    shutil.copytree(wanted.run_dir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    (tmp_path / "run" / "checkpoints" / "iteration_000004" / "manifest.json").unlink()

    found = finish(config_of(tmp_path / "run", num_learners).checkpointing(resume="same"))

    assert [row["training_iteration"] for row in found.rows()] == [1, 2, 3, 4]
    for step in range(1, ITERATIONS + 1):
        assert found.completions(step) == wanted.completions(step), f"iteration {step}"
    for one, other in zip(found.rows(), wanted.rows(), strict=True):
        for name in FIGURES:
            assert one[f"learner/{name}"] == pytest.approx(other[f"learner/{name}"], abs=1e-6), name
        assert one["rollouts/reward_mean"] == other["rollouts/reward_mean"]
    for part in ("", "critic"):
        expected = wanted.weights(part)
        for name, weight in found.weights(part).items():
            torch.testing.assert_close(weight, expected[name], rtol=0.0, atol=1e-6, msg=f"{part} {name}")
    assert found.rows()[-1]["time_total_s"] > wanted.rows()[1]["time_total_s"]


@pytest.mark.slow
def test_a_checkpoint_goes_on_with_another_number_of_learners(whole: tuple[int, Finished], tmp_path: Path) -> None:
    num_learners, wanted = whole
    other = config_of(tmp_path / "run", 3 - num_learners)

    checkpoint = wanted.run_dir / "checkpoints" / "iteration_000002"
    algorithm = other.algorithm_class.from_checkpoint(checkpoint, config=other)
    try:
        assert (algorithm.iteration, algorithm.policy_version) == (STOPPED_AFTER, STOPPED_AFTER)
        result = algorithm.train()
    finally:
        algorithm.stop()

    assert result["learner"]["sampling_logprob_diff_max"] < 1e-3
    found = Finished(run_dir=algorithm.run_dir, written=[])
    assert found.completions(3) == wanted.completions(3)
    assert result["learner"]["policy_loss"] == pytest.approx(wanted.rows()[2]["learner/policy_loss"], abs=1e-5)
