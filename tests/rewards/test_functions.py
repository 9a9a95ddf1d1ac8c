from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config.settings import REWARD_ARGUMENTS, RewardSettings
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.rewards import NamedReward, gsm8k, resolve_rewards
from rlhf_ray.rewards.functions import row_check
from rlhf_ray.rewards.registry import with_row_check

CALL = {"prompts": ["p"], "completions": ["#### 4"], "completion_ids": [[1, 2, 3]], "answer": ["4"]}

REWARDS_FILE = """
from __future__ import annotations

from dataclasses import dataclass

SCALE = 2.0


@dataclass
class Verdict:
    value: float


def length_reward(*, completion_ids, scale=SCALE, **columns):
    return [Verdict(scale * len(ids)).value for ids in completion_ids]


not_a_function = 3
"""


def reward(*, completions: list[str], **columns: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def resolve(*functions: object, weights: list[float] | None = None) -> tuple[NamedReward, ...]:
    return resolve_rewards(RewardSettings(functions=list(functions), weights=weights))


def refusal(*functions: object) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        resolve(*functions)
    assert caught.value.value is functions[-1]
    return caught.value


@pytest.fixture
def rewards_file(tmp_path: Path) -> Path:
    path = tmp_path / "my_rewards.py"
    path.write_text(REWARDS_FILE)
    return path


def test_a_callable() -> None:
    (named,) = resolve(reward)
    assert named == NamedReward(name="reward", weight=1.0, function=reward)


def test_names_of_other_callables() -> None:
    class Judge:
        def __call__(self, **columns: Any) -> list[float]:
            return [1.0]

        def grade(self, **columns: Any) -> list[float]:
            return [2.0]

    resolved = resolve(lambda **columns: [1.0], functools.partial(reward), Judge(), Judge().grade, gsm8k())
    assert [named.name for named in resolved] == ["lambda", "reward", "Judge", "grade", "gsm8k"]


def test_equal_names_are_numbered() -> None:
    def reward_2(**columns: Any) -> list[float]:
        return [1.0]

    assert [named.name for named in resolve(reward, reward_2, reward, reward)] == [
        "reward",
        "reward_2",
        "reward_3",
        "reward_4",
    ]


def test_a_built_in_by_name_and_by_mapping() -> None:
    by_name, by_mapping = resolve("gsm8k", {"name": "gsm8k", "last_number": True})
    bare = {**CALL, "completions": ["it is 4"]}
    assert (by_name.name, by_mapping.name) == ("gsm8k", "gsm8k_2")
    assert by_name.function(**bare) == [0.0]
    assert by_mapping.function(**bare) == [1.0]


def test_a_function_of_a_module(monkeypatch: pytest.MonkeyPatch, rewards_file: Path) -> None:
    monkeypatch.syspath_prepend(str(rewards_file.parent))
    (named,) = resolve("my_rewards:length_reward")
    assert named.function(**CALL) == [6.0]
    assert named.function.__module__ == "my_rewards"
    del sys.modules["my_rewards"]


def test_a_function_of_a_file(rewards_file: Path) -> None:
    (named,) = resolve(f"{rewards_file}:length_reward")
    assert named.name == "length_reward"
    assert named.function(**CALL) == [6.0]


def test_a_relative_file_is_sought_in_the_working_directory(
    monkeypatch: pytest.MonkeyPatch, rewards_file: Path
) -> None:
    monkeypatch.chdir(rewards_file.parent)
    assert resolve("./my_rewards.py:length_reward")[0].function(**CALL) == [6.0]


def test_two_files_of_one_name_are_kept_apart(tmp_path: Path) -> None:
    paths = [tmp_path / folder / "rewards.py" for folder in ("a", "b")]
    for value, path in enumerate(paths):
        path.parent.mkdir()
        path.write_text(f"def score(**columns):\n    return [float({value})]\n")
    first, second = resolve(*(f"{path}:score" for path in paths))
    assert (first.function(), second.function()) == ([0.0], [1.0])


def test_an_edited_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "rewards.py"
    path.write_text("def score(**columns):\n    return [1.0]\n")
    assert resolve(f"{path}:score")[0].function() == [1.0]
    path.write_text("def score(**columns):\n    return [1.0 + 10]\n")
    assert resolve(f"{path}:score")[0].function() == [11.0]


def test_arguments_of_a_users_function_are_bound(rewards_file: Path) -> None:
    (named,) = resolve({"name": f"{rewards_file}:length_reward", "scale": 10})
    assert named.name == "length_reward"
    assert named.function(**CALL) == [30]


def test_no_function_is_the_quickstart_checker() -> None:
    (named,) = resolve()
    assert named.name == "reward"
    assert named.function.__module__ == "rlhf_ray.quickstart.task"


def test_async_functions_are_known() -> None:
    async def judge(**columns: Any) -> list[float]:
        return [1.0]

    class Judge:
        async def __call__(self, **columns: Any) -> list[float]:
            return [1.0]

    resolved = resolve(judge, Judge(), functools.partial(judge), reward, "gsm8k")
    assert [named.is_async for named in resolved] == [True, True, True, False, False]


def test_the_field_has_the_index() -> None:
    assert refusal("gsm8k", "gsm9k").field == "rewards.functions[1]"


@pytest.mark.parametrize(
    ("source", "remedy"),
    [
        ("gsm9k", "nearest: 'gsm8k'"),
        ("org/reward-model", "a model: {name: reward_model, path: org/reward-model}"),
        ("no_such_package_x.rewards:f", "no module 'no_such_package_x'"),
        ("json.nothing:f", "no module 'json.nothing'"),
        ("json:lods", "json has no 'lods'; nearest: 'loads'"),
        ("./nowhere/rewards.py:f", "there is no file /"),
        ("rewards.py", "'rewards.py:function'"),
        ({"last_number": True}, "a mapping needs a name"),
        ("json:rewards", "json has no 'rewards'"),
        ({"name": "gsm8k", "last": 1}, "gsm8k takes no argument 'last' (all: answer_column, last_number)"),
        (3, "must be a callable"),
        (gsm8k, "gsm8k makes reward functions and is none: write gsm8k()"),
    ],
)
def test_wrong_sources(source: object, remedy: str) -> None:
    assert remedy in refusal(source).remedy


@pytest.mark.parametrize("source", ["org/none", "json:rewards", {"name": "gsm8k", "penalty": 1}])
def test_what_only_looks_alike_is_not_suggested(source: object) -> None:
    assert "nearest" not in refusal(source).remedy


@pytest.mark.parametrize(
    ("attribute", "remedy"),
    [
        ("length_rewrd", "nearest: 'length_reward'"),
        ("not_a_function", "no function but int"),
    ],
)
def test_wrong_attributes_of_a_file(rewards_file: Path, attribute: str, remedy: str) -> None:
    assert remedy in refusal(f"{rewards_file}:{attribute}").remedy


def test_a_wrong_argument_of_a_users_function(rewards_file: Path) -> None:
    path = rewards_file.with_name("narrow.py")
    path.write_text("def f(prompts, completions, completion_ids, scale): return [scale]\n")
    assert (
        "the function takes no argument 'scail'; nearest: 'scale'" in refusal({"name": f"{path}:f", "scail": 1}).remedy
    )


@pytest.mark.parametrize("text", ["raise RuntimeError('no GPU')", "import not_installed_x"])
def test_a_file_that_cannot_be_imported(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.py"
    path.write_text(text)
    before = set(sys.modules)
    assert "importing" in refusal(f"{path}:f").remedy
    assert not any(name.startswith("broken_") for name in set(sys.modules) - before)


def test_signatures_that_do_not_fit() -> None:
    assert "text is positional only" in refusal(lambda text, /, **columns: [1.0]).remedy
    assert "needs environments" in refusal(lambda environments, **columns: [1.0]).remedy
    assert resolve(lambda environments=None, **columns: [1.0])


def test_a_model_itself_is_refused() -> None:
    torch = pytest.importorskip("torch")
    assert "RewardModelReward(path)" in refusal(torch.nn.Linear(1, 1)).remedy


@pytest.mark.parametrize("name", sorted(REWARD_ARGUMENTS))
def test_what_every_run_passes_cannot_be_bound(name: str, rewards_file: Path) -> None:
    spec = {"name": f"{rewards_file}:length_reward", name: ["mine"]}
    assert f"{name!r} cannot be bound" in refusal(spec).remedy
    assert f"{name!r} cannot be bound" in refusal(functools.partial(reward, **{name: ["mine"]})).remedy


def test_an_argument_has_one_value(tmp_path: Path) -> None:
    path = tmp_path / "bound.py"
    path.write_text("import functools\ndef f(*, scale, **columns): return [scale]\ng = functools.partial(f, scale=2)\n")
    assert resolve(f"{path}:g")[0].function() == [2]
    assert "has a value for 'scale' already" in refusal({"name": f"{path}:g", "scale": 3}).remedy


def test_a_reward_does_not_take_the_name_of_the_failures() -> None:
    def failures(**columns: Any) -> list[float]:
        return [1.0]

    assert [named.name for named in resolve(failures)] == ["failures_2"]


def test_a_function_may_name_a_part_of_the_arguments() -> None:
    def exact(completions: list[str], answer: list[str]) -> list[float]:
        return [1.0]

    assert resolve(exact)[0].function is exact


def test_weights() -> None:
    assert [named.weight for named in resolve(reward, "gsm8k", weights=[2, -0.5])] == [2.0, -0.5]


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_weights_are_finite_numbers(weight: float) -> None:
    with pytest.raises(ConfigError, match=r"rewards\.weights\[1\] = .*finite number"):
        resolve(reward, "gsm8k", weights=[1.0, weight])


# --- checks of rows --------------------------------------------------------------------------------------------------


def gold(row: Mapping[str, object]) -> None:
    if row["gold"] is None:
        raise ValueError("no gold")


def graded(*, completions: list[str], **columns: object) -> list[float]:
    return [1.0] * len(completions)


graded.check_row = gold


class Judge:
    def __call__(self, *, completions: list[str], **columns: object) -> list[float]:
        return [1.0] * len(completions)

    def check_row(self, row: Mapping[str, object]) -> None:
        if not row["rubric"]:
            raise DataError("the rubric is empty")


def test_every_reward_with_a_check_looks_at_a_row() -> None:
    functions = [Judge(), functools.partial(graded, scale=2), graded, "gsm8k", "length"]
    check = row_check(resolve_rewards(RewardSettings(functions=functions)))
    row = {"rubric": "r", "gold": 1, "answer": "#### 7"}
    check(row)
    with pytest.raises(DataError, match=r"^Judge: the rubric is empty$"):
        check(row | {"rubric": ""})
    with pytest.raises(DataError, match=r"^graded: check_row raised ValueError: no gold$"):
        check(row | {"gold": None})
    with pytest.raises(DataError, match=r"^gsm8k: the row's 'answer' holds no number .*'about 7'"):
        check(row | {"answer": "about 7"})
    with pytest.raises(DataError, match=r"^gsm8k: the reward reads the dataset column 'answer', which is not there"):
        check({"rubric": "r", "gold": 1})


def test_a_row_is_checked_by_parameters_and_by_the_functions_own_check() -> None:
    def scaled(*, completions: Any, scale: Any, **columns: Any) -> list[float]:
        return [1.0]

    def grade(*, completions: Any, answer: Any, **columns: Any) -> list[float]:
        return [1.0]

    def checked(**columns: Any) -> list[float]:
        return [1.0]

    def check_numbers(row: Mapping[str, Any]) -> None:
        if not row["answer"].isdigit():
            raise DataError("no number")

    functions = [functools.partial(scaled, scale=2), grade, with_row_check(checked, check_numbers)]
    check = row_check(resolve_rewards(RewardSettings(functions=functions)))
    check({"answer": "4", "level": 1})
    with pytest.raises(DataError, match="the reward 'scaled' is given 'scale'"):
        check({"answer": "4", "scale": 1})
    with pytest.raises(DataError, match="the reward 'grade' needs the column 'answer'"):
        check({"gold": "4"})
    with pytest.raises(DataError, match="checked: no number"):
        check({"answer": "four"})
