"""Tiny reward models over the quickstart's byte tokenizer, with random weights that depend on the seed alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def make_reward_model(
    folder: Path,
    *,
    num_labels: int = 1,
    pad_token: bool = True,
    chat_template: bool = True,
    max_positions: int = 256,
    seed: int = 0,
) -> str:
    import torch
    from transformers import Qwen2Config, Qwen2ForSequenceClassification

    from rlhf_ray.quickstart.tokenizer import EOS_TOKEN_ID, PAD_TOKEN_ID, VOCAB_SIZE, build_tokenizer

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_positions,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=EOS_TOKEN_ID,
        pad_token_id=PAD_TOKEN_ID if pad_token else None,
        num_labels=num_labels,
    )
    Qwen2ForSequenceClassification(config).save_pretrained(folder)
    tokenizer = build_tokenizer(max_length=max_positions)
    if not pad_token:
        tokenizer.pad_token = None
    if not chat_template:
        tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """``make(num_labels=, pad_token=, chat_template=, max_positions=, seed=)`` -> folder of a new model."""

    def make(**options: Any) -> str:
        return make_reward_model(tmp_path_factory.mktemp("reward-model") / "model", **options)

    return make


@pytest.fixture(scope="session")
def model_path(make: Callable[..., str]) -> str:
    """A model with one label, a pad token and a chat template."""
    return make()
