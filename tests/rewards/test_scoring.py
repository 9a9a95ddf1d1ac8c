from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from rlhf_ray.errors import DataError
from rlhf_ray.rewards import RewardScorer
from rlhf_ray.rewards.functions import resolve_rewards
from rlhf_ray.rewards.scoring import ScoringError
from rlhf_ray.settings import RewardSettings
from rlhf_ray.types import RolloutGroup, ScoredGroup

GroupOf = Callable[..., RolloutGroup]


@pytest.fixture
def score(tokenizer: Any, group_of: GroupOf) -> Callable[..., ScoredGroup]:
    def run(
        *functions: Any, group: RolloutGroup | None = None, weights: list[float] | None = None, threaded: bool = True
    ) -> ScoredGroup:
        rewards = resolve_rewards(RewardSettings(functions=list(functions), weights=weights))
        scorer = RewardScorer(rewards, tokenizer, threaded=threaded)
        return asyncio.run(scorer.score(group or group_of()))

    return run


@pytest.fixture
def failure(score: Callable[..., ScoredGroup]) -> Callable[..., ScoringError]:
    def run(*functions: Any, **how: Any) -> ScoringError:
        with pytest.raises(ScoringError) as caught:
            score(*functions, **how)
        return caught.value

    return run


def lengths(*, completions: list[str], **columns: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def answering(answer: Any) -> Callable[..., Any]:
    def fixed(**columns: Any) -> Any:
        return answer

    return fixed


def test_a_scored_group(score: Callable[..., ScoredGroup], group_of: GroupOf) -> None:
    group = group_of(["one", "three"])
    scored = score(lengths, group=group)
    assert scored.group is group
    assert scored.texts == ("one", "three")
    assert scored.rewards.dtype == np.float32
    assert scored.rewards.tolist() == [3.0, 5.0]
    assert scored.rewards_by_function["lengths"].tolist() == [3.0, 5.0]
    assert 0 <= scored.reward_s < 1


def test_a_function_receives_trls_arguments_for_text(score: Callable[..., ScoredGroup], group_of: GroupOf) -> None:
    seen: dict[str, Any] = {}

    def spy(**arguments: Any) -> list[float]:
        seen.update(arguments)
        return [0.0, 0.0]

    score(spy, group=group_of(["a", "bc"], prompt="Q?", answer="4", level=[1, 2]))
    assert seen == {
        "prompts": ["Q?", "Q?"],
        "completions": ["a", "bc"],
        "completion_ids": [[97, 0], [98, 99, 0]],
        "answer": ["4", "4"],
        "level": [[1, 2], [1, 2]],
    }


def test_a_function_receives_trls_arguments_for_chat(score: Callable[..., ScoredGroup], group_of: GroupOf) -> None:
    seen: dict[str, Any] = {}

    def spy(*, prompts: Any, completions: Any, **columns: Any) -> list[float]:
        seen.update(prompts=prompts, completions=completions)
        return [0.0, 0.0]

    chat = [{"role": "user", "content": "Q?"}]
    scored = score(spy, group=group_of(["a", "b"], prompt=chat))
    assert seen["prompts"] == [chat, chat]
    assert seen["completions"] == [[{"role": "assistant", "content": text}] for text in ("a", "b")]
    assert scored.texts == ("a", "b")


def test_a_column_cannot_take_an_arguments_name(score: Callable[..., ScoredGroup], group_of: GroupOf) -> None:
    with pytest.raises(DataError, match=r"'completions'.*rename the column"):
        score(lengths, group=group_of(completions="x"))


def test_weights_and_none(score: Callable[..., ScoredGroup]) -> None:
    def partly(**columns: Any) -> list[float | None]:
        return [None, 10]

    scored = score(lengths, partly, weights=[0.5, 2.0])
    assert scored.rewards.tolist() == [0.5 * 3, 0.5 * 5 + 2 * 10]
    assert np.isnan(scored.rewards_by_function["partly"][0])
    assert scored.rewards_by_function["partly"][1] == 10
    assert scored.rewards_by_function["lengths"].tolist() == [3.0, 5.0]


def test_several_functions_see_lists_of_their_own(score: Callable[..., ScoredGroup]) -> None:
    def destroys(*, completions: list[str], **columns: Any) -> list[float]:
        completions.clear()
        return [0.0, 0.0]

    assert score(destroys, lengths).rewards.tolist() == [3.0, 5.0]


def test_async_functions_run_together_and_answers_stay_in_order(score: Callable[..., ScoredGroup]) -> None:
    meeting: list[asyncio.Event] = []

    async def first(**columns: Any) -> list[float]:
        meeting.append(asyncio.Event())
        await asyncio.wait_for(meeting[0].wait(), 5)
        return [1.0, 1.0]

    async def second(**columns: Any) -> list[float]:
        meeting[0].set()
        return [10.0, 10.0]

    scored = score(first, lengths, second)
    assert list(scored.rewards_by_function) == ["first", "lengths", "second"]
    assert scored.rewards.tolist() == [14.0, 16.0]


def test_a_plain_function_may_return_a_coroutine(score: Callable[..., ScoredGroup]) -> None:
    async def later() -> list[float]:
        return [1.0, 2.0]

    assert score(lambda **columns: later()).rewards.tolist() == [1.0, 2.0]


def test_threaded_leaves_the_loop_free_and_otherwise_the_thread_is_the_callers(
    score: Callable[..., ScoredGroup],
) -> None:
    def where(**columns: Any) -> list[float]:
        return [float(threading.current_thread() is threading.main_thread())] * 2

    assert score(where).rewards.tolist() == [0.0, 0.0]
    assert score(where, threaded=False).rewards.tolist() == [1.0, 1.0]


def test_the_loop_goes_on_while_a_plain_function_sleeps(tokenizer: Any, group_of: GroupOf) -> None:
    def slow(**columns: Any) -> list[float]:
        time.sleep(0.3)
        return [1.0, 1.0]

    async def run() -> int:
        scorer = RewardScorer(resolve_rewards(RewardSettings(functions=[slow])), tokenizer)
        scoring = asyncio.create_task(scorer.score(group_of()))
        turns = 0
        while not scoring.done():
            turns += 1
            await asyncio.sleep(0.01)
        await scoring
        return turns

    assert asyncio.run(run()) > 5


@pytest.mark.parametrize(
    ("answer", "rewards"),
    [
        ([1, 2.5], [1.0, 2.5]),
        ((1, True), [1.0, 1.0]),
        ([np.float32(0.5), np.int64(3)], [0.5, 3.0]),
        ([Fraction(1, 2), np.array(2.0)], [0.5, 2.0]),
        (np.array([0.5, 1.5]), [0.5, 1.5]),
    ],
)
def test_numbers_of_many_types(score: Callable[..., ScoredGroup], answer: Any, rewards: list[float]) -> None:
    assert score(answering(answer)).rewards.tolist() == rewards


def test_torch_tensors(score: Callable[..., ScoredGroup]) -> None:
    torch = pytest.importorskip("torch")
    assert score(answering([torch.tensor(0.5), torch.tensor(2)])).rewards.tolist() == [0.5, 2.0]
    assert score(answering(torch.tensor([0.5, 2.0]))).rewards.tolist() == [0.5, 2.0]


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        ([1.0], "wrong_length", "fixed returned 1 rewards for 2 completions"),
        ([1.0, 2.0, 3.0], "wrong_length", "3 rewards for 2"),
        (1.0, "wrong_type", "returned float, not a list"),
        (None, "wrong_type", "returned NoneType"),
        ("12", "wrong_type", "returned str"),
        ({0: 1.0, 1: 1.0}, "wrong_type", "returned dict"),
        (np.array(1.0), "wrong_type", "returned float"),
        ([1.0, "1.0"], "wrong_type", "'1.0' (str), not a number or None"),
        ([1.0, [1.0]], "wrong_type", "(list)"),
        ([1.0, 1 + 0j], "wrong_type", "(complex)"),
        ([1.0, np.array([1.0, 2.0])], "wrong_type", "(ndarray)"),
        ([1.0, 10**400], "wrong_type", "(int)"),
        ([1.0, float("nan")], "not_finite", "nan for completion 1"),
        ([float("-inf"), 1.0], "not_finite", "-inf for completion 0"),
        ([1e300, 1.0], "not_finite", "1e+300 for completion 0"),
        ([1.0, None], "all_none", "None for completion 1"),
        ([None, None], "all_none", "None for completion 0"),
    ],
)
def test_unusable_answers(failure: Callable[..., ScoringError], answer: Any, kind: str, message: str) -> None:
    error = failure(answering(answer))
    assert error.kind == kind
    assert message in error.message


def test_none_of_all_functions(failure: Callable[..., ScoringError]) -> None:
    assert failure(answering([None, 1.0]), answering([None, 1.0])).kind == "all_none"


def test_a_sum_beyond_float32(failure: Callable[..., ScoringError]) -> None:
    assert failure(answering([3e38, 1.0]), weights=[10.0]).kind == "not_finite"


def test_what_is_raised_names_the_users_line(failure: Callable[..., ScoringError]) -> None:
    def inner(text: str) -> float:
        return float(text)

    def grade(*, completions: list[str], **columns: Any) -> list[float]:
        return [inner(text) for text in completions]

    error = failure(grade)
    line = inner.__code__.co_firstlineno + 1
    assert error.kind == "raised"
    assert error.message == (
        f"grade raised ValueError: could not convert string to float: 'one' ({__file__}:{line} in inner)"
    )


def test_the_line_is_the_users_even_when_a_library_raised(failure: Callable[..., ScoringError]) -> None:
    import json

    def grade(*, completions: list[str], **columns: Any) -> list[float]:
        return [json.loads(text) for text in completions]

    assert f"({__file__}:{grade.__code__.co_firstlineno + 1} in " in failure(grade).message


@pytest.mark.parametrize("threaded", [True, False])
@pytest.mark.parametrize("error", [StopIteration(), SystemExit(2), ValueError("two\nlines"), BaseException("odd")])
def test_every_kind_of_exception_is_a_failure(
    failure: Callable[..., ScoringError], error: BaseException, threaded: bool
) -> None:
    def grade(**columns: Any) -> list[float]:
        raise error

    found = failure(grade, threaded=threaded)
    assert found.kind == "raised"
    assert f"grade raised {type(error).__name__}" in found.message
    assert "\n" not in found.message


def test_an_async_function_that_raises(failure: Callable[..., ScoringError]) -> None:
    async def grade(**columns: Any) -> list[float]:
        raise ValueError("no answer from the judge")

    async def slow(**columns: Any) -> list[float]:
        await asyncio.sleep(60)
        return [1.0, 1.0]

    start = time.perf_counter()
    error = failure(slow, grade)
    assert time.perf_counter() - start < 5
    assert error.kind == "raised"
    assert "grade raised ValueError: no answer from the judge" in error.message


def test_a_column_that_the_function_does_not_take(failure: Callable[..., ScoringError], group_of: GroupOf) -> None:
    def narrow(prompts: Any, completions: Any, completion_ids: Any) -> list[float]:
        return [1.0, 1.0]

    error = failure(narrow, group=group_of(answer="4"))
    assert error.kind == "raised"
    assert "unexpected keyword argument 'answer'" in error.message


def test_where_a_model_adds_to_the_sum_no_function_need_apply(tokenizer: Any, group_of: GroupOf) -> None:
    rewards = resolve_rewards(RewardSettings(functions=[answering([None, 2.0])], weights=[3.0]))
    scorer = RewardScorer(rewards, tokenizer, part_of_sum=True)
    assert asyncio.run(scorer.score(group_of())).rewards.tolist() == [0.0, 6.0]
