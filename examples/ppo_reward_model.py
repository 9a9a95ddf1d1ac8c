"""PPO with a reward model: preferences, a Bradley-Terry model, and a policy (4 minutes on a laptop).

::

    python examples/ppo_reward_model.py
    python examples/ppo_reward_model.py training.iterations=5

The task is two-digit addition: the prompt is ``47+85=``, and the column ``answer`` of the row contains ``132``.
Instead of people, the task's checker compares pairs of answers. The reward model is trained on these preferences, and
PPO is trained only on the reward model's scores. The checker is added with a weight of 0, so that the run reports both
the optimized reward and the actual accuracy.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_ray import Algorithm, PPOConfig, RewardModelReward
from rlhf_ray.quickstart import model_path
from rlhf_ray.quickstart.task import eval_rows, train_rows

STEPS = 300
PAIRS_PER_STEP = 128


def correct(*, completions: Sequence[str], answer: Sequence[str], **columns: Any) -> list[float]:
    """1 for the correct sum, else 0: what the reward model approximates."""
    return [float(text == right) for text, right in zip(completions, answer, strict=True)]


def preferences(rows: Sequence[dict[str, str]], rng: random.Random) -> Iterator[tuple[str, str]]:
    """Yield pairs of texts, the preferred one first: two answers to a prompt with different scores."""
    while True:
        row = rng.choice(rows)
        first, second = candidate(row["answer"], rng), candidate(row["answer"], rng)
        scores = correct(completions=[first, second], answer=[row["answer"]] * 2)
        if scores[0] != scores[1]:
            better, worse = (first, second) if scores[0] > scores[1] else (second, first)
            yield row["prompt"] + better, row["prompt"] + worse


def candidate(right: str, rng: random.Random) -> str:
    """Return an answer that a policy could give: correct, close, with a wrong digit, truncated or too long."""
    kind = rng.random()
    if kind < 0.4:
        return right
    if kind < 0.6:
        return str(int(right) + rng.choice([-20, -10, -2, -1, 1, 2, 10, 20]))
    if kind < 0.9:
        place = rng.randrange(len(right))
        return right[:place] + rng.choice("0123456789") + right[place + 1 :]
    return right[:-1] if kind < 0.95 else right + rng.choice("0123456789")


def train_reward_model(folder: Path, *, steps: int = STEPS) -> float:
    """Train a classifier with one label on preferences and save it.

    The loss is that of Bradley and Terry, ``-log sigmoid(r(better) - r(worse))``, plus a small multiple of
    ``(r(better) + r(worse))^2``, which keeps scores centered at 0 (Eisenstein et al., arXiv:2312.09244).

    Returns:
        The fraction of held-out pairs that it orders correctly.
    """
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()  # It would warn about the new head.
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    # The policy's backbone, which can already add a little, with a new head.
    model = AutoModelForSequenceClassification.from_pretrained(model_path(), num_labels=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    pairs = preferences(train_rows(), random.Random(0))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, (step + 1) / 20, 2 * (1 - step / steps))
        better, worse = scores_of(model, tokenizer, [next(pairs) for _ in range(PAIRS_PER_STEP)])
        loss = -logsigmoid(better - worse).mean() + 0.01 * (better + worse).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    held_out = preferences(eval_rows(), random.Random(1))
    with torch.no_grad():
        better, worse = scores_of(model, tokenizer, [next(held_out) for _ in range(1000)])
    return float((better > worse).float().mean())


def scores_of(model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Score the better and the worse texts, ``[N]`` each."""
    texts = [better for better, _ in pairs] + [worse for _, worse in pairs]
    given = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    logits = model(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).logits[:, 0]
    better, worse = logits.split(len(pairs))
    return better, worse


def config(reward_model: Path) -> PPOConfig:
    """Build the run.

    ``as_chat=False``: the reward model was trained on plain texts, although its tokenizer has a chat template.
    """
    return (
        PPOConfig()
        .rewards(RewardModelReward(str(reward_model), as_chat=False), correct, weights=[1.0, 0.0])
        .training(iterations=20)
    )


def main(overrides: Sequence[str]) -> None:
    """Train the reward model, then the policy."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        ordered = train_reward_model(Path(folder))
        print(f"reward model: orders {ordered:.1%} of held-out pairs correctly, {time.perf_counter() - started:.0f} s")
        algo = config(Path(folder)).apply_overrides(overrides).build_algo()
        try:
            before = held_out(algo)
            while algo.iteration < algo.settings.training.iterations:
                rewards = algo.train()["rewards"]
                scored, right = rewards["reward_model"]["mean"], rewards["correct"]["mean"]
                print(f"reward model {scored:6.2f}   correct {right:.3f}", flush=True)
            after = held_out(algo)
            for name, (scored, right) in (("before", before), ("after", after)):
                print(f"held out, {name}: reward model {scored:.2f}, correct {right:.1%}")
        finally:
            algo.stop()


def held_out(algo: Algorithm) -> tuple[float, float]:
    """Return the mean score and the accuracy of greedy answers to held-out sums."""
    from rlhf_ray.types import ScoredGroup

    groups = [outcome for outcome in algo.sample_evaluation() if isinstance(outcome, ScoredGroup)]
    means = [
        sum(float(group.rewards_by_function[name][0]) for group in groups) / len(groups)
        for name in ("reward_model", "correct")
    ]
    return means[0], means[1]


if __name__ == "__main__":
    main(sys.argv[1:])
