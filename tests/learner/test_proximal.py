from __future__ import annotations

import numpy as np
import torch

from rlhf_ray.learner.batch import SequenceBatch
from rlhf_ray.learner.estimates import Estimates
from rlhf_ray.learner.layout import lay_out
from rlhf_ray.learner.proximal import LoglinearProximal, RecomputedProximal, loglinear_proximal

CPU = torch.device("cpu")
BATCH = SequenceBatch.single_turn(
    token_ids=np.zeros(5, dtype=np.int32),
    prompt_lengths=np.ones(2, dtype=np.int32),
    completion_lengths=np.asarray([2, 1], dtype=np.int32),
    sampling_logprobs=np.asarray([-3, -3, -3], dtype=np.float32),
    staleness=np.asarray([0, 1, 3], dtype=np.int32),
)
ESTIMATES = Estimates.of(BATCH, CPU)
FIRST, SECOND = (lay_out(BATCH, (row,), packed=False, device=CPU) for row in range(2))


def test_the_first_step_gives_what_no_pass_was_made_for() -> None:
    proximal = RecomputedProximal(ESTIMATES.sampling_logprobs, needed_before=False)
    assert [proximal.needs_pass(first=first) for first in (True, False)] == [False, True]
    proximal.put(SECOND, torch.tensor([[-7.0]]))
    stepping = torch.tensor([[-1.0, -2.0]], requires_grad=True)

    first = proximal.of_step(FIRST, stepping, ESTIMATES.rows(FIRST), first=True)
    again = proximal.of_step(FIRST, stepping + 5.0, ESTIMATES.rows(FIRST), first=False)
    other = proximal.of_step(SECOND, torch.tensor([[-9.0]]), ESTIMATES.rows(SECOND), first=False)

    assert (first.tolist(), again.tolist(), other.tolist()) == ([[-1.0, -2.0]], [[-1.0, -2.0]], [[-7.0]])
    assert not first.requires_grad


def test_the_loglinear_policy_takes_a_pass_only_for_what_comes_before_the_steps() -> None:
    for needed in (False, True):
        proximal = LoglinearProximal(ESTIMATES.sampling_logprobs, needed_before=needed)
        assert proximal.needs_pass(first=False) == needed
        found = proximal.of_step(FIRST, torch.tensor([[-1.0, -1.0]]), ESTIMATES.rows(FIRST), first=True)
        assert found.tolist() == [[-3.0, -2.0]]


def test_the_loglinear_policy_lies_on_the_line_by_version() -> None:
    current, sampling = torch.tensor([[-1.0, -1.0, -1.0]]), torch.tensor([[-3.0, -3.0, -3.0]])

    proximal = loglinear_proximal(current, sampling, torch.tensor([[0.0, 1.0, 3.0]]))

    # 0, 1 and 3 of 1, 2 and 4 steps from -3 to -1.
    assert proximal.tolist() == [[-3.0, -2.0, -1.5]]


def test_the_loglinear_policy_has_no_gradient() -> None:
    current = torch.tensor([[-1.0]], requires_grad=True)

    assert not loglinear_proximal(current, torch.tensor([[-3.0]]), torch.ones(1, 1)).requires_grad
