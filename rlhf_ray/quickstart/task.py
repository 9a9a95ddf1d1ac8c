"""Data and reward of the embedded quickstart: what ``prompts/`` reads and ``rewards/`` calls when neither is set.

The task is the addition of two two-digit numbers: the prompt ``47+85=`` is answered by ``132`` and the end of the
sequence. It is generated, so it needs no file, and checked exactly, so its reward cannot be gamed.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from typing import Any

__all__ = ["eval_rows", "reward", "train_rows"]

NUM_EVAL_PAIRS = 512
SPLIT_SEED = 0


def train_rows() -> list[dict[str, str]]:
    """Return the training rows, ``{"prompt": "47+85=", "answer": "132"}``, in a fixed random order."""
    train_pairs, _ = _split_pairs()
    return [_row(a, b) for a, b in train_pairs]


def eval_rows() -> list[dict[str, str]]:
    """Return the 512 held-out rows, in the form and kind of order of :func:`train_rows`.

    Neither a held-out sum nor the same sum with its terms swapped is among the training rows.
    """
    _, eval_pairs = _split_pairs()
    return [_row(a, b) for a, b in eval_pairs]


def reward(*, completions: Sequence[str], answer: Sequence[str], **columns: Any) -> list[float]:
    """Score completions by exact match: 1.0 where the text is the answer and nothing else, else 0.0.

    Args:
        completions: ``[N]`` completion texts, special tokens left out.
        answer: ``[N]`` right answers, the rows' ``answer`` column.
        **columns: What else a reward function is given; not used.
    """
    return [float(text == right) for text, right in zip(completions, answer, strict=True)]


def _row(a: int, b: int) -> dict[str, str]:
    return {"prompt": f"{a}+{b}=", "answer": str(a + b)}


@functools.cache
def _split_pairs() -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]:
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    # Sorting by random() and not shuffle(): only random() promises the same numbers in every Python release.
    generator = random.Random(SPLIT_SEED)
    pairs.sort(key=lambda _: generator.random())
    eval_pairs = pairs[:NUM_EVAL_PAIRS]
    held_out = {frozenset(pair) for pair in eval_pairs}
    train_pairs = [pair for pair in pairs if frozenset(pair) not in held_out]
    return tuple(train_pairs), tuple(eval_pairs)
