r"""Whether two mathematical answers are the same, and the process in which that is decided.

Run as a script, the file answers requests: a line of JSON each way. SymPy may compute forever and math-verify limits
its own time by signals, which Python delivers to a main thread only; this process has one, and can be killed. It
imports nothing of the package, and its output besides the answers is thrown away, hostile text in log lines included.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import re
import signal
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

__all__ = ["MAX_CHARS", "Reading", "answer_text", "grade", "normalized", "read"]

MAX_CHARS = 2000
"""Longest text that is looked at: math-verify's regular expressions need cubic time."""

T = TypeVar("T")

_MARKED = re.compile(r"\$[^$]+\$|\\\(|\\\[")
_BOX = re.compile(r"\\(?:boxed|fbox)\{")
_ANSWER_IS = re.compile(r"answer(?: is|:)\s*+([^\n]*)\Z", re.IGNORECASE)
# What the parser reads as something else: 0.\overline{3} as 0, "2n, n \in \mathbb{Z}" as 2.
_MISREAD = re.compile(r"\\overline|\\in\b|\\mathbb|\\[lc]?dots")
_NO_MEANING = re.compile(r"\\\$|\$|\\[,;!: ]|~|\\(?:left|right|displaystyle)(?![a-zA-Z])|\s")
_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\{([^{}]*)\}")
_MAX_DIGITS = 10_000
_REPEAT_S = 0.1


class Reading(NamedTuple):
    """What an answer says."""

    text: str
    """Normalized; empty: there is no answer."""
    expressions: tuple[Any, ...]
    """SymPy's; empty where math-verify cannot read it."""


class _Late(BaseException):
    """The time is up; no ``Exception``, which SymPy and math-verify would swallow."""


class _TooLarge(Exception):
    """A number in the answer is too large to be computed."""


def answer_text(text: str) -> str | None:
    r"""The LaTeX of the answer that ``text`` marks, or ``None``.

    That is the content of its last box (the contents of boxes with less than 10 characters between them, or less than
    70 with a comma, a semicolon, "and" or "or", are joined by commas), else of the last formula between ``$``, ``\(``
    or ``\[``.
    """
    if _BOX.search(text):
        from latex2sympy2_extended.math_normalization import extract_boxed_content

        return str(extract_boxed_content(text, mode="last"))
    flat = text.replace("\\$", "").rstrip()
    spans = []
    for opening, closing in (("\\(", "\\)"), ("\\[", "\\]"), ("$", "$")):
        end = flat.rfind(closing)
        inner = flat[: max(end, 0)].rstrip("$")
        start = inner.rfind(opening)
        if start >= 0 and end > start:
            spans.append((end, inner[start + len(opening) :]))
    return max(spans)[1] if spans else None


def normalized(text: str) -> str:
    """``text`` without what does not change its meaning: white space, dollar signs, sizes, a final period."""
    text = _TEXT.sub(r"\1", text.replace("{,}", ",").replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac"))
    text = _NO_MEANING.sub("", text).rstrip(".,;")
    return text.casefold() if len(text) > 1 and text.isalpha() else text


@functools.lru_cache(maxsize=256)
def read(text: str, *, is_gold: bool) -> Reading:
    """Read an answer: all of ``text`` where it is a gold answer that marks none, else what math-verify finds.

    Raises:
        _TooLarge: A number in it is.
    """
    from math_verify import parse
    from sympy import nan, zoo

    marked = answer_text(text)
    if marked is None and not is_gold:
        tail = _ANSWER_IS.search(text.rstrip())
        own = tail[1] if tail else text
    else:
        own = text if marked is None else marked
    if _BOX.search(text) or (is_gold and not _MARKED.search(text.replace("\\$", ""))):
        source = "$" + own.replace("\\$", "").replace("$", "").replace("\n", " ").strip().rstrip(".") + "$"
    else:
        source = text
    found = [] if _MISREAD.search(own) else parse(source, fallback_mode="no_fallback", parsing_timeout=None)
    _check_size(found)
    return Reading(normalized(own), tuple(item for item in found if item not in (nan, zoo)))


def grade(gold: str, text: str, limit_s: float) -> str:
    """``equal``, ``different``, ``late`` where ``text`` takes too long, or ``gold`` where the gold answer is at fault.

    Args:
        gold: A gold answer.
        text: The end of a completion.
        limit_s: CPU time of this process, in seconds.
    """
    try:
        right = _within(limit_s, lambda: read(gold, is_gold=True))
    except (_Late, Exception):  # SymPy and the parser raise anything.
        return "gold"
    if not right.text and not right.expressions:
        return "gold"
    try:
        return "equal" if _within(limit_s, lambda: _equal(right, text)) else "different"
    except Exception:  # What cannot be read equals nothing.
        return "different"
    except _Late:
        pass
    try:  # A gold answer that cannot be compared with 0 cannot be compared with anything.
        _within(limit_s, lambda: _equal(right, "$0$"))
    except (_Late, Exception):
        return "gold"
    return "late"


def _equal(right: Reading, text: str) -> bool:
    from math_verify import verify

    answer = read(text, is_gold=False)
    if answer.text and answer.text == right.text:
        return True
    return bool(verify(list(right.expressions), list(answer.expressions), timeout_seconds=None))


def _check_size(expressions: list[Any]) -> None:
    from sympy import Pow, factorial

    # The parser computes nothing: 2^{10^9} is still a tree here. Inner powers first, whose values are exponents.
    numbers = [node for item in expressions for node in item.atoms(Pow, factorial) if not node.free_symbols]
    for node in sorted(numbers, key=lambda node: len(str(node))):
        base, exponent = node.args if isinstance(node, Pow) else (10, node.args[0])
        try:
            size = abs(float(exponent)) * abs(math.log10(abs(float(base))))
        except (TypeError, ValueError):  # complex, infinite, 0
            continue
        except OverflowError:
            size = math.inf
        if size > _MAX_DIGITS:
            raise _TooLarge


def _within(limit_s: float, function: Callable[[], T]) -> T:
    running = True

    def stop(*_: object) -> None:
        if running:
            raise _Late

    before = signal.signal(signal.SIGVTALRM, stop)
    # CPU time, which a busy machine does not shorten; again and again, for code that swallows every exception.
    signal.setitimer(signal.ITIMER_VIRTUAL, limit_s, _REPEAT_S)
    try:
        return function()
    finally:
        running = False
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    logging.disable(logging.CRITICAL)

    def answer(value: str) -> None:
        print(json.dumps(value), file=answers, flush=True)

    try:
        grade("x^2+2x+1", "\\boxed{(x+1)^2}", 60.0)  # Imports what takes seconds.
    except Exception as error:
        return answer(f"{type(error).__name__}: {error}")
    answer("ready")
    for line in sys.stdin:
        gold, text, limit_s = json.loads(line)
        answer(grade(gold, text, limit_s))


if __name__ == "__main__":
    _serve()
