from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, PretrainedConfig

sys.path.insert(0, str(Path(__file__).parent))
from model_families import NOT_TRIED, causal_families, tiny_config

from rlhf_ray.errors import ConfigError
from rlhf_ray.models.config import (
    check_causal,
    check_reads_vocabulary,
    check_sequence_parallel,
    check_vocabulary,
    context_length,
    keeps_states,
    kv_token_bytes,
    load_model_config,
)
from rlhf_ray.prompts.tokenizer import load_tokenizer
from rlhf_ray.quickstart import model_path

FAMILIES = [family for family in causal_families() if family not in NOT_TRIED]


def written(folder: Path, **config: Any) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_asked(family: str) -> None:
    config = tiny_config(family)
    assert context_length(config) or family in (
        "bloom",
        "falcon_mamba",
        "mamba",
        "mamba2",
        "recurrent_gemma",
        "rwkv",
        "xlstm",
    )
    assert kv_token_bytes(config, 4) or family in ("falcon_mamba", "mamba", "mamba2", "rwkv", "xlstm")
    assert isinstance(keeps_states(config), bool)
    assert check_vocabulary(load_tokenizer(model_path()), config) == 258


@pytest.mark.parametrize(
    ("family", "sizes", "length"),
    [
        ("llama", {"max_position_embeddings": 77}, 77),
        ("gpt2", {"n_positions": 77}, 77),
        ("mpt", {"max_seq_len": 77}, 77),
        # Bloom's own files name it so; its class does not know it.
        ("bloom", {"seq_length": 77}, 77),
        ("bloom", {}, None),
        ("mamba", {}, None),
    ],
)
def test_context_length_has_many_names(family: str, sizes: dict[str, int], length: int | None) -> None:
    assert context_length(AutoConfig.for_model(family, **sizes)) == length


def test_key_value_cache_of_layers_that_differ() -> None:
    # Gemma 4's layers with full attention have larger heads, so that the config as a whole has no head size.
    config = AutoConfig.for_model(
        "gemma4_text",
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["sliding_attention", "full_attention"],
        per_layer_config={0: {"head_dim": 8}, 1: {"head_dim": 16}},
    )
    assert kv_token_bytes(config, 4) == 2 * 4 * (2 * 8 + 2 * 16)
    assert kv_token_bytes(AutoConfig.for_model("mamba"), 4) is None
    gpt2 = AutoConfig.for_model("gpt2", n_embd=32, n_layer=3, n_head=4)
    assert kv_token_bytes(gpt2, 2) == 2 * 2 * 3 * 32


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("t5", "t5 is an encoder-decoder model, which does not continue its prompt"),
        ("bert", "bert is an encoder: each token sees those that follow"),
        ("vit", "transformers has no causal language model of type vit"),
    ],
)
def test_what_is_no_causal_language_model_is_refused(kind: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"model\.path = 'somewhere': {reason}; name a decoder-only"):
        check_causal("model.path", "somewhere", AutoConfig.for_model(kind))


@pytest.mark.parametrize("family", FAMILIES)
def test_only_encoders_among_the_causal_families_are_refused(family: str) -> None:
    encoders = {"bert", "bert-generation", "big_bird", "electra", "ernie", "megatron-bert", "rembert", "roformer"}
    try:
        check_causal("model.path", "", tiny_config(family))
    except ConfigError:
        assert family in encoders
    else:
        assert family not in encoders


def test_a_model_with_code_of_its_own_is_not_refused() -> None:
    check_causal("model.path", "", PretrainedConfig(model_type="own", auto_map={"AutoModelForCausalLM": "m.Own"}))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("method", ["gptq", "fp8", "bitsandbytes"])
def test_a_quantized_checkpoint_is_refused(method: str, nested: bool, tmp_path: Path) -> None:
    quantized = {"quantization_config": {"quant_method": method, "bits": 4}}
    path = written(tmp_path, model_type="gemma3", **({"text_config": quantized} if nested else quantized))

    with pytest.raises(ConfigError, match=rf"its weights are quantized \({method}\).*dequantize it") as caught:
        load_model_config("model.critic_path", path, trust_remote_code=False)
    assert (caught.value.field, caught.value.value) == ("model.critic_path", path)


def test_a_checkpoint_that_says_it_is_not_quantized_is_read(tmp_path: Path) -> None:
    path = written(tmp_path, model_type="llama", quantization_config=None)
    assert load_model_config("model.path", path, trust_remote_code=False).model_type == "llama"


def test_tokens_that_the_model_has_no_embedding_for_are_told(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = load_tokenizer(model_path())
    last = max(tokenizer.get_vocab().values())
    config = AutoConfig.for_model("llama", vocab_size=last)

    with caplog.at_level(logging.WARNING):
        assert check_vocabulary(tokenizer, config) == last
    assert "the tokenizer has 1 tokens that the model has no embedding for, from" in caplog.text
    assert f"(id {last}) on" in caplog.text


def test_a_critic_need_not_have_rows_that_no_token_uses() -> None:
    tokenizer = load_tokenizer(model_path())
    tokens = 1 + max(tokenizer.get_vocab().values())
    # As of two sizes of one family: the embedding of the larger one is filled up further.
    padded, exact = (AutoConfig.for_model("llama", vocab_size=size) for size in (tokens + 128, tokens))
    check_reads_vocabulary("model.critic_path", "critic", exact, tokenizer, padded)
    with pytest.raises(ConfigError, match=r"model\.critic_path = 'critic': its embedding ends with token"):
        check_reads_vocabulary(
            "model.critic_path", "critic", AutoConfig.for_model("llama", vocab_size=tokens - 1), tokenizer, padded
        )


@pytest.mark.parametrize(
    ("family", "sizes", "reason"),
    [
        (
            "llama",
            {"hidden_size": 60, "num_attention_heads": 6, "num_key_value_heads": 6},
            "6 .*heads.* use 1 or 2 or 3 or 6",
        ),
        ("gemma3_text", {"num_attention_heads": 4}, "layers of sliding_attention"),
        ("mistral", {"num_attention_heads": 4}, "layers of sliding_attention"),
        ("llama4_text", {"num_attention_heads": 4}, "layers of chunked_attention"),
        ("lfm2", {"num_attention_heads": 4}, "carry a state"),
        ("qwen3_next", {"num_attention_heads": 4}, "carry a state"),
        ("mamba", {}, "carry a state"),
        ("rwkv", {}, "carry a state"),
        (
            "llama",
            {
                "num_attention_heads": 4,
                "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
            },
            "dynamic rotary embeddings",
        ),
    ],
)
def test_a_model_that_cannot_be_read_in_slices_is_refused(family: str, sizes: dict[str, Any], reason: str) -> None:
    config = tiny_config(family, **sizes)
    check_sequence_parallel(1, "model.path", config)
    with pytest.raises(ConfigError, match=reason) as refused:
        check_sequence_parallel(4, "model.path", config)
    assert (refused.value.field, refused.value.value) == ("learners.sequence_parallel", 4)
    assert "model.path" in str(refused.value)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "qwen3_moe", "olmo2", "deepseek_v3", "gpt2"])
def test_a_model_of_attention_to_all_tokens_is_read_in_slices(family: str) -> None:
    check_sequence_parallel(4, "model.path", tiny_config(family, num_attention_heads=4, sliding_window=None))
