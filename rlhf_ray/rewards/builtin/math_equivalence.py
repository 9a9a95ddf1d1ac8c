"""Built-in reward: the completion's mathematical answer equals the row's, decided by the math-verify library."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import os
import re
import select
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any

from rlhf_ray.config.settings import RewardFunction
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.rewards.arguments import Completions, column, completion_texts
from rlhf_ray.rewards.builtin import math_grader
from rlhf_ray.rewards.builtin.gold import gold_answers, number_text
from rlhf_ray.rewards.registry import built_in
from rlhf_ray.untrusted_text import shortened

__all__ = ["math_equivalence"]

logger = logging.getLogger(__name__)

_START_S = 120.0
_LEAST = 0.05
_BOX = re.compile(r"\\(?:boxed|fbox)\{")
_BRACE = re.compile(rf"{_BOX.pattern}|[{{}}]")


@built_in
def math_equivalence(*, answer_column: str = "answer", timeout_s: float = 1.0) -> RewardFunction:
    r"""1 where the completion's answer is mathematically the row's, else 0.

    The answer is the content of the last ``\boxed{...}``, or what math-verify finds in a completion without one (LaTeX
    between ``$``, "the answer is ...", a plain expression), in the last 2,000 characters. SymPy compares: ``1/2``,
    ``0.5`` and ``\frac{2}{4}`` are the same. What math-verify cannot read, ``12:00`` for example, is compared as text,
    white space and dollar signs left out. docs/rewards.md says more, about several boxes too.

    Args:
        answer_column: Dataset column with the answer: LaTeX with or without ``$``, a number, or a list of those, any
            of which counts.
        timeout_s: CPU seconds that one completion may take. SymPy never finishes some of what a policy writes; that
            scores 0, and halves the limit for the completions of the call that follow, down to a twentieth. The limit
            holds in every thread: SymPy runs in a process of its own.

    Raises:
        ConfigError: ``timeout_s`` is not above 0.
        DataError: When called, for a row whose answer is of no such form, or cannot be computed in ``timeout_s``.
    """
    if not (timeout_s > 0 and math.isfinite(timeout_s)):
        raise ConfigError("math_equivalence.timeout_s", timeout_s, "must be finite and above 0")
    return _MathEquivalence(answer_column, timeout_s)


class _MathEquivalence:
    def __init__(self, answer_column: str, timeout_s: float) -> None:
        self._column = answer_column
        self._timeout_s = timeout_s

    def __deepcopy__(self, memo: object) -> _MathEquivalence:
        return self  # Nothing changes in it, and a copy within a process arrives nowhere.

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state
        # In the reward worker, where the seconds that SymPy takes to load must not fall into a group's time limit.
        _grader().start()

    def __call__(self, *, completions: Completions, **columns: Any) -> list[float]:
        late = 0
        scores = []
        for text, value in zip(completion_texts(completions), column(columns, self._column), strict=True):
            answer, score = _answer_part(text), 0.0
            for gold in self._golds(value):
                verdict = self._verdict(gold, answer, self._timeout_s * max(0.5**late, _LEAST)) if answer else ""
                late += verdict == "late"
                if verdict == "equal":
                    score = 1.0
                    break
            scores.append(score)
        return scores

    def check_row(self, row: Mapping[str, Any]) -> None:
        self._golds(column(row, self._column))

    def _golds(self, value: object) -> list[str]:
        golds = [gold if isinstance(gold, str) else number_text(gold) for gold in gold_answers(value, self._column)]
        for gold in golds:
            if len(gold) > math_grader.MAX_CHARS and not _BOX.search(gold):
                raise self._unusable(gold, f"is longer than {math_grader.MAX_CHARS} characters and has no box")
            if _answer_part(gold) is None:
                raise self._unusable(gold, "has no box that is closed and not too long")
        return [_answer_part(gold) or gold for gold in golds]

    def _verdict(self, gold: str, answer: str, limit_s: float) -> str:
        verdict = _grader().grade(gold, answer, limit_s)
        if verdict == "gold":
            raise self._unusable(gold, f"says nothing or takes more than {limit_s:g} s to be computed (timeout_s)")
        if verdict == "late":
            _count_late(limit_s)
        return verdict

    def _unusable(self, gold: str, reason: str) -> DataError:
        return DataError(f"the row's {self._column!r} {reason}: {shortened(gold, 80)!r}")


def _answer_part(text: str) -> str | None:
    """The end of ``text``, or of what comes up to its last closed box; ``None``: it has boxes, but none is closed."""
    end = len(text)
    if _BOX.search(text):
        box = _last_box(text)
        if box is None:
            return None
        end = box[1]
        if end - box[0] > math_grader.MAX_CHARS:
            return None
    begin = max(0, end - math_grader.MAX_CHARS)
    # From the start of a line, where there is one: half a formula would pair its dollar sign with the next one's.
    line = text.find("\n", begin, begin + math_grader.MAX_CHARS // 2) if begin > 0 else -1
    return text[max(begin, line) : end]


def _last_box(text: str) -> tuple[int, int] | None:
    """Where the last box that is closed begins and ends."""
    opened: list[tuple[int, bool]] = []
    last = None
    for brace in _BRACE.finditer(text):
        if brace[0] != "}":
            opened.append((brace.start(), brace[0] != "{"))
        elif opened:
            begin, is_box = opened.pop()
            if is_box:
                last = begin, brace.end()
    return last


class _Grader:
    """The process of :mod:`math_grader`, started when it is first needed and again where it had to be killed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start the process and wait until it has loaded what it needs.

        Raises:
            RuntimeError: It does not start.
        """
        with self._lock:
            self._started()

    def grade(self, gold: str, text: str, limit_s: float) -> str:
        """As :func:`math_grader.grade`, also where a signal does not end the computation or that ends the process."""
        with self._lock:
            # A process that is gone at once may have been killed from outside.
            answer = self._ask(gold, text, limit_s) or self._ask(gold, text, limit_s)
            if answer not in (None, "stuck"):
                return answer
            return "late" if self._ask(gold, "$0$", limit_s) in ("different", "equal") else "gold"

    def _ask(self, gold: str, text: str, limit_s: float) -> str | None:
        """The answer of the process, ``stuck`` where it had to be killed, ``None`` where it ended."""
        process = self._started()
        answer = None
        try:
            with contextlib.suppress(BrokenPipeError):
                print(json.dumps([gold, text, limit_s]), file=process.stdin, flush=True)
            # Of CPU time it takes three times the limit at most; the machine may have other things to do.
            answer = self._answer(process, 5.0 + 5.0 * limit_s)
        finally:
            # Also where the caller was interrupted: the next request must not get this one's answer.
            if answer in (None, "stuck"):
                self._end()
        return answer

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self._end()
            command = [sys.executable, "-P", math_grader.__file__]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            answer = self._answer(self._process, _START_S)
            if answer != "ready":
                self._end()
                raise RuntimeError(
                    f"the process that runs math-verify does not start: {shortened(answer or 'it ends')}"
                )
        return self._process

    @staticmethod
    def _answer(process: subprocess.Popen[str], limit_s: float) -> str | None:
        assert process.stdout is not None
        if not select.select([process.stdout], [], [], limit_s)[0]:
            return "stuck"
        line = process.stdout.readline()  # one short line, which is written at once
        return str(json.loads(line)) if line else None

    def _end(self) -> None:
        if self._process is not None:
            process, self._process = self._process, None
            process.kill()
            process.communicate()


@functools.cache
def _grader_of(pid: int) -> _Grader:
    return _Grader()


def _grader() -> _Grader:
    """This process's; one that it was forked from has its own."""
    return _grader_of(os.getpid())


_late = 0


def _count_late(limit_s: float) -> None:
    global _late
    _late += 1
    if _late in (1, 10, 100) or _late % 1000 == 0:
        message = "math_equivalence scored %d answers 0 so far that took too long (the last: %g s)"
        logger.warning(message, _late, limit_s)
