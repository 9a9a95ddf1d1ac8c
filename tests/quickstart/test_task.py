import subprocess
import sys

import pytest

from rlhf_ray.quickstart.task import eval_rows, reward, train_rows


def terms(row: dict[str, str]) -> tuple[int, int]:
    a, b = row["prompt"].removesuffix("=").split("+")
    return int(a), int(b)


def test_rows_are_the_sums_of_two_digit_numbers() -> None:
    for row in (*train_rows(), *eval_rows()):
        a, b = terms(row)
        assert row == {"prompt": f"{a}+{b}=", "answer": str(a + b)}
        assert 10 <= a <= 99
        assert 10 <= b <= 99


def test_no_held_out_sum_is_trained_on_in_either_order_of_its_terms() -> None:
    trained = {terms(row) for row in train_rows()}
    held_out = {terms(row) for row in eval_rows()}
    assert not held_out & trained
    assert not {(b, a) for a, b in held_out} & trained


def test_every_sum_is_used_except_the_twins_of_the_held_out_ones() -> None:
    trained = {terms(row) for row in train_rows()}
    held_out = {terms(row) for row in eval_rows()}
    assert len(train_rows()) == len(trained) == 7112
    assert len(eval_rows()) == len(held_out) == 512
    every_sum = {(a, b) for a in range(10, 100) for b in range(10, 100)}
    assert every_sum - trained - held_out == {(b, a) for a, b in held_out} - held_out


def test_the_split_is_the_one_that_the_shipped_model_was_trained_on() -> None:
    assert [row["prompt"] for row in train_rows()[:3]] == ["97+44=", "84+32=", "17+28="]
    assert [row["prompt"] for row in eval_rows()[:2]] == ["73+95=", "38+97="]


def test_changing_the_rows_one_was_given_changes_nobody_elses() -> None:
    train_rows()[0]["answer"] = "0"
    eval_rows().clear()
    assert train_rows()[0]["answer"] == "141"
    assert len(eval_rows()) == 512


@pytest.mark.parametrize(
    ("completion", "expected"),
    [("132", 1.0), ("131", 0.0), ("", 0.0), (" 132", 0.0), ("132\n", 0.0), ("1320", 0.0), ("13", 0.0), ("0132", 0.0)],
)
def test_the_reward_is_an_exact_match(completion: str, expected: float) -> None:
    assert reward(prompts=["47+85="], completions=[completion], completion_ids=[[1]], answer=["132"]) == [expected]


def test_the_reward_compares_each_completion_with_its_own_answer() -> None:
    assert reward(completions=["20", "21", "20"], answer=["20", "20", "21"]) == [1.0, 0.0, 0.0]


def test_the_reward_refuses_answers_that_do_not_match_the_completions_in_number() -> None:
    with pytest.raises(ValueError, match="shorter"):
        reward(completions=["20", "21"], answer=["20"])


def test_the_task_imports_nothing_heavy() -> None:
    check = (
        "import sys, rlhf_ray.quickstart.task, rlhf_ray.quickstart as q; q.model_path();"
        "print([name for name in ('torch', 'transformers', 'tokenizers', 'ray', 'vllm') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True, timeout=120)
    assert result.stdout.strip() == "[]"
