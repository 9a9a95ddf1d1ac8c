"""An agent that is written against the OpenAI client, trained with GRPO on a chat model.

::

    python examples/openai_agent.py MODEL_FOLDER
    python examples/openai_agent.py MODEL_FOLDER training.iterations=5 data.batch_size=8

The agent imports nothing of this library: it runs the same against any OpenAI-compatible server. It asks for an answer,
asks the same model to check it, and returns the reward of what is left. Each request is a turn of the trajectory, and
the second one, which begins a conversation of its own, is a further sequence of it: both are trained.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlhf_ray import GRPOConfig


async def solve(row: Mapping[str, Any], client: Any) -> float:
    """Answer, check, and grade."""
    first = await ask(client, f"{row['prompt']} Answer with one number.")
    second = await ask(client, f"{row['prompt']} A student answered: {first} Answer with the right number.")
    return 0.3 * grade(first, row["answer"]) + 0.7 * grade(second, row["answer"])


async def ask(client: Any, text: str) -> str:
    """Return the answer to a question."""
    completion = await client.chat.completions.create(
        model="policy", messages=[{"role": "user", "content": text}], max_tokens=24
    )
    return completion.choices[0].message.content or ""


def grade(text: str, answer: str) -> float:
    """Return 1 where the last number of a text is the answer, else 0."""
    numbers = re.findall(r"[0-9]+", text)
    return float(bool(numbers) and numbers[-1] == answer)


def rows() -> Iterator[dict[str, str]]:
    """Yield sums of two digits."""
    for first in range(10):
        for second in range(10):
            yield {"prompt": f"What is {first} + {second}?", "answer": str(first + second)}


def config(model: str) -> GRPOConfig:
    """Build the run."""
    return (
        GRPOConfig()
        .model(path=model)
        .data(path=f"{__file__}:rows", batch_size=16, as_chat=True)
        .rollouts(group_size=4, max_new_tokens=64)
        .environment(agent=solve, max_turns=2)
        .training(iterations=20, lr=5e-6)
    )


def main(model: str, overrides: Sequence[str]) -> None:
    """Train, and print the mean reward."""
    algo = config(model).apply_overrides(overrides).build_algo()
    try:
        while algo.iteration < algo.settings.training.iterations:
            print(f"reward {algo.train()['rollouts']['reward_mean']:.3f}", flush=True)
    finally:
        algo.stop()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
