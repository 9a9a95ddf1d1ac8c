"""A small real model folder, and a machine to compare with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from rlhf_ray.doctor.driver import GPU, Driver
from rlhf_ray.doctor.machine import Machine

GIB = 1024**3


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 model of 6,816 parameters with a tokenizer of single characters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("model")
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        eos_token_id=0,
        bos_token_id=None,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    vocabulary = {text: index for index, text in enumerate(["<eos>", *"0123456789+="])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    return folder


@pytest.fixture
def sharded_folder(tmp_path: Path) -> Path:
    """Weights of 12 and 5 parameters in two files, and their index."""
    import numpy as np

    save_file({"a": np.zeros((3, 4), np.float32)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": np.zeros(5, np.float16)}, tmp_path / "model-00002-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


def machine(
    *,
    cores: int = 8,
    available_gib: float = 32,
    shared_memory_gib: float | None = 16,
    open_files: int = 65536,
    gpus: int = 0,
    gpu_gib: float = 80,
    driver: str = "580.95.05",
) -> Machine:
    """Make up a machine."""
    gpu = GPU(name="GPU", memory_bytes=int(gpu_gib * GIB), free_bytes=int(gpu_gib * GIB))
    return Machine(
        cores=cores,
        memory_bytes=64 * GIB,
        available_bytes=int(available_gib * GIB),
        shared_memory_bytes=None if shared_memory_gib is None else int(shared_memory_gib * GIB),
        open_files=open_files,
        driver=Driver(version=driver, gpus=(gpu,) * gpus) if gpus else None,
    )


@pytest.fixture(name="machine")
def machine_maker() -> object:
    """The function above: test modules cannot import each other."""
    return machine
