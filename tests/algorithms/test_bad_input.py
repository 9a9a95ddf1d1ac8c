"""Each mistake as its user sees it: one clear error from ``build()``, before Ray or any engine is started."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from transformers import AutoTokenizer

from rlhf_ray import PPOConfig
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.quickstart import model_path
from rlhf_ray.rewards import exact_match, math_equivalence


@pytest.fixture(autouse=True)
def nothing_is_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)

    def started(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray, "init", started)


def reward(*, completions: list[str], **columns: Any) -> list[float]:
    return [0.0] * len(completions)


def written(rows: list[dict[str, Any]]) -> str:
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "rows.jsonl"


def own_data(rows: list[dict[str, Any]], **data: Any) -> PPOConfig:
    return PPOConfig().model(path=model_path()).data(path=written(rows), **data).rewards(reward)


def needs_an_answer(*, completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    return [0.0] * len(completions)


def scaled(*, completions: list[str], scale: float, **columns: Any) -> list[float]:
    return [scale] * len(completions)


def rewarded(function: Any, row: dict[str, Any], held_out_row: dict[str, Any] | None = None) -> PPOConfig:
    Path("held_out.jsonl").write_text(json.dumps(held_out_row or row))
    return own_data([row], eval_path={"hard": "held_out.jsonl"}).rewards(function)


def held_out(*rows: dict[str, Any]) -> str:
    path = Path("held-out.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def folder_without_a_model() -> PPOConfig:
    Path("folder").mkdir()
    return PPOConfig().model(path="folder")


def config_of_no_model() -> PPOConfig:
    Path("folder").mkdir()
    Path("folder/config.json").write_text('{"model_type": "toaster"}')
    return PPOConfig().model(path="folder", tokenizer_path=model_path())


def quickstart_that_ends_with(eos: Any) -> PPOConfig:
    shutil.copytree(model_path(), "model", dirs_exist_ok=True)
    for name in ("config.json", "generation_config.json"):
        file = Path("model", name)
        file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": eos}))
    return PPOConfig().model(path="model")


def model_of(field: str = "path", **config: Any) -> PPOConfig:
    """A model folder's configuration, with the quickstart's tokenizer."""
    Path("folder").mkdir()
    Path("folder/config.json").write_text(json.dumps({"model_type": "qwen2", "eos_token_id": 257} | config))
    return PPOConfig().model(**{field: "folder"}, tokenizer_path=model_path())


def tokenizer_with(token: str) -> PPOConfig:
    """The quickstart's model, and its tokenizer with a token more."""
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    tokenizer.add_tokens([token])
    tokenizer.save_pretrained("tokenizer")
    return PPOConfig().model(path=model_path(), tokenizer_path="tokenizer")


MISTAKES: dict[str, tuple[Callable[[], PPOConfig], type[Exception], str]] = {
    "missing model": (
        lambda: PPOConfig().model(path="./no-such-model"),
        ConfigError,
        r"model\.(tokenizer_)?path = '.*no-such-model'",
    ),
    "missing critic": (
        lambda: PPOConfig().model(critic_path="./no-such-critic"),
        ConfigError,
        r"model\.critic_path = '.*no-such-critic': no such folder",
    ),
    "unknown compile backend": (
        lambda: PPOConfig().learners(compile_backend="inducter"),
        ConfigError,
        r"learners\.compile_backend = 'inducter': no such backend; there is .*inductor",
    ),
    "not a model": (folder_without_a_model, ConfigError, r"model\.(tokenizer_)?path = '.*folder'"),
    "unknown kind of model": (config_of_no_model, ConfigError, r"model\.path = '.*folder': .*toaster"),
    "encoder-decoder model": (
        lambda: model_of(model_type="t5"),
        ConfigError,
        r"model\.path = '.*folder': t5 is an encoder-decoder model",
    ),
    "quantized model": (
        lambda: model_of(quantization_config={"quant_method": "fp8"}),
        ConfigError,
        r"model\.path = '.*folder': its weights are quantized \(fp8\)",
    ),
    "quantized critic": (
        lambda: model_of("critic_path", quantization_config={"quant_method": "awq"}),
        ConfigError,
        r"model\.critic_path = '.*folder': its weights are quantized \(awq\)",
    ),
    "learners that cannot share the policy's heads": (
        lambda: PPOConfig().learners(num_learners=3, sequence_parallel=3),
        ConfigError,
        r"learners\.sequence_parallel = 3: model\.path: qwen2 has 4 attention heads, .* use 1 or 2 or 4",
    ),
    "critic with a sliding window that is read in slices": (
        lambda: model_of(
            "critic_path", model_type="mistral", vocab_size=300, sliding_window=64, num_attention_heads=4
        ).learners(num_learners=2, sequence_parallel=2),
        ConfigError,
        r"learners\.sequence_parallel = 2: model\.critic_path: mistral has layers of sliding_attention",
    ),
    "critic of a smaller vocabulary": (
        lambda: model_of("critic_path", model_type="qwen2", vocab_size=200),
        ConfigError,
        r"model\.critic_path = '.*folder': its embedding ends with token 199, and the policy's tokens with 25\d",
    ),
    "model without a context length": (
        lambda: model_of(model_type="bloom"),
        ConfigError,
        r"rollouts\.max_prompt_tokens = None: the config of a bloom model names no context length",
    ),
    "tokenizer larger than the model": (
        lambda: (
            tokenizer_with("<extra>").data(path=written([{"prompt": "aa"}, {"prompt": "a<extra>"}])).rewards(reward)
        ),
        DataError,
        r"rows\.jsonl, row 1 \(from 0\): the prompt has token id 258, and the model's embedding ends with 257",
    ),
    "missing dataset": (
        lambda: PPOConfig().model(path=model_path()).data(path="no-such.jsonl").rewards(reward),
        DataError,
        r"data\.path: no such file or folder: no-such\.jsonl \(looked at /",
    ),
    "gold answer that a reward cannot read": (
        lambda: own_data(
            [{"prompt": "1+1", "answer": "2"}, {"prompt": "1+2", "answer": {"ground_truth": "3"}}]
        ).rewards(exact_match()),
        DataError,
        r"rows\.jsonl, row 1 \(from 0\): exact_match: the row's 'answer' is a mapping",
    ),
    "held-out gold answer that a reward cannot read": (
        lambda: own_data([{"prompt": "1+1", "answer": ["2", 2.0]}], eval_path=[held_out({"prompt": "1+2"})]).rewards(
            math_equivalence()
        ),
        DataError,
        r"held-out\.jsonl, row 0 \(from 0\): math_equivalence: the reward reads the dataset column 'answer'",
    ),
    "missing column": (
        lambda: own_data([{"question": "1+1", "answer": "2"}]),
        DataError,
        r"question",
    ),
    "empty dataset": (lambda: own_data([]), DataError, r"rows\.jsonl is empty: it has no rows"),
    "completions that fill the context": (
        lambda: PPOConfig().rollouts(max_new_tokens=2048),
        ConfigError,
        r"rollouts\.max_new_tokens = 2048: must be less than the model's context of 2048",
    ),
    "prompts and completions that exceed the context": (
        lambda: PPOConfig().rollouts(max_new_tokens=1024, max_prompt_tokens=1500),
        ConfigError,
        r"rollouts\.max_prompt_tokens = 1500: .* leaves 1024; lower one of the two",
    ),
    "every prompt longer than the context": (
        lambda: own_data([{"prompt": "x" * 3000}]),
        DataError,
        r"none of the first 1 rows fits rollouts\.max_prompt_tokens = 1024; the shortest prompt has 3000 tokens",
    ),
    "no end of a completion": (lambda: quickstart_that_ends_with([]), ConfigError, r"model\.path = .*no eos_token_id"),
    "an end beyond the vocabulary": (
        lambda: quickstart_that_ends_with([257, 258]),
        ConfigError,
        r"model\.path = .*token id 258 ends a completion, and the model's vocabulary of 258 has no such",
    ),
    "a stop token beyond the vocabulary": (
        lambda: PPOConfig().rollouts(stop_token_ids=[300]),
        ConfigError,
        r"rollouts\.stop_token_ids = \[300\]: token id 300 ends a completion",
    ),
    "half of a character": (
        lambda: own_data([{"prompt": "a"}, {"prompt": "b\ud83d"}]),
        DataError,
        r"rows\.jsonl, row 1 \(from 0\): the prompt in column 'prompt' holds a lone surrogate",
    ),
    "missing chat template": (
        lambda: own_data([{"prompt": "a"}], as_chat=True, chat_template="chat.jinja"),
        ConfigError,
        r"data\.chat_template = 'chat\.jinja': there is no such file",
    ),
    "an argument that the chat template does not read": (
        lambda: own_data([{"prompt": "a"}], as_chat=True, chat_template_kwargs={"enable_thinking": False}),
        ConfigError,
        r"data\.chat_template_kwargs = .*does not read 'enable_thinking'",
    ),
    "an argument of a held-out set": (
        lambda: own_data(
            [{"prompt": "a"}],
            as_chat=True,
            eval_path={"test": {"path": "rows.jsonl", "chat_template_kwargs": {"enable_thinking": False}}},
        ),
        ConfigError,
        r"data\.chat_template_kwargs = .*does not read 'enable_thinking'",
    ),
    "a column that a reward needs": (
        lambda: rewarded(needs_an_answer, {"prompt": "1+1", "gold": "2"}),
        DataError,
        r"rows\.jsonl, row 0 .*'needs_an_answer' needs the column 'answer', which is not there \(columns: gold;",
    ),
    "a column of a held-out set that a reward needs": (
        lambda: rewarded(needs_an_answer, {"prompt": "1+1", "answer": "2"}, {"prompt": "1+1", "gold": "2"}),
        DataError,
        r"held_out\.jsonl, row 0 .*'needs_an_answer' needs the column 'answer', which is not there \(columns: gold;",
    ),
    "a column in place of an argument": (
        lambda: rewarded(functools.partial(scaled, scale=20), {"prompt": "1+1", "scale": 3}),
        DataError,
        r"rows\.jsonl, row 0 .*'scaled' is given 'scale' in rewards\.functions, and the dataset has a column 'scale'",
    ),
    "a column of a held-out set in place of an argument": (
        lambda: rewarded(functools.partial(scaled, scale=20), {"prompt": "1"}, {"prompt": "1+1", "scale": 3}),
        DataError,
        r"held_out\.jsonl, row 0 .*'scaled' is given 'scale' in rewards\.functions",
    ),
    "a column with the name of what rewards receive": (
        lambda: rewarded(reward, {"prompt": "1+1", "trainer_state": 3}),
        DataError,
        r"receive something else under the name 'trainer_state', so no column can be called that; rename it",
    ),
    "typo": (lambda: PPOConfig().training(learning_rate=1e-4), ConfigError, r"did you mean training\.lr\?"),
    "missing reward": (
        lambda: PPOConfig().rewards("no_such_module:f"),
        ConfigError,
        r"no_such_module",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_before_anything_starts(mistake: str) -> None:
    make, error, message = MISTAKES[mistake]
    with pytest.raises(error, match=message):
        make().build_algo()
    assert not Path("runs").exists()
