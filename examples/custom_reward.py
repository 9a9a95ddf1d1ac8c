"""Custom rewards: two functions with weights, on the built-in model and task (a few minutes on a laptop).

::

    python examples/custom_reward.py
    python examples/custom_reward.py training.iterations=5

The task is two-digit addition: the prompt is ``47+85=``, and the column ``answer`` of the row contains ``132``. A
reward function is called once per prompt, with one list entry per completion:
``f(*, prompts, completions, completion_ids, **columns) -> list[float | None]``. It names the arguments that it reads
and ignores the others in ``**columns``. Use ``async def`` for a function that calls a service: if all functions of a
run are async, a worker scores several prompts at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from rlhf_ray import Algorithm, PPOConfig


def correct(*, completions: Sequence[str], answer: Sequence[str], **columns: Any) -> list[float]:
    """1 for the correct sum, else 0: the objective, which is also used for evaluation."""
    return [float(text == right) for text, right in zip(completions, answer, strict=True)]


def near(scale: float) -> Callable[..., list[float | None]]:
    """Return a reward for sums that are close: 1 at the correct sum, decreasing to 0 at a distance of ``scale``.

    The function is a closure; it is sent to the reward workers together with its parameter.
    """

    def near(*, completions: Sequence[str], answer: Sequence[str], **columns: Any) -> list[float | None]:
        return [closeness(text, int(right)) for text, right in zip(completions, answer, strict=True)]

    def closeness(text: str, right: int) -> float | None:
        # None means "does not apply": the completion keeps the reward of the other function, and the reported mean
        # of this function covers only numbers. At least one function must apply to each completion.
        if not (text.isascii() and text.isdigit()):
            return None
        return max(0.0, 1.0 - abs(int(text) - right) / scale)

    return near


def config() -> PPOConfig:
    """Build the run; the learner maximizes ``1.0 * correct + 0.2 * near``.

    The weight of ``near`` is small, so that a correct sum is worth much more than a close one. ``near`` only
    distinguishes completions while none of them is correct.
    """
    return PPOConfig().rewards(correct, near(scale=20), weights=[1.0, 0.2]).training(iterations=20)


def main(overrides: Sequence[str]) -> None:
    """Train, and compare the accuracy before and after."""
    algo = config().apply_overrides(overrides).build_algo()
    try:
        before = accuracy(algo)
        while algo.iteration < algo.settings.training.iterations:
            rewards = algo.train()["rewards"]
            print(f"correct {rewards['correct']['mean']:.3f}   near {rewards['near']['mean']:.3f}", flush=True)
        print(f"held-out accuracy: {before:.1%} before, {accuracy(algo):.1%} after; run directory: {algo.run_dir}")
    finally:
        algo.stop()


def accuracy(algo: Algorithm) -> float:
    """Return the accuracy on held-out sums; ``evaluate()`` would return the weighted sum of both functions."""
    from rlhf_ray.types import ScoredGroup

    scored = [outcome for outcome in algo.sample_evaluation() if isinstance(outcome, ScoredGroup)]
    return sum(float(group.rewards_by_function["correct"][0]) for group in scored) / len(scored)


if __name__ == "__main__":
    main(sys.argv[1:])
