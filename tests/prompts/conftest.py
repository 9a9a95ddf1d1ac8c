"""A tokenizer made on the spot and a small Ray, shared by the tests of prompts/."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.prompts import reader

_started: list[bool] = []

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if not loop.first and message.role == loop.previtem.role %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<{{ message.role }}>{{ message.content }}</s>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="session")
def make_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that saves a byte-level tokenizer, one token a byte, and returns its folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    def make(*, chat_template: str | None = CHAT_TEMPLATE, begin: bool = False, end: bool = False) -> str:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *alphabet])}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        if begin or end:
            tokenizer.post_processor = processors.TemplateProcessing(
                single=("<s> " if begin else "") + "$A" + (" </s>" if end else ""),
                special_tokens=[("<s>", 0), ("</s>", 1)],
            )
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
        fast.chat_template = chat_template
        folder = tmp_path_factory.mktemp("tokenizer")
        fast.save_pretrained(folder)
        return str(folder)

    return make


@pytest.fixture(scope="session")
def tokenizer_path(make_tokenizer: Any) -> str:
    return str(make_tokenizer())


@pytest.fixture(scope="session")
def local_ray() -> None:
    """A Ray of two CPUs, unless one runs already; stopped after the last test of this folder."""
    import ray

    if not ray.is_initialized():
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        _started.append(True)


def pytest_runtest_teardown(nextitem: pytest.Item | None) -> None:
    if _started and (nextitem is None or Path(__file__).parent not in nextitem.path.parents):
        import ray

        _started.clear()
        ray.shutdown()


@pytest.fixture
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let small tests see several executions, each of several tasks."""
    monkeypatch.setattr(reader, "_PROMPTS_PER_RUN", 48)
    monkeypatch.setattr(reader, "_PROMPTS_PER_TASK", 16)


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Any:
    """Return a function that writes rows to a JSONL file and returns its path."""

    def write(rows: Iterable[dict[str, Any]], name: str = "data.jsonl") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write
