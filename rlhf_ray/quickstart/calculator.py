"""Environment and data of the embedded multi-turn quickstart: a sum of three numbers, and a calculator that adds two.

With ``|`` for the end of a turn, an episode of the row ``{"prompt": "37+58+21=", "answer": "116"}``::

    prompt        37+58+21=
    policy                 37+58|         a call
    calculator                   95;
    policy                          95+21|
    calculator                            116;
    policy                                    116|      the answer: reward 1

The policy need not add, but it must copy the right numbers to the right places, and each call depends on what the
calculator answered to the last one.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Mapping
from typing import Any, Final

from rlhf_ray.environments.environment import Action, Environment, Step

__all__ = ["Calculator", "eval_rows", "train_rows"]

NUM_TRAIN_ROWS: Final = 16_384
NUM_EVAL_ROWS: Final = 512
SPLIT_SEED: Final = 0

# [0-9], not \d or str.isdigit(): those also accept digits of other scripts, and of some int() raises. Three digits are
# enough for every number of the task.
_CALL: Final = re.compile(r"([0-9]{1,3})\+([0-9]{1,3})")
_ANSWER: Final = re.compile(r"[0-9]{1,3}")


class Calculator(Environment):
    """Adds two numbers where the policy writes ``37+58``, and takes a single number for the answer.

    The reward is 1 for the right answer and 0 for everything else; calls earn nothing. A turn that is neither a call
    nor a number, or that was cut by a length limit, ends the episode. Numbers have one to three digits, ``0`` to ``9``,
    and a right answer has no leading zeros.

    Each step reports ``calls``, 1 for a call; each last one reports ``valid``, whether it was a number.
    """

    def reset(self, row: Mapping[str, Any], seed: int) -> None:
        """Begin an episode with the row's own prompt; nothing is drawn from ``seed``.

        Args:
            row: Its ``answer`` is what the policy must write, a string.
            seed: Not used.
        """
        self._answer = row["answer"]

    def step(self, action: Action) -> Step:
        """Answer a call with the sum and ``;``, anything else with the end of the episode."""
        call = None if action.truncated else _CALL.fullmatch(action.text)
        if call is not None:
            first, second = call.groups()
            return Step(observation=f"{int(first) + int(second)};", metrics={"calls": 1.0})
        valid = not action.truncated and _ANSWER.fullmatch(action.text) is not None
        right = valid and action.text == self._answer
        return Step(reward=float(right), done=True, metrics={"calls": 0.0, "valid": float(valid)})


def train_rows() -> list[dict[str, str]]:
    """Return the 16,384 training rows, ``{"prompt": "37+58+21=", "answer": "116"}``, in a fixed random order."""
    return [_row(terms) for terms in _terms()[NUM_EVAL_ROWS:]]


def eval_rows() -> list[dict[str, str]]:
    """Return the 512 held-out rows, in the form of :func:`train_rows`.

    No three numbers, in whatever order, are the terms of two rows, in training or held out.
    """
    return [_row(terms) for terms in _terms()[:NUM_EVAL_ROWS]]


def _row(terms: tuple[int, ...]) -> dict[str, str]:
    return {"prompt": "+".join(map(str, terms)) + "=", "answer": str(sum(terms))}


@functools.cache
def _terms() -> tuple[tuple[int, ...], ...]:
    # Only random() promises the same numbers in every Python release.
    generator = random.Random(SPLIT_SEED)
    found: dict[tuple[int, ...], tuple[int, ...]] = {}
    while len(found) < NUM_EVAL_ROWS + NUM_TRAIN_ROWS:
        terms = tuple(10 + int(90 * generator.random()) for _ in range(3))
        found.setdefault(tuple(sorted(terms)), terms)
    return tuple(found.values())
