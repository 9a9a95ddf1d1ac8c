from __future__ import annotations

import copy
import functools
import pickle
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from rlhf_ray.errors import DataError
from rlhf_ray.rewards import NamedReward
from rlhf_ray.rewards.arguments import (
    CallLog,
    Parameters,
    TrainingProgress,
    column,
    completion_texts,
    own_copies,
)


def test_texts_of_both_forms() -> None:
    assert completion_texts(["a", ""]) == ["a", ""]
    assert completion_texts([[{"role": "assistant", "content": "a"}]]) == ["a"]


def test_the_last_message_of_a_longer_chat_counts() -> None:
    chat = [
        {"role": "assistant", "content": "call"},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "b"},
    ]
    assert completion_texts([chat]) == ["b"]


def test_column() -> None:
    assert column({"answer": ["1", "2"]}, "answer") == ["1", "2"]


def test_a_missing_column_lists_those_there() -> None:
    with pytest.raises(DataError, match=r"'answer', which is not there \(columns: a, b\)"):
        column({"b": [1], "a": [1], "log_metric": print}, "answer")
    with pytest.raises(DataError, match=r"columns: none"):
        column({}, "answer")


def grade(prompts: Any, answer: Any, *, scale: float = 1.0, level: Any) -> list[float]:
    return [1.0]


class Judge:
    def __call__(self, completions: Any, solution: Any, **columns: Any) -> list[float]:
        return [1.0]

    def method(self, completions: Any, solution: Any) -> list[float]:
        return [1.0]


@pytest.mark.parametrize(
    ("function", "required", "bound", "takes_any"),
    [
        (grade, ("answer", "level"), set(), False),
        (functools.partial(grade, answer=["4"]), ("level",), {"answer"}, False),
        (functools.partial(grade, ["p"], ["4"]), ("level",), {"prompts", "answer"}, False),
        (functools.partial(functools.partial(grade, answer=1), level=2), (), {"answer", "level"}, False),
        (Judge(), ("solution",), set(), True),
        (Judge().method, ("solution",), set(), False),
        (dict, (), set(), True),
    ],
)
def test_parameters(function: Any, required: tuple[str, ...], bound: set[str], takes_any: bool) -> None:
    parameters = Parameters.of(function)
    assert parameters.required == required
    assert parameters.bound == bound
    assert parameters.takes_any is takes_any


def test_columns_that_do_not_fit() -> None:
    reward = NamedReward(name="grade", weight=1.0, function=functools.partial(grade, answer=["4"]))
    with pytest.raises(DataError, match=r"'grade' is given 'answer' in rewards\.functions.*rename one"):
        reward.check_bound({"answer", "level"})
    with pytest.raises(DataError, match=r"'grade' needs the column 'level', .*\(columns: kind, other; besides"):
        reward.check_required(["other", "kind"])
    reward.check_bound({"level", "scale"})  # A column in place of a default is what TRL does.
    reward.check_required({"level"})


def test_copies_share_nothing_that_can_be_edited() -> None:
    value = {"a": [1, {"b": (2, [3])}], "c": np.arange(3), "d": {4}}
    first, second = own_copies(value, 2)
    assert str(first) == str(second) == str(value)
    first["a"][1]["b"][1].append(9)
    first["c"][0] = 9
    first["d"].add(9)
    assert str(second) == str(value)
    assert value["a"] == [1, {"b": (2, [3])}]
    assert value["c"].tolist() == [0, 1, 2]


def test_texts_and_numbers_are_not_copied() -> None:
    text = "x" * 1000
    assert all(copied is text for copied in own_copies(text, 3))


def test_the_state_of_training() -> None:
    state = TrainingProgress(steps_per_version=4, max_steps=400, epochs_per_version=0.25).at(3)
    assert (state.global_step, state.max_steps, state.epoch) == (12, 400, 0.75)
    assert not hasattr(state, "log_history")
    with pytest.raises(AttributeError, match="global_step, max_steps and epoch here, and no 'log_history'"):
        _ = state.log_history
    assert pickle.loads(pickle.dumps(state)) == copy.deepcopy(state) == state


def test_what_a_call_logs() -> None:
    log = CallLog(2)
    log.log_metric("hits", np.float32(1.0))
    log.log_metric("hits", True)
    log.log_extra("note", [np.int64(3), None])
    log.log_extra("kinds", ["a", Fraction(1, 2)])
    assert log.metrics == {"hits": [1.0, 1.0]}
    assert log.extras == {"note": (3, None), "kinds": ("a", "1/2")}
    assert type(log.extras["note"][0]) is int
    with pytest.raises(ValueError, match=r"log_extra\('note', ...\) has 1 values for 2 completions"):
        log.log_extra("note", [1])
    with pytest.raises(ValueError, match="take another name"):
        log.log_metric("mean", 1.0)
    with pytest.raises((TypeError, ValueError)):
        log.log_metric("text", "much")  # type: ignore[arg-type]
