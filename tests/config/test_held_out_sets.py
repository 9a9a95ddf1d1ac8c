from __future__ import annotations

from typing import Any

import pytest

from rlhf_ray.config.held_out_sets import held_out_sets
from rlhf_ray.config.settings import DataSettings
from rlhf_ray.errors import ConfigError


def test_one_dataset_is_called_what_its_file_is_called() -> None:
    data = DataSettings(path="train.jsonl", split="train", subset="main", eval_path="data/gsm8k.v2.jsonl")
    (held_out,) = held_out_sets(data)
    assert (held_out.name, held_out.field) == ("gsm8k.v2", "data.eval_path")
    assert (held_out.data.path, held_out.data.split, held_out.data.subset) == ("data/gsm8k.v2.jsonl", "test", "main")
    assert [held_out.name for held_out in held_out_sets(DataSettings(eval_path=["a.jsonl", "b.jsonl"]))] == ["dataset"]


def test_several_by_name_each_with_what_it_has_otherwise() -> None:
    data = DataSettings(
        path="train.jsonl",
        prompt_column="question",
        eval_path={"easy": "easy.jsonl", "MATH-500": {"path": "a/math", "subset": None, "prompt_column": "problem"}},
        eval_split="validation",
        subset="main",
    )
    easy, math = held_out_sets(data)
    assert [(s.name, s.field) for s in (easy, math)] == [
        ("easy", "data.eval_path.easy"),
        ("MATH-500", "data.eval_path.MATH-500"),
    ]
    assert (easy.data.path, easy.data.prompt_column, easy.data.subset) == ("easy.jsonl", "question", "main")
    assert (math.data.path, math.data.prompt_column, math.data.subset) == ("a/math", "problem", None)
    assert (easy.data.split, math.data.split) == ("validation", "validation")
    assert (data.shuffle, easy.data.shuffle, math.data.shuffle) == (True, False, False)


def test_how_chats_are_written_and_columns_read_may_differ() -> None:
    own = {
        "csv_types": {"n": "int"},
        "chat_template": "{{ messages }}",
        "chat_template_kwargs": {"enable_thinking": False},
        "final_assistant": "drop",
    }
    data = DataSettings(path="train.csv", csv_types={"m": "float"}, eval_path={"a": {"path": "a.csv", **own}, "b": "b"})
    a, b = held_out_sets(data)
    assert {name: getattr(a.data, name) for name in own} == own
    assert (b.data.csv_types, b.data.chat_template_kwargs, b.data.final_assistant) == ({"m": "float"}, {}, None)


def test_no_data_at_all_is_the_quickstart_and_own_data_alone_is_no_set() -> None:
    (quickstart,) = held_out_sets(DataSettings())
    assert (quickstart.name, quickstart.data.path, quickstart.data.shuffle) == ("quickstart", None, False)
    assert held_out_sets(DataSettings(path="train.jsonl")) == ()


@pytest.mark.parametrize(
    ("given", "field", "remedy"),
    [
        ({}, "data.eval_path", "name at least one set"),
        ({"a/b": "x.jsonl"}, "data.eval_path", "letters, digits and _ - ."),
        ({"": "x.jsonl"}, "data.eval_path", "letters, digits"),
        ({"a": {"split": "test"}}, "data.eval_path.a", "give its path: {a: {path: test.jsonl}}"),
        ({"a": None}, "data.eval_path.a", "give its path"),
        ({"a": {"path": "x", "splitt": "test"}}, "data.eval_path.a.splitt", "use path, split, subset"),
    ],
)
def test_what_names_no_set(given: Any, field: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as raised:
        held_out_sets(DataSettings(eval_path=given))
    assert raised.value.field == field
    assert remedy in raised.value.remedy
