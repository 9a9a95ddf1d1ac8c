"""Each mistake as its user sees it: one clear error from ``build()``, before Ray or any engine is started."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from rlhf_ray import PPOConfig
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.quickstart import model_path


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
    return PPOConfig().data(path=written(rows), **data).rewards(reward)


def folder_without_a_model() -> PPOConfig:
    Path("folder").mkdir()
    return PPOConfig().model(path="folder")


def config_of_no_model() -> PPOConfig:
    Path("folder").mkdir()
    Path("folder/config.json").write_text('{"model_type": "toaster"}')
    return PPOConfig().model(path="folder", tokenizer_path=model_path())


def model_of(field: str = "path", **config: Any) -> PPOConfig:
    """A model folder's configuration, with the quickstart's tokenizer."""
    Path("folder").mkdir()
    Path("folder/config.json").write_text(json.dumps({"model_type": "qwen2", "eos_token_id": 257} | config))
    return PPOConfig().model(**{field: "folder"}, tokenizer_path=model_path())


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
    "model without a context length": (
        lambda: model_of(model_type="bloom"),
        ConfigError,
        r"rollouts\.max_prompt_tokens = None: the config of a bloom model names no context length",
    ),
    "tokenizer larger than the model": (
        lambda: model_of(vocab_size=ord("z")).data(path=written([{"prompt": "aa"}, {"prompt": "az"}])).rewards(reward),
        DataError,
        r"rows\.jsonl, row 1 \(from 0\): the prompt has token id 122, and the model's embedding ends with 121",
    ),
    "missing dataset": (
        lambda: PPOConfig().data(path="no-such.jsonl").rewards(reward),
        DataError,
        r"data\.path: no such file or folder: no-such\.jsonl \(looked at /",
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
        r"none of the first 1 rows fits rollouts\.max_prompt_tokens = 2040; the shortest prompt has 3000 tokens",
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
