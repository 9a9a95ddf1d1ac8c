"""Prompts of a real dataset: all 8,792 questions of GSM8K."""

import itertools
import json
import os
from pathlib import Path

import pytest

from rlhf_ray.config.held_out_sets import held_out_sets
from rlhf_ray.config.settings import DataSettings
from rlhf_ray.prompts import PromptStream, load_tokenizer

FOLDER = Path(os.environ.get("RLHF_RAY_GSM8K") or Path(__file__).parents[3] / "shared" / "data" / "gsm8k")

pytestmark = [
    pytest.mark.usefixtures("local_ray"),
    pytest.mark.skipif(
        not (FOLDER / "train.jsonl").is_file() or not (FOLDER / "test.jsonl").is_file(),
        reason=f"no train.jsonl and test.jsonl of GSM8K in {FOLDER}; set RLHF_RAY_GSM8K to their folder",
    ),
]


def test_every_question_becomes_the_prompt_that_it_is(tokenizer_path: str) -> None:
    settings = DataSettings(path=str(FOLDER), eval_path=str(FOLDER), prompt_column="question", shuffle=True)
    stream = PromptStream(settings, tokenizer_path=tokenizer_path, max_prompt_tokens=2048, seed=0)
    stream.check()
    train = list(itertools.islice(stream, stream.num_rows))
    [held_out] = held_out_sets(settings)
    options = {"tokenizer_path": tokenizer_path, "max_prompt_tokens": 2048}
    test = PromptStream(held_out.data, field=held_out.field, epochs=1, **options).read_all()
    tokenizer = load_tokenizer(tokenizer_path)
    for prompts, name, count in ((train, "train.jsonl", 7473), (test, "test.jsonl", 1319)):
        with (FOLDER / name).open(encoding="utf-8") as file:
            expected = {row["question"]: row["answer"] for row in map(json.loads, file)}
        assert len(prompts) == count
        assert {prompt.text: prompt.columns["answer"] for prompt in prompts} == expected
        assert tokenizer.batch_decode([prompt.token_ids for prompt in prompts]) == [prompt.text for prompt in prompts]
    assert stream.dropped == 0
