"""Numbers that are not finite reach no weight, moment, schedule, checkpoint or engine; one rank here."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import learner_scenarios as runs
import numpy as np
import pytest
import torch
from learner_scenarios import Scenario

from rlhf_ray.errors import LearnerError
from rlhf_ray.learner.batch import SequenceBatch
from rlhf_ray.learner.finite import MOST_SKIPPED
from rlhf_ray.learner.learner import Learner
from rlhf_ray.learner.models import head_is_new

pytestmark = pytest.mark.usefixtures("one_rank")

PLUGINS = """
import torch

def zscore(rewards, group_ids):
    return (rewards - rewards.mean()) / rewards.std()

def endless(logprobs, old_logprobs, advantages, mask, *, aggregation, normalizer):
    return (logprobs * mask).sum() + torch.inf, {}

def steep(logprobs, old_logprobs, advantages, mask, *, aggregation, normalizer):
    return torch.sqrt(((logprobs - logprobs.detach()) * mask).sum()), {}
"""

Spoil = Callable[[Learner, SequenceBatch], SequenceBatch]


def of_completion(name: str, value: float) -> Spoil:
    """Sequence 4 has such a number in ``[N]``."""

    def spoil(_: Learner, batch: SequenceBatch) -> SequenceBatch:
        spoiled = np.where(np.arange(len(batch)) == 4, np.float32(value), getattr(batch, name))
        return batch.with_rewards(spoiled) if name == "rewards" else replace(batch, **{name: spoiled})

    return spoil


def of_token(value: float) -> Spoil:
    """The last token of sequence 4 was sampled with such a log-probability."""

    def spoil(_: Learner, batch: SequenceBatch) -> SequenceBatch:
        logprobs = batch.sampling_logprobs.copy()
        logprobs[batch.completion_lengths[:5].sum() - 1] = value
        return replace(batch, sampling_logprobs=logprobs)

    return spoil


def of_model(name: str) -> Spoil:
    """One weight of a model is NaN."""

    def spoil(learner: Learner, batch: SequenceBatch) -> SequenceBatch:
        spoil_weight(learner._models.reference.model if name == "reference" else getattr(learner, name).model)
        return batch

    return spoil


def equal_rewards(_: Learner, batch: SequenceBatch) -> SequenceBatch:
    return batch.with_rewards(np.ones_like(batch.rewards))


def spoil_weight(model: torch.nn.Module, value: float = math.nan) -> None:
    with torch.no_grad():
        next(iter(model.parameters())).view(-1)[:1].fill_(value)


CASES: dict[str, tuple[str, Spoil, dict[str, Any]]] = {
    # What the error says first, what is wrong, and settings.
    "reward": ("rewards not finite, first in sequence 4 ", of_completion("rewards", math.inf), {}),
    "greedy reward": ("rewards not finite, first in sequence 4 ", of_completion("greedy_rewards", math.nan), {}),
    "NaN of the engine": ("sampling log-probabilities not finite, first in sequence 4 ", of_token(math.nan), {}),
    "-inf of the engine": ("sampling log-probabilities not finite, first in sequence 4 ", of_token(-math.inf), {}),
    "reference": (
        "reference log-probabilities not finite, first in sequence 0 ",
        of_model("reference"),
        {"kl_coef": 0.1, "kl_target": 0.01},
    ),
    "critic": ("values not finite, first in sequence 0 ", of_model("critic"), {"value_init": "reward_mean"}),
    "policy": ("log-probabilities not finite, first in sequence", of_model("policy"), {}),
    "advantage": (
        "advantages not finite, first in sequence 0 ",
        equal_rewards,
        {"advantage": "zscore", "whiten_advantages": False},
    ),
    "loss": ("policy loss not finite, first in sequence", lambda _, batch: batch, {"loss": "endless"}),
    # Its square is beyond float32; the policy alone could be trained by it.
    "value loss": ("value loss not finite, first in sequence", of_completion("rewards", 1e30), {}),
    "gradient": (
        "gradient of the policy not finite, although all that it was computed from is",
        lambda _, batch: batch,
        {"loss": "steep"},
    ),
}


@pytest.fixture
def updated(models: Path, tmp_path: Path) -> Callable[..., tuple[Learner, Callable[[], dict[str, float]]]]:
    """A learner, and an update of it in which the case's number is wrong."""
    (tmp_path / "plugins.py").write_text(PLUGINS)

    def make(case: str, **training: Any) -> tuple[Learner, Callable[[], dict[str, float]]]:
        _, spoil, settings = CASES[case]
        settings = {
            name: f"{tmp_path}/plugins.py:{value}" if name in ("advantage", "loss") else value
            for name, value in settings.items()
        }
        scenario = Scenario(training=settings | training)
        learner = Learner(runs.make_spec(models, scenario))
        batch, plan = runs.share_of(spoil(learner, runs.make_batch(9, seed=1)), scenario)
        return learner, lambda: learner.update(batch, plan)

    return make


@pytest.mark.parametrize("case", CASES)
def test_an_update_with_a_number_that_is_not_finite_is_refused(case: str, updated: Any) -> None:
    learner, update = updated(case)
    before = copy.deepcopy(learner.state())

    with pytest.raises(LearnerError, match=f"^{CASES[case][0]}"):
        update()

    assert runs.same_state(before, learner.state())
    assert all(one.grad is None for model in learner._models.trained.values() for one in model.model.parameters())


@pytest.mark.parametrize("case", [name for name in CASES if name not in ("policy", "critic")])
def test_such_an_update_can_be_skipped_until_there_are_too_many(case: str, updated: Any) -> None:
    learner, update = updated(case, nonfinite_updates="skip", kl_horizon=100)
    coefficient = learner._credit.kl_coef
    skipped = [update()["skipped_updates"]]
    if skipped == [2.0]:
        assert [model.steps_taken for model in learner._models.trained.values() if model.steps_taken] == []
        with pytest.raises(LearnerError, match=f"^{MOST_SKIPPED} optimizer steps in a row were skipped, .*not finite"):
            for _ in range(MOST_SKIPPED):
                skipped.append(update()["skipped_updates"])
        assert skipped == [2.0] * (MOST_SKIPPED // 2 - 1)
    else:
        assert skipped == [1.0]
        assert learner.policy.steps_taken == 1
    assert all(model.nonfinite() is None for model in learner._models.trained.values())
    assert learner._credit.kl_coef == coefficient


def test_neither_model_steps_where_the_gradient_of_the_critic_alone_is_not_finite(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = Learner(runs.make_spec(models, Scenario()))
    before = copy.deepcopy(learner.state())
    monkeypatch.setattr(learner.critic, "grad_norm", lambda: torch.tensor(math.inf))

    with pytest.raises(LearnerError, match=r"^gradient of the critic not finite, although all"):
        runs.update(learner, Scenario(), 0)

    assert runs.same_state(before, learner.state())


def test_only_steps_in_a_row_are_counted(updated: Any) -> None:
    """One of two steps of each update is made."""
    _, update = updated("NaN of the engine", nonfinite_updates="skip")

    assert [update()["skipped_updates"] for _ in range(MOST_SKIPPED + 1)] == [1.0] * (MOST_SKIPPED + 1)


def test_a_reward_without_a_mean_starts_no_critic(models: Path) -> None:
    scenario = Scenario(training={"value_init": "reward_mean", "nonfinite_updates": "skip"}, critic="policy")
    learner = Learner(runs.make_spec(models, scenario))
    batch, plan = runs.share_of(of_completion("rewards", math.inf)(learner, runs.make_batch(9, seed=1)), scenario)

    learner.update(batch, plan)

    assert head_is_new(learner.critic.model)


@pytest.mark.parametrize("model", ["policy", "critic"])
def test_weights_that_are_not_finite_are_neither_saved_exported_nor_kept(
    model: str, models: Path, tmp_path: Path
) -> None:
    learner = Learner(runs.make_spec(models, Scenario()))
    spoil_weight(getattr(learner, model).model)
    named = f"^(model.embed_tokens|embed_tokens).*of the {model} is not finite: it must not be "

    with pytest.raises(LearnerError, match=named + "saved"):
        learner.save(str(tmp_path / "checkpoint"))
    with pytest.raises(LearnerError, match=named + "exported"):
        learner.export(str(tmp_path / "export"))
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_weights_that_are_not_finite_is_refused(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = Learner(runs.make_spec(models, Scenario()))
    spoil_weight(learner.policy.model)
    with monkeypatch.context() as unchecked:
        unchecked.setattr(learner, "_check_finite", lambda _: None)
        learner.save(str(tmp_path)).result()

    with pytest.raises(LearnerError, match=f"embed_tokens.*must not be taken from {tmp_path}"):
        Learner(runs.make_spec(models, Scenario())).load(str(tmp_path))


@pytest.mark.parametrize(
    ("wire_dtype", "value"), [("float32", math.nan), ("float32", -math.inf), ("bfloat16", math.nan), ("float16", 7e4)]
)
def test_weights_that_engines_would_not_get_as_finite_numbers_are_not_published(
    wire_dtype: str, value: float, models: Path
) -> None:
    learner = Learner(runs.make_spec(models, Scenario()))
    runs.publish_in(wire_dtype, learner)
    list(learner.weight_buckets())
    spoil_weight(learner.policy.model, value)

    for publish in (learner.weight_buckets, learner.weight_source):
        with pytest.raises(LearnerError, match=f"embed_tokens.*of the policy is not finite in {wire_dtype}.*published"):
            publish()


def test_a_step_that_leads_out_of_the_finite_numbers_is_not_kept(models: Path) -> None:
    """Its gradient is finite: only the weights tell."""
    learner = Learner(runs.make_spec(models, Scenario(training={"lr": 1e38, "lr_warmup_steps": 0})))

    with pytest.raises(LearnerError, match="of the policy is not finite: it must not be kept after an update"):
        runs.update(learner, Scenario(num_minibatches=1), 0)
