import subprocess
import sys
from typing import Any

import pytest

from rlhf_ray.environments.environment import Action, Environment, Step
from rlhf_ray.quickstart.calculator import Calculator, eval_rows, train_rows

ROW = {"prompt": "37+58+21=", "answer": "116"}


def action(text: str, *, truncated: bool = False) -> Action:
    message = {"role": "assistant", "content": text}
    return Action(text=text, message=message, token_ids=tuple(text.encode()), truncated=truncated)


def begun(row: dict[str, Any] = ROW) -> Calculator:
    environment = Calculator()
    assert environment.reset(row, seed=0) is None
    return environment


def terms(row: dict[str, str]) -> tuple[int, ...]:
    return tuple(map(int, row["prompt"].removesuffix("=").split("+")))


def test_two_calls_and_the_answer() -> None:
    environment = begun()
    assert isinstance(environment, Environment)
    assert environment.step(action("37+58")) == Step(observation="95;", metrics={"calls": 1.0})
    assert environment.step(action("95+21")) == Step(observation="116;", metrics={"calls": 1.0})
    assert environment.step(action("116")) == Step(reward=1.0, done=True, metrics={"calls": 0.0, "valid": 1.0})


def test_a_wrong_call_is_answered_and_can_be_made_good() -> None:
    environment = begun()
    assert environment.step(action("37+59")).observation == "96;"
    assert environment.step(action("37+58")).observation == "95;"
    assert environment.step(action("95+21")).observation == "116;"
    assert environment.step(action("116")).reward == 1.0


@pytest.mark.parametrize(
    ("call", "observation"), [("0+0", "0;"), ("7+5", "12;"), ("007+5", "12;"), ("999+999", "1998;"), ("10+100", "110;")]
)
def test_numbers_of_one_to_three_digits_are_added(call: str, observation: str) -> None:
    step = begun().step(action(call))
    assert (step.observation, step.reward, step.done) == (observation, 0.0, False)


@pytest.mark.parametrize("text", ["115", "016", "11", "0", "999"])
def test_a_wrong_number_ends_the_episode_without_reward(text: str) -> None:
    assert begun().step(action(text)) == Step(done=True, metrics={"calls": 0.0, "valid": 1.0})


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "+",
        "37+",
        "+58",
        "37+58+21",
        "37+58=",
        "37 + 58",
        " 37+58",
        "37+58\n",
        "116\n",
        " 116",
        "-116",
        "+116",
        "116.0",
        "1e2",
        "1_16",
        "0x74",
        "37-58",
        "1000+1",
        "1+1000",
        "1160",
        "0116",
        "9" * 5000,
        "9" * 5000 + "+1",
        "²71",
        "²71+1",
        "1+²",
        "\u0661\u0661\u0666",
        "\u0661+\u0661",
        "\uff11\uff11\uff16",
        "37\uff0b58",
        "\ufffd",
        "11\x006",
    ],
)
def test_anything_else_ends_the_episode_without_reward(text: str) -> None:
    assert begun().step(action(text)) == Step(done=True, metrics={"calls": 0.0, "valid": 0.0})


@pytest.mark.parametrize("text", ["37+58", "116"])
def test_a_turn_that_was_cut_is_neither_a_call_nor_an_answer(text: str) -> None:
    assert begun().step(action(text, truncated=True)) == Step(done=True, metrics={"calls": 0.0, "valid": 0.0})


def test_an_object_that_plays_again_takes_the_new_answer() -> None:
    environment = begun()
    environment.step(action("1"))
    environment.reset({"prompt": "10+10+10=", "answer": "30"}, seed=1)
    assert environment.step(action("30")).reward == 1.0


def test_rows_are_the_sums_of_three_two_digit_numbers() -> None:
    for row in (*train_rows(), *eval_rows()):
        first, second, third = terms(row)
        assert row == {"prompt": f"{first}+{second}+{third}=", "answer": str(first + second + third)}
        assert all(10 <= term <= 99 for term in terms(row))
    every_term = {term for row in train_rows() for term in terms(row)}
    assert every_term == set(range(10, 100))


def test_no_two_rows_have_the_same_terms_in_any_order() -> None:
    assert (len(train_rows()), len(eval_rows())) == (16_384, 512)
    every_sum = {tuple(sorted(terms(row))) for row in (*train_rows(), *eval_rows())}
    assert len(every_sum) == 16_384 + 512


def test_the_split_is_the_one_that_the_shipped_model_was_trained_on() -> None:
    assert [row["prompt"] for row in train_rows()[:2]] == ["10+20+64=", "94+27+76="]
    assert [row["prompt"] for row in eval_rows()[:2]] == ["85+78+47=", "33+56+46="]


def test_changing_rows_that_were_returned_changes_no_later_ones() -> None:
    train_rows()[0]["answer"] = "0"
    eval_rows().clear()
    assert train_rows()[0]["answer"] == "94"
    assert len(eval_rows()) == 512


def test_the_environment_imports_nothing_heavy() -> None:
    check = (
        "import sys, rlhf_ray.quickstart.calculator;"
        "print([name for name in ('torch', 'transformers', 'tokenizers', 'ray', 'vllm') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True, timeout=120)
    assert result.stdout.strip() == "[]"
