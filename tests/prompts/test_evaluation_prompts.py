import logging
from typing import Any

import pytest

from rlhf_ray.config.settings import DataSettings
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.prompts.evaluation_prompts import check_prompts, load_prompts
from rlhf_ray.quickstart import task
from rlhf_ray.types import Prompt

pytestmark = pytest.mark.usefixtures("local_ray")


def load(tokenizer_path: str, settings: DataSettings, limit: int | None = None) -> tuple[Prompt, ...]:
    return load_prompts(
        settings, field="data.eval_path.easy", tokenizer_path=tokenizer_path, max_prompt_tokens=8, limit=limit
    )


def check(tokenizer_path: str, settings: DataSettings) -> None:
    check_prompts(settings, field="data.eval_path.easy", tokenizer_path=tokenizer_path, max_prompt_tokens=8)


def test_rows_come_once_and_in_order_whatever_shuffle_says(tokenizer_path: str, write_jsonl: Any) -> None:
    path = write_jsonl({"prompt": f"p{i}", "answer": i} for i in range(30))
    prompts = load(tokenizer_path, DataSettings(path=path, shuffle=True))
    assert [prompt.text for prompt in prompts] == [f"p{i}" for i in range(30)]
    assert [prompt.prompt_id for prompt in prompts] == list(range(30))
    assert prompts[7].columns == {"answer": 7}


def test_a_limit_counts_prompts_that_fit(
    tokenizer_path: str, write_jsonl: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_jsonl({"prompt": "too long to be used" if i == 1 else f"p{i}"} for i in range(6))
    with caplog.at_level(logging.WARNING, "rlhf_ray"):
        prompts = load(tokenizer_path, DataSettings(path=path), limit=3)
    assert [prompt.text for prompt in prompts] == ["p0", "p2", "p3"]
    assert "data.jsonl: 1 prompts longer than 8 tokens were left out" in caplog.text


def test_no_data_named_is_the_quickstart_task(tokenizer_path: str) -> None:
    prompts = load(tokenizer_path, DataSettings())
    assert [{"prompt": prompt.text, **prompt.columns} for prompt in prompts] == task.eval_rows()


def test_the_same_checks_as_of_training_data(tokenizer_path: str, write_jsonl: Any) -> None:
    with pytest.raises(ConfigError, match=r"data\.eval_path\.easy = 5"):
        load(tokenizer_path, DataSettings(path=5))
    with pytest.raises(DataError, match=r"data\.eval_path\.easy: no such file"):
        load(tokenizer_path, DataSettings(path="missing.jsonl"))
    for read in (load, check):
        with pytest.raises(DataError, match="is empty"):
            read(tokenizer_path, DataSettings(path=write_jsonl([])))
        with pytest.raises(DataError, match="there is no column 'prompt'"):
            read(tokenizer_path, DataSettings(path=write_jsonl([{"question": "a"}])))
    check(tokenizer_path, DataSettings(path=write_jsonl([{"prompt": "a"}])))


def test_a_bad_row_that_the_check_did_not_reach(tokenizer_path: str, write_jsonl: Any) -> None:
    path = write_jsonl([{"prompt": "a"}] * 1000 + [{"prompt": None}])
    with pytest.raises(DataError, match=r"data\.jsonl, row 1000 \(from 0\): the prompt in column 'prompt' is null"):
        load(tokenizer_path, DataSettings(path=path))
