from __future__ import annotations

from typing import Any

import pytest

from rlhf_ray import PPOConfig
from rlhf_ray.config.schedule import Schedule


def schedule(**changes: Any) -> Schedule:
    dotted = {name.replace("__", ".", 1): value for name, value in changes.items()}
    return Schedule(PPOConfig.from_dict(dotted).settings)


def test_counts_of_an_uneven_run() -> None:
    plan = schedule(
        data__batch_size=5,
        rollouts__group_size=3,
        rollouts__max_new_tokens=100,
        rollouts__max_prompt_tokens=20,
        training__iterations=11,
        training__num_epochs=2,
        training__num_minibatches=4,
        training__critic_warmup_iterations=3,
        evaluation__interval=4,
        checkpointing__interval=10,
    )

    assert plan.completions == 15
    assert plan.minibatch_sizes == (4, 4, 4, 3)
    assert plan.optimizer_steps == 8
    assert plan.total_optimizer_steps == 88
    assert plan.policy_optimizer_steps == 64  # 8 iterations after the warm-up
    assert plan.evaluations == 2  # after iterations 4 and 8
    assert plan.checkpoints == 2  # after iterations 10 and 11, the last
    rows = dict(plan.rows())
    assert rows["sampled tokens per iteration"] == "at most 1,500"
    assert rows["tokens per learner pass"] == "at most 1,800"  # 15 x (20 + 100)
    assert rows["completions of the run"] == "165"


@pytest.mark.parametrize("prompts", [1, 2, 7, 64])
@pytest.mark.parametrize("minibatches", [1, 2, 3, 5, 8])
def test_minibatches_hold_every_completion_once_and_differ_by_at_most_one(prompts: int, minibatches: int) -> None:
    plan = schedule(data__batch_size=prompts, rollouts__group_size=8, training__num_minibatches=minibatches)

    sizes = plan.minibatch_sizes

    assert len(sizes) == minibatches
    assert sum(sizes) == plan.completions
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1


def test_intervals_of_zero_mean_never() -> None:
    plan = schedule(evaluation__interval=0, checkpointing__interval=0)

    assert (plan.evaluations, plan.checkpoints) == (0, 0)


def test_the_critic_may_make_steps_of_its_own() -> None:
    training = {"training__iterations": 10, "training__num_minibatches": 4, "training__num_epochs": 2}
    same = schedule(**training)
    assert (same.passes, same.critic_optimizer_steps, same.policy_optimizer_steps) == (2, 80, 80)
    own = schedule(**training, training__critic_epochs=3, training__critic_num_minibatches=2)
    assert (own.passes, own.critic_optimizer_steps, own.policy_optimizer_steps) == (3, 60, 80)
    warmup = schedule(**training, training__critic_warmup_iterations=4)
    assert warmup.policy_optimizer_steps == 48
    early = schedule(**training, training__critic_warmup_iterations=4, training__critic_warmup_explained_variance=0.5)
    assert early.policy_optimizer_steps == 80, "as if there were none: when it ends is not known"


def test_rows_print_the_derived_numbers() -> None:
    rows = dict(
        schedule(
            data__batch_size=500,
            rollouts__group_size=3,
            training__num_minibatches=4,
            training__num_epochs=2,
            training__iterations=20,
            training__critic_warmup_iterations=5,
            evaluation__interval=10,
            checkpointing__interval=1,
        ).rows()
    )

    assert rows["completions per iteration"] == "1,500 (500 x 3)"
    assert rows["minibatch"] == "375 completions"
    assert rows["optimizer steps per iteration"] == "8 (2 passes)"
    assert rows["optimizer steps of the run"] == "160 (policy 120)"
    assert rows["evaluations"] == "2 (every 10 iterations)"
    assert rows["checkpoints"] == "20 (every 1 iteration)"


def test_rows_say_when_minibatches_are_uneven_and_when_nothing_is_scheduled() -> None:
    rows = dict(schedule(data__batch_size=5, rollouts__group_size=1, training__num_minibatches=2).rows())

    assert rows["minibatch"] == "2 or 3 completions"
    assert rows["optimizer steps per iteration"] == "2 (1 pass)"
    assert rows["tokens per learner pass"] == "as the model's context allows"
    assert rows["evaluations"] == "on request"
    assert rows["checkpoints"] == "on request"


@pytest.mark.parametrize(
    ("interval", "start", "end", "count", "text"),
    [
        (0, True, False, 1, "1 (before the first iteration)"),
        (0, False, True, 1, "1 (after the last iteration)"),
        (5, True, True, 3, "3 (before the first iteration, every 5 iterations, after the last iteration)"),
        (4, False, True, 3, "3 (every 4 iterations, after the last iteration)"),
    ],
)
def test_the_last_evaluation_is_counted_once(interval: int, start: bool, end: bool, count: int, text: str) -> None:
    plan = schedule(
        training__iterations=10,
        evaluation__interval=interval,
        evaluation__at_start=start,
        evaluation__at_end=end,
    )

    assert plan.evaluations == count
    assert dict(plan.rows())["evaluations"] == text
