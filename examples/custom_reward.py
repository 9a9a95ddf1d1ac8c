"""Rewards of your own: two functions and their weights, on the built-in model and task (a few minutes on a laptop).

::

    python examples/custom_reward.py
    python examples/custom_reward.py training.iterations=5

The task is two-digit addition: prompt ``47+85=``, and the row's ``answer`` column holds ``132``. A reward function is
called once a prompt, with a list entry for each of its completions:
``f(*, prompts, completions, completion_ids, **columns) -> list[float | None]``. It names what it reads and lets the
rest fall into ``**columns``. One that waits for a service is written ``async def``: where all of a run's functions
are, a worker scores several prompts at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from rlhf_ray import Algorithm, PPOConfig


def correct(*, completions: Sequence[str], answer: Sequence[str], **columns: Any) -> list[float]:
    """1 for the right sum, else 0: what is wanted, and all that is measured in the end."""
    return [float(text == right) for text, right in zip(completions, answer, strict=True)]


def near(scale: float) -> Callable[..., list[float | None]]:
    """Make a function that pays for being close: 1 at the right sum, falling to 0 at ``scale`` beside it.

    A closure, because the parameter belongs to this run; it travels to the reward workers as it is.
    """

    def near(*, completions: Sequence[str], answer: Sequence[str], **columns: Any) -> list[float | None]:
        return [closeness(text, int(right)) for text, right in zip(completions, answer, strict=True)]

    def closeness(text: str, right: int) -> float | None:
        # None says "does not apply": the completion keeps what the other function gave, and the mean of this one in
        # the report is over numbers alone. A completion to which no function applies would have no reward at all.
        if not (text.isascii() and text.isdigit()):
            return None
        return max(0.0, 1.0 - abs(int(text) - right) / scale)

    return near


def config() -> PPOConfig:
    """Build the run: the sum that the learner maximizes is ``1.0 * correct + 0.2 * near``.

    The weight of ``near`` is small: a right sum must stay worth much more than a near one, and ``near`` is there only
    to tell completions apart while none is right.
    """
    return PPOConfig().rewards(correct, near(scale=20), weights=[1.0, 0.2]).training(iterations=20)


def main(overrides: Sequence[str]) -> None:
    """Train and compare."""
    algo = config().apply_overrides(overrides).build_algo()
    try:
        before = accuracy(algo)
        while algo.iteration < algo.settings.training.iterations:
            rewards = algo.train()["rewards"]
            print(f"correct {rewards['correct']['mean']:.3f}   near {rewards['near']['mean']:.3f}", flush=True)
        print(f"right on held-out sums: {before:.1%} before, {accuracy(algo):.1%} after; all in {algo.run_dir}")
    finally:
        algo.stop()


def accuracy(algo: Algorithm) -> float:
    """Share of held-out sums that are right; ``evaluate()`` would give the weighted sum of both functions."""
    from rlhf_ray.types import ScoredGroup

    scored = [outcome for outcome in algo.sample_evaluation() if isinstance(outcome, ScoredGroup)]
    return sum(float(group.rewards_by_function["correct"][0]) for group in scored) / len(scored)


if __name__ == "__main__":
    main(sys.argv[1:])
