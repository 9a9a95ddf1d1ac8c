from __future__ import annotations

import asyncio
import functools
import logging
import signal
import subprocess
import sys
import time

import psutil
import pytest
from ray import cloudpickle

from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.rewards import math_equivalence
from rlhf_ray.rewards.builtin.math_equivalence import _grader

pytest.importorskip("math_verify")


def test_answers_are_compared_as_the_docs_say(math_row: tuple[str, ...]) -> None:
    gold, completion, score = math_row
    assert math_equivalence()(completions=[completion], answer=[gold]) == [float(score)]


@pytest.mark.parametrize(
    ("gold", "completion", "score"),
    [
        ("12:00", "Noon, so the answer is 12:00.\n", 1.0),
        (72, "\\boxed{72}", 1.0),
        ("72", "no idea", 0.0),
        ("72", "", 0.0),
        (12.0, "\\boxed{12}", 1.0),
        (1e20, "\\boxed{10^{20}}", 1.0),
        (["\\frac{1}{2}", "7"], "\\boxed{7.0}", 1.0),
        (["\\frac{1}{2}", "7"], "\\boxed{8}", 0.0),
        ("7", "\\boxed{7}" + " and so on" * 10_000, 1.0),
        ("7", "so $" + "x" * 5000 + "\nThe answer is $7$.", 1.0),
        ("so we find $x = 2$ and \\boxed{7}." + " words" * 1000, "\\boxed{7}", 1.0),
    ],
)
def test_decides_equivalence(gold: object, completion: str, score: float) -> None:
    reward = math_equivalence()
    assert reward(completions=[completion], answer=[gold]) == [score]
    assert reward(completions=[[{"role": "assistant", "content": completion}]], answer=[gold]) == [score]


def test_works_in_a_thread() -> None:
    answer = asyncio.run(asyncio.to_thread(math_equivalence(), completions=["\\boxed{1/2}"], answer=["0.5"]))
    assert answer == [1.0]


HUGE = ["$10^{10^{10}}$", "\\boxed{2^{10^9}}", "\\boxed{((2^{9999})^{9999})^{99}}", "\\boxed{100000!}"]


@pytest.mark.parametrize("in_thread", [False, True])
def test_numbers_that_are_too_large_cost_nothing_and_score_0(in_thread: bool) -> None:
    reward = math_equivalence()
    reward(completions=["5"], answer=["5"])
    completions = [*HUGE * 4, "\\boxed{5}"]
    start = time.perf_counter()
    call = functools.partial(reward, completions=completions, answer=["5"] * len(completions))
    scores = asyncio.run(asyncio.to_thread(call)) if in_thread else call()
    assert scores == [0.0] * 16 + [1.0]
    assert time.perf_counter() - start < 5


def test_what_sympy_never_finishes_leaves_the_others_their_time(caplog: pytest.LogCaptureFixture) -> None:
    reward = math_equivalence(timeout_s=0.2)
    completions = [f"\\boxed{{(x+y+z)^{{{n}}} + {'1' * 500}}}" for n in range(200, 215)]
    start = time.perf_counter()
    with caplog.at_level(logging.WARNING):
        answer = asyncio.run(asyncio.to_thread(reward, completions=[*completions, "\\boxed{5}"], answer=["5"] * 16))
    assert answer == [0.0] * 15 + [1.0]
    assert time.perf_counter() - start < 20
    assert len(caplog.records) <= 2, "counted, not repeated"
    assert all(len(record.getMessage()) < 200 for record in caplog.records)
    assert "1" * 100 not in caplog.text


@pytest.mark.parametrize(
    "gold", ["$", "\\boxed{}", "2^{10^9}", "\\boxed{9^{9^9}}", "100000!", "(x+y+z)^{200} + y^{\\binom{10^9}{10^8}}"]
)
def test_a_gold_answer_that_cannot_be_computed_is_an_error_and_never_0(gold: str) -> None:
    with pytest.raises(DataError, match=r"the row's 'answer' says nothing or takes more than 0\.2 s"):
        math_equivalence(timeout_s=0.2)(completions=["\\boxed{5}"], answer=[gold])


@pytest.mark.parametrize("gold", ["", None, [], True, {"ground_truth": "5"}, "\\boxed{7", "x" * 3000])
def test_a_gold_answer_of_another_form_is_refused(gold: object) -> None:
    with pytest.raises(DataError, match="the row's 'answer' "):
        math_equivalence()(completions=["5"], answer=[gold])
    with pytest.raises(DataError, match="the row's 'answer' "):
        math_equivalence().check_row({"answer": gold})


@pytest.mark.parametrize("stuck", [False, True])
def test_a_process_that_ends_or_hangs_is_replaced(stuck: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = math_equivalence()
    assert reward(completions=["5"], answer=["5"]) == [1.0]
    process = _grader()._process
    assert process is not None
    if stuck:
        process.send_signal(signal.SIGSTOP)
        waits = iter([0.1])  # Of the process that is stopped; the next ones have their time.
        answer = _grader()._answer
        monkeypatch.setattr(_grader(), "_answer", lambda process, limit_s: answer(process, next(waits, limit_s)))
    else:
        process.kill()
        process.wait()
    assert reward(completions=["\\boxed{5}", "\\boxed{5}"], answer=["5", "5"]) == [float(not stuck), 1.0]
    assert _grader()._process is not process


def test_an_interrupted_call_leaves_no_answer_for_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    reward = math_equivalence()
    assert reward(completions=["5"], answer=["5"]) == [1.0]

    def interrupted(process: object, limit_s: float) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_grader(), "_answer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            reward(completions=["5"], answer=["5"])
    assert reward(completions=["6", "5", "6"], answer=["5"] * 3) == [0.0, 1.0, 0.0]


def test_the_process_ends_with_the_one_that_started_it() -> None:
    script = (
        "import os, signal\n"
        "from rlhf_ray.rewards.builtin.math_equivalence import _grader\n"
        "_grader().start()\n"
        "print(_grader()._process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    deadline = time.monotonic() + 20
    while runs(int(killed.stdout)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_travels_and_loads_sympy_where_it_arrives() -> None:
    copy = cloudpickle.loads(cloudpickle.dumps(math_equivalence(answer_column="gold")))
    assert copy.__name__ == "math_equivalence"
    assert copy(completions=["\\boxed{1/2}"], gold=["0.5"]) == [1.0]


def test_refuses_a_limit_of_nothing() -> None:
    with pytest.raises(ConfigError, match="timeout_s"):
        math_equivalence(timeout_s=0)
