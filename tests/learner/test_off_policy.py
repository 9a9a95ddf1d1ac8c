from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from rlhf_ray.config.settings import TrainingSettings
from rlhf_ray.learner.batch import SequenceBatch
from rlhf_ray.learner.estimates import Estimates
from rlhf_ray.learner.layout import lay_out
from rlhf_ray.learner.off_policy import correction_weights, effective_sample_size, m2po_kept, staleness_metrics
from rlhf_ray.losses import m2po_mask

CPU = torch.device("cpu")
PROXIMAL = torch.tensor([[0.5, 0.4], [0.2, 0.9]]).log()
# Of completions of two tokens and of one.
BATCH = SequenceBatch.single_turn(
    token_ids=np.zeros(5, dtype=np.int32),
    prompt_lengths=np.ones(2, dtype=np.int32),
    completion_lengths=np.asarray([2, 1], dtype=np.int32),
    sampling_logprobs=np.log([0.25, 0.5, 0.8]).astype(np.float32),
    staleness=np.asarray([2, 0, 2], dtype=np.int32),
)
ESTIMATES = Estimates.of(BATCH, CPU)
MICRO = lay_out(BATCH, range(2), packed=False, device=CPU)
KNOWN = ESTIMATES.rows(MICRO)


def weights_of(**training: object) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
    return correction_weights(TrainingSettings(**training), KNOWN, PROXIMAL)


@pytest.mark.parametrize(
    ("training", "wanted"),
    [
        ({}, [[2.0, 0.8], [0.25, 0.0]]),
        ({"behavior_cap": 1.5, "behavior_floor": 0.5}, [[1.5, 0.8], [0.5, 0.0]]),
        ({"behavior_cap": 1.5, "behavior_floor": 0.5, "behavior_mode": "mask"}, [[0.0, 0.8], [0.0, 0.0]]),
        ({"behavior_weights": "sequence"}, [[1.6, 1.6], [0.25, 0.0]]),
    ],
)
def test_weights_are_what_the_settings_ask_for(training: dict[str, object], wanted: list[list[float]]) -> None:
    weights, _ = weights_of(**training)

    torch.testing.assert_close(weights, torch.tensor(wanted))


def test_data_is_left_as_it_is_only_where_that_is_said() -> None:
    assert weights_of(behavior_weights="none") == (None, {})


def test_the_effective_sample_size_is_that_of_all_microbatches() -> None:
    _, metrics = weights_of()
    figures = {name: float(value) for name, value in metrics.items()}

    found = effective_sample_size(dict(figures))

    # Weights 2, 0.8 and 0.25.
    assert found["effective_sample_size"] == pytest.approx(3.05**2 / (3 * (4 + 0.64 + 0.0625)))
    assert not any("square" in name for name in found)
    assert effective_sample_size({"policy_loss": 1.0}) == {"policy_loss": 1.0}


def test_weights_that_are_all_masked_away_are_no_samples() -> None:
    _, metrics = weights_of(behavior_cap=1.0, behavior_floor=1.0, behavior_mode="mask")

    assert effective_sample_size({n: float(v) for n, v in metrics.items()})["effective_sample_size"] == 0.0


def test_distance_is_measured_by_version() -> None:
    found = list(staleness_metrics(KNOWN, MICRO, PROXIMAL))

    assert [(next(iter(means)), tokens) for means, tokens in found] == [
        ("proximal_logprob_diff_by_staleness/0", 1.0),
        ("proximal_logprob_diff_by_staleness/2", 2.0),
    ]
    current, old = (float(next(iter(means.values()))) for means, _ in found)
    assert current == pytest.approx(math.log(1.25))
    assert old == pytest.approx((math.log(2) + math.log(4)) / 2)


def test_an_empty_microbatch_says_nothing() -> None:
    empty = lay_out(BATCH, (), packed=False, device=CPU)

    assert list(staleness_metrics(ESTIMATES.rows(empty), empty, torch.zeros(1, 1))) == []


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("scale", [1.0, 0.0])
@pytest.mark.parametrize("threshold", [1e-3, 0.5, 2.0, 100.0])
def test_one_rank_keeps_what_the_mask_of_the_whole_minibatch_keeps(threshold: float, scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(6, 5, generator=generator) < 0.7
    estimates = Estimates(
        mask=mask,
        rewards=torch.zeros(6, 5),
        turn_ids=torch.zeros(6, 5, dtype=torch.int32),
        successful=torch.zeros(6, dtype=torch.bool),
        sampling_logprobs=torch.randn(6, 5, generator=generator),
        staleness=torch.zeros(6, 5),
        on_policy=mask,
        proximal_logprobs=torch.randn(6, 5, generator=generator),
        advantages=scale * torch.randn(6, 5, generator=generator),
    )
    rows = torch.tensor([4, 0, 3])

    kept = m2po_kept(estimates, rows, threshold=threshold, group=dist.group.WORLD)

    wanted = m2po_mask(
        estimates.proximal_logprobs[rows],
        estimates.sampling_logprobs[rows],
        estimates.advantages[rows],
        mask[rows],
        threshold=threshold,
    )
    assert torch.equal(kept, wanted)


def test_tokens_that_are_not_kept_weigh_nothing() -> None:
    known = replace(KNOWN, kept=torch.tensor([[True, False], [True, False]]))

    weights, metrics = correction_weights(TrainingSettings(), known, PROXIMAL)
    alone, _ = correction_weights(TrainingSettings(behavior_weights="none"), known, PROXIMAL)

    torch.testing.assert_close(weights, torch.tensor([[2.0, 0.0], [0.25, 0.0]]))
    assert alone is not None
    assert alone.tolist() == [[1.0, 0.0], [1.0, 0.0]]
    assert float(metrics["m2po_masked_fraction"]) == pytest.approx(1 / 3)
