from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from rlhf_ray.config.settings import RewardSettings
from rlhf_ray.errors import DataError
from rlhf_ray.rewards import NamedReward, RewardScorer
from rlhf_ray.rewards.arguments import TrainingProgress, completion_texts
from rlhf_ray.rewards.functions import resolve_rewards
from rlhf_ray.rewards.scoring import Scores, ScoringError, logged_means, scored_group
from rlhf_ray.types import RolloutGroup, ScoredGroup

GroupOf = Callable[..., RolloutGroup]


@pytest.fixture
def score(tokenizer: Any, group_of: GroupOf) -> Callable[..., ScoredGroup]:
    def run(*functions: Any, group: RolloutGroup | None = None, weights: list[float] | None = None) -> ScoredGroup:
        rewards = resolve_rewards(RewardSettings(functions=list(functions), weights=weights))
        return asyncio.run(RewardScorer(rewards, tokenizer).score(group or group_of()))

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
    state = seen.pop("trainer_state")
    assert (state.global_step, state.max_steps, state.epoch) == (0, 0, 0.0)
    assert callable(seen.pop("log_extra"))
    assert callable(seen.pop("log_metric"))
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


def test_a_plain_function_is_called_in_the_callers_thread(score: Callable[..., ScoredGroup]) -> None:
    def where(**columns: Any) -> list[float]:
        return [float(threading.current_thread() is threading.main_thread())] * 2

    assert score(where).rewards.tolist() == [1.0, 1.0]


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


@pytest.mark.parametrize("error", [StopIteration(), SystemExit(2), ValueError("two\nlines"), BaseException("odd")])
def test_every_kind_of_exception_is_a_failure(failure: Callable[..., ScoringError], error: BaseException) -> None:
    def grade(**columns: Any) -> list[float]:
        raise error

    found = failure(grade)
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


def test_a_function_is_given_what_it_takes(score: Callable[..., ScoredGroup], group_of: GroupOf) -> None:
    def narrow(completions: Any, level: Any = None) -> list[float]:
        return [level[0], len(completions)]

    assert score(narrow, group=group_of(answer="4", level=7)).rewards.tolist() == [7.0, 2.0]


def test_a_column_does_not_replace_an_argument(score: Callable[..., ScoredGroup], group_of: GroupOf) -> None:
    def scaled(*, completions: Any, scale: Any, **columns: Any) -> list[float]:
        return [scale, scale]

    bound = functools.partial(scaled, scale=20)
    assert score(bound).rewards.tolist() == [20.0, 20.0]
    with pytest.raises(DataError, match=r"'scaled' is given 'scale' in rewards\.functions"):
        score(bound, group=group_of(scale=3))


def test_a_row_without_the_column_fails_its_group(failure: Callable[..., ScoringError], group_of: GroupOf) -> None:
    def grade(*, answer: Any, **columns: Any) -> list[float]:
        return [1.0, 1.0]

    error = failure(grade, group=group_of(gold="4"))
    assert error.kind == "raised"
    assert "'grade' needs the column 'answer', which is not there (columns: gold;" in error.message


# --- nothing that one function edits is seen elsewhere ---------------------------------------------------------


def spoil(value: Any) -> None:
    """Empty every list and dictionary in a value, the innermost first."""
    if isinstance(value, (list, dict)):
        for item in list(value.values() if isinstance(value, dict) else value):
            spoil(item)
        value.clear()


@pytest.mark.parametrize("is_async", [False, True])
def test_what_one_function_edits_is_not_seen_by_the_next(tokenizer: Any, group_of: GroupOf, is_async: bool) -> None:
    chat = [{"role": "user", "content": "Q?"}]
    seen: list[str] = []

    def look(**arguments: Any) -> list[float]:
        data = {name: value for name, value in arguments.items() if isinstance(value, list)}
        seen.append(repr(data))
        spoil(data)
        return [1.0, 1.0]

    async def look_later(**arguments: Any) -> list[float]:
        return look(**arguments)

    group = group_of(["a", "b"], prompt=chat, gold={"values": [4, [5]]}, tests=[["x"], {"y": [1]}])
    before = repr(group)
    function = look_later if is_async else look
    scorer = RewardScorer(resolve_rewards(RewardSettings(functions=[function, function])), tokenizer)
    for _ in range(2):  # As where a group is scored again.
        scored = asyncio.run(scorer.score(group))
    assert len(seen) == 4
    assert set(seen) == {seen[0]}
    assert "'content': 'Q?'" in seen[0]
    assert "[5]" in seen[0]
    assert repr(group) == before
    assert scored.texts == ("a", "b")


def test_the_completions_of_a_group_do_not_share_an_entry(score: Callable[..., ScoredGroup], group_of: GroupOf) -> None:
    def extends(*, prompts: Any, completions: Any, gold: Any, **columns: Any) -> list[float]:
        for prompt, completion, values in zip(prompts, completions, gold, strict=True):
            prompt += completion
            values.append(1)
        return [float(len(prompts[1])), float(len(gold[1]))]

    group = group_of(["a", "b"], prompt=[{"role": "user", "content": "Q?"}], gold=[])
    assert score(extends, group=group).rewards.tolist() == [2.0, 1.0]


# --- reward functions as they are written for TRL ---------------------------------------------------------------

# The signatures of TRL 1.16's documentation and of its own rewards (trl.rewards).


def ground_truth_reward(completions: Any, ground_truth: Any, **kwargs: Any) -> list[float]:
    contents = [completion[0]["content"] for completion in completions]
    return [1.0 if content == gold else 0.0 for content, gold in zip(contents, ground_truth, strict=True)]


def accuracy_reward(
    completions: list[list[dict[str, str]]],
    ground_truth: list[str],
    log_extra: Callable[[str, list[Any]], None] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    if log_extra is not None:
        log_extra("gold_parsed", list(ground_truth))
    return [float(completion[0]["content"] == gold) for completion, gold in zip(completions, ground_truth, strict=True)]


def logging_reward(
    prompts: Any,
    completions: Any,
    completion_ids: Any,
    ground_truth: Any,
    log_extra: Any = None,
    log_metric: Any = None,
    **kwargs: Any,
) -> list[float]:
    correct = ground_truth_reward(completions, ground_truth)
    if log_extra:
        log_extra("extracted", [completion[0]["content"] for completion in completions])
    if log_metric:
        log_metric("accuracy", sum(correct) / len(correct))
    return correct


def curriculum_reward(completions: Any, trainer_state: Any, **kwargs: Any) -> list[float]:
    return [trainer_state.global_step / trainer_state.max_steps] * len(completions)


def kwargs_reward(completions: Any, **kwargs: Any) -> list[float]:
    kwargs["log_metric"]("step", kwargs["trainer_state"].global_step)
    return [float(kwargs["trainer_state"].epoch)] * len(completions)


async def async_reward(prompts: Any, completions: Any, log_metric: Any = None, **kwargs: Any) -> list[float]:
    await asyncio.sleep(0)
    log_metric("calls", 1.0)
    return [float(len(prompts))] * len(completions)


class RepetitionPenalty:
    __name__ = "repetition_penalty_reward"

    def __call__(self, completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        return [-float(len(ids)) for ids in completion_ids]


class CosineScaled:
    def __call__(self, completions: Any, ground_truth: Any, completion_ids: Any, **kwargs: Any) -> list[float | None]:
        return [0.5, None]

    def as_method(self, completions: Any, ground_truth: Any, **kwargs: Any) -> list[float]:
        return ground_truth_reward(completions, ground_truth)


def test_functions_written_for_trl_work_unchanged(tokenizer: Any, group_of: GroupOf) -> None:
    functions = [
        ground_truth_reward,
        accuracy_reward,
        logging_reward,
        curriculum_reward,
        kwargs_reward,
        async_reward,
        RepetitionPenalty(),
        CosineScaled(),
        CosineScaled().as_method,
        functools.partial(ground_truth_reward),
    ]
    rewards = resolve_rewards(RewardSettings(functions=functions))
    scorer = RewardScorer(rewards, tokenizer)
    group = group_of(["four", "five"], prompt=[{"role": "user", "content": "2+2"}], ground_truth="four")
    group = replace(group, trajectories=tuple(replace(one, asked_version=3) for one in group.trajectories))
    progress = TrainingProgress(steps_per_version=4, max_steps=48, epochs_per_version=0.5)
    scores = asyncio.run(scorer.scores(group, progress.at(3)))
    by_function = {name: [None if x != x else x for x in values.tolist()] for name, values in scores.values.items()}
    assert by_function == {
        "ground_truth_reward": [1.0, 0.0],
        "accuracy_reward": [1.0, 0.0],
        "logging_reward": [1.0, 0.0],
        "curriculum_reward": [0.25, 0.25],
        "kwargs_reward": [1.5, 1.5],
        "async_reward": [2.0, 2.0],
        "repetition_penalty_reward": [-5.0, -5.0],
        "CosineScaled": [0.5, None],
        "as_method": [1.0, 0.0],
        "ground_truth_reward_2": [1.0, 0.0],
    }
    assert scores.logged == {
        "logging_reward": {"accuracy": [0.5]},
        "kwargs_reward": {"step": [12.0]},
        "async_reward": {"calls": [1.0]},
    }
    assert scores.extras == {
        "accuracy_reward/gold_parsed": ("four", "four"),
        "logging_reward/extracted": ("four", "five"),
    }
    scored = scored_group(group, rewards, [scores])
    assert (scored.logged, scored.extras) == (scores.logged, scores.extras)
    assert logged_means([scored, scored])["logging_reward"] == {"accuracy": 0.5}


def test_a_wrong_log_is_a_failure_of_the_function(failure: Callable[..., ScoringError]) -> None:
    def grade(*, log_extra: Any, **columns: Any) -> list[float]:
        log_extra("note", ["one"])
        return [1.0, 1.0]

    assert "log_extra('note', ...) has 1 values for 2 completions" in failure(grade).message


# --- special tokens ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def thinking_tokenizer() -> Any:
    """The quickstart's tokenizer with ``<think>`` and its like as special tokens."""
    from transformers import AutoTokenizer

    from rlhf_ray.quickstart import model_path

    tokenizer = AutoTokenizer.from_pretrained(model_path())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>", "<answer>", "</answer>"]})
    return tokenizer


@pytest.mark.parametrize("is_chat", [False, True])
def test_both_forms_of_a_completion_where_the_tags_are_special(
    thinking_tokenizer: Any, group_of: GroupOf, is_chat: bool
) -> None:
    text = "<think>2+2</think><answer>4</answer>"
    seen: dict[str, list[str]] = {}

    def tags(*, completions: Any, completions_with_special_tokens: Any, **columns: Any) -> list[float]:
        seen["plain"] = completion_texts(completions)
        seen["special"] = completion_texts(completions_with_special_tokens)
        return [float("<think>" in item) for item in seen["special"]]

    def not_for_any(**columns: Any) -> list[float]:
        return [float("completions_with_special_tokens" in columns)] * 3

    ids = thinking_tokenizer(text)["input_ids"]
    eos = thinking_tokenizer.eos_token_id
    sequences = [[*ids, eos], ids, []]  # finished, truncated, nothing
    group = group_of(["", "", ""], prompt=[{"role": "user", "content": "2+2"}] if is_chat else "2+2")
    completions = tuple(
        replace(one, token_ids=np.array(own, dtype=np.int32))
        for one, own in zip(group.trajectories, sequences, strict=True)
    )
    group = replace(group, trajectories=completions)
    scorer = RewardScorer(resolve_rewards(RewardSettings(functions=[tags, not_for_any])), thinking_tokenizer)
    scored = asyncio.run(scorer.score(group))
    assert seen["plain"] == ["2+24", "2+24", ""]
    assert seen["special"] == [text, text, ""]
    assert scored.rewards_by_function["tags"].tolist() == [1.0, 1.0, 0.0]
    assert scored.rewards_by_function["not_for_any"].tolist() == [0.0, 0.0, 0.0]
    assert scored.texts == ("2+24", "2+24", "")


# --- several workers --------------------------------------------------------------------------------------------


def two_workers(function: list[float], model: list[float]) -> tuple[list[NamedReward], list[Scores]]:
    """What the workers of a function and of a model found, whose rewards are in another order."""
    rewards = [
        NamedReward(name="model", weight=0.5, function=answering(None)),
        NamedReward(name="function", weight=1.0, function=answering(None)),
    ]
    scores = [
        Scores(
            values={"function": np.array(function)}, texts=("a", "b"), reward_s=0.5, logged={"function": {"x": [1]}}
        ),
        Scores(values={"model": np.array(model)}, texts=("a", "b"), reward_s=0.25),
    ]
    return rewards, scores


def test_what_workers_found_is_added_up_in_the_order_of_the_settings(group_of: GroupOf) -> None:
    # The function need not apply where a model does.
    scored = scored_group(group_of(), *two_workers([np.nan, 1.0], [1.0, -6.0]))
    assert scored.rewards.tolist() == [0.5, -2.0]
    assert scored.rewards.dtype == np.float32
    assert list(scored.rewards_by_function) == ["model", "function"]
    assert {values.dtype for values in scored.rewards_by_function.values()} == {np.dtype(np.float32)}
    assert (scored.texts, scored.reward_s, scored.logged) == (("a", "b"), 0.5, {"function": {"x": [1]}})


def test_a_sum_of_workers_beyond_float32_is_a_failure(group_of: GroupOf) -> None:
    with pytest.raises(ScoringError, match="beyond float32's range"):
        scored_group(group_of(), *two_workers([3e38, 0.0], [3e38, 0.0]))
