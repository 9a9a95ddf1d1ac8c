from __future__ import annotations

import itertools
import math

import pytest
import torch

from rlhf_ray.learner import metrics as module
from rlhf_ray.learner.metrics import MetricSums

pytestmark = pytest.mark.usefixtures("one_rank")


def test_means_are_weighted_by_their_tokens() -> None:
    sums = MetricSums()
    sums.add({"entropy": 1.0, "approx_kl": torch.tensor(0.5)}, 3.0)
    sums.add({"entropy": 5.0}, 1.0)

    assert sums.merge(1) == {"entropy": pytest.approx(2.0), "approx_kl": pytest.approx(0.5)}


def test_names_that_end_in_max_are_maxima() -> None:
    sums = MetricSums()
    sums.add({"ratio_max": 1.5}, 100.0)
    sums.add({"ratio_max": torch.tensor(2.5)}, 1.0)
    sums.add({"ratio_max": 0.5}, 7.0)

    assert sums.merge(1) == {"ratio_max": 2.5}


@pytest.mark.parametrize("values", [*itertools.permutations([1.5, math.nan, 2.5])])
def test_a_maximum_with_nan_is_nan_on_one_rank_and_over_ranks(
    values: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    together = MetricSums()
    for value in values:
        together.add({"ratio_max": value}, 1.0)
    assert math.isnan(together.merge(1)["ratio_max"])

    monkeypatch.setattr(module, "gather_objects", lambda *_: [({"ratio_max": value}, {}) for value in values])
    assert math.isnan(MetricSums().merge(1)["ratio_max"])


def test_a_maximum_may_be_negative() -> None:
    sums = MetricSums()
    sums.add({"logprob_max": -3.0}, 1.0)

    assert sums.merge(1) == {"logprob_max": -3.0}


def test_losses_are_summed_over_microbatches_and_averaged_over_steps() -> None:
    sums = MetricSums()
    # Two steps of two microbatches each: 1.0 and 3.0.
    for share in (0.25, 0.75, 1.0, 2.0):
        sums.add_loss("policy_loss", torch.tensor(share, requires_grad=True))

    assert sums.merge(2) == {"policy_loss": pytest.approx(2.0)}


def test_an_empty_microbatch_counts_for_nothing() -> None:
    sums = MetricSums()
    sums.add({"entropy": 2.0, "ratio_max": 1.0}, 4.0)
    sums.add({"entropy": 0.0, "ratio_max": 9.0, "value_mean": 0.0}, 0.0)

    assert sums.merge(1) == {"entropy": pytest.approx(2.0), "ratio_max": 1.0}


def test_nothing_merges_to_nothing() -> None:
    assert MetricSums().merge(1) == {}


def test_all_that_is_on_the_device_is_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sums, reads, tolist = MetricSums(), [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: (reads.append(len(tensor)), tolist(tensor))[1])
    monkeypatch.setattr(torch.Tensor, "__float__", lambda _: pytest.fail("a number was read by itself"))
    for step in range(5):
        sums.add({"entropy": torch.tensor(float(step)), "ratio_max": torch.tensor(2.0 * step)}, 2.0)
        sums.add_loss("policy_loss", torch.tensor(1.0, requires_grad=True))
    sums.add({"of_another_type": torch.tensor(0.1, dtype=torch.float64)}, 1.0)
    assert reads == []

    merged = sums.merge(5)

    assert reads == [4]
    assert merged == {"entropy": 2.0, "ratio_max": 8.0, "policy_loss": 1.0, "of_another_type": 0.1}
