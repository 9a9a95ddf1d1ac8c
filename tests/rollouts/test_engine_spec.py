from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen2Config

from rlhf_ray.config.settings import EvaluationSettings, ModelSettings, QuantizationName, RolloutSettings
from rlhf_ray.errors import ConfigError
from rlhf_ray.models import hub
from rlhf_ray.rollouts.engine import EngineSpec
from rlhf_ray.rollouts.engine_spec import engine_spec, eos_token_ids, max_prompt_tokens, weight_transfer

CONFIG = Qwen2Config(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    eos_token_id=7,
)
# A folder, so that nobody asks a hub; it has no generation_config.json.
MODEL = str(Path(__file__).parent)
# Keys and values of 2 layers, 2 heads of size 8, in float32.
TOKEN_BYTES = 2 * 2 * 2 * 8 * 4
DEFAULT = EvaluationSettings()


def spec_of(
    rollouts: RolloutSettings,
    evaluation: EvaluationSettings = DEFAULT,
    *,
    config: Qwen2Config = CONFIG,
    on_gpu: bool = False,
    **overrides: Any,
) -> EngineSpec:
    arguments: dict[str, Any] = {
        "model_path": MODEL,
        "tokenizer_path": MODEL,
        "eos_token_ids": (7,),
        "prompt_tokens": 20,
        "groups_in_flight": 8,
        "seed": 3,
        "learners_on_gpu": on_gpu,
        "dtype": "bfloat16" if on_gpu else "float32",
    }
    return engine_spec(ModelSettings(), rollouts, evaluation, config=config, on_gpu=on_gpu, **arguments | overrides)


# Lengths.


def test_longest_prompt_is_what_the_context_leaves() -> None:
    assert max_prompt_tokens(RolloutSettings(max_new_tokens=28), DEFAULT, CONFIG) == 100
    assert max_prompt_tokens(RolloutSettings(max_new_tokens=127), DEFAULT, CONFIG) == 1


def test_longest_prompt_may_be_set_lower() -> None:
    assert max_prompt_tokens(RolloutSettings(max_new_tokens=28, max_prompt_tokens=40), DEFAULT, CONFIG) == 40
    assert max_prompt_tokens(RolloutSettings(max_new_tokens=28, max_prompt_tokens=100), DEFAULT, CONFIG) == 100


@pytest.mark.parametrize("max_new_tokens", [128, 500])
def test_completions_that_fill_the_context_are_refused(max_new_tokens: int) -> None:
    with pytest.raises(ConfigError, match="context of 128") as caught:
        max_prompt_tokens(RolloutSettings(max_new_tokens=max_new_tokens), DEFAULT, CONFIG)
    assert (caught.value.field, caught.value.value) == ("rollouts.max_new_tokens", max_new_tokens)


def test_a_prompt_longer_than_the_rest_of_the_context_is_refused() -> None:
    with pytest.raises(ConfigError, match="leaves 100") as caught:
        max_prompt_tokens(RolloutSettings(max_new_tokens=28, max_prompt_tokens=101), DEFAULT, CONFIG)
    assert (caught.value.field, caught.value.value) == ("rollouts.max_prompt_tokens", 101)


def test_a_model_without_a_context_length_asks_for_the_longest_prompt() -> None:
    from transformers import BloomConfig

    with pytest.raises(ConfigError, match=r"rollouts\.max_prompt_tokens = None: .*bloom.*set the longest prompt"):
        max_prompt_tokens(RolloutSettings(), DEFAULT, BloomConfig())
    assert max_prompt_tokens(RolloutSettings(max_prompt_tokens=99), DEFAULT, BloomConfig()) == 99


def test_longer_completions_of_evaluation_have_room_too() -> None:
    rollouts, evaluation = RolloutSettings(max_new_tokens=8), EvaluationSettings(max_new_tokens=28)
    assert max_prompt_tokens(rollouts, evaluation, CONFIG) == 100
    assert spec_of(rollouts, evaluation, prompt_tokens=20).engine_args["max_model_len"] == 48
    # Shorter ones change nothing.
    assert spec_of(RolloutSettings(max_new_tokens=12), EvaluationSettings(max_new_tokens=8)) == spec_of(
        RolloutSettings(max_new_tokens=12)
    )


@pytest.mark.parametrize(
    ("max_prompt_tokens_asked", "evaluation_tokens", "wrong", "named"),
    [
        (None, 128, ("evaluation.max_new_tokens", 128), "context of 128"),
        (100, 40, ("rollouts.max_prompt_tokens", 100), "evaluation.max_new_tokens = 40 .* leaves 88"),
    ],
)
def test_evaluation_that_does_not_fit_the_context_is_refused(
    max_prompt_tokens_asked: int | None, evaluation_tokens: int, wrong: tuple[str, int], named: str
) -> None:
    rollouts = RolloutSettings(max_new_tokens=8, max_prompt_tokens=max_prompt_tokens_asked)
    with pytest.raises(ConfigError, match=named) as caught:
        max_prompt_tokens(rollouts, EvaluationSettings(max_new_tokens=evaluation_tokens), CONFIG)
    assert (caught.value.field, caught.value.value) == wrong


# What ends a completion.


def tokenizer(eos_token: str | None = "<eos>") -> PreTrainedTokenizerFast:
    """One whose EOS is token 7, unless it has none; ``<|im_end|>`` is token 9."""
    named = {7: "<eos>", 9: "<|im_end|>"}
    words = Tokenizer(models.WordLevel({named.get(index, f"<{index}>"): index for index in range(64)}, "<0>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=eos_token)


@pytest.mark.parametrize(("eos", "wanted"), [(3, (3,)), ([3, 4], (3, 4)), ([3, 3], (3,))])
def test_generation_config_says_what_ends_a_completion(eos: Any, wanted: tuple[int, ...], tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))

    assert eos_token_ids(str(tmp_path), CONFIG, tokenizer(None)) == wanted


@pytest.mark.parametrize(
    "written", [None, {"temperature": 0.7}, {"eos_token_id": []}], ids=["no file", "no eos in it", "empty"]
)
def test_config_is_the_fallback(written: dict[str, Any] | None, tmp_path: Path) -> None:
    if written is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(written))

    assert eos_token_ids(str(tmp_path), CONFIG, tokenizer(None)) == (7,)
    config = Qwen2Config(vocab_size=64, eos_token_id=[5, 6])
    assert eos_token_ids(str(tmp_path), config, tokenizer(None)) == (5, 6)


@pytest.mark.parametrize("eos", [None, []])
@pytest.mark.parametrize("eos_token", [None, "<eos>"])
def test_a_model_that_names_none_is_refused(eos: Any, eos_token: str | None, tmp_path: Path) -> None:
    if eos is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(ConfigError, match="names no eos_token_id") as caught:
        eos_token_ids(str(tmp_path), Qwen2Config(eos_token_id=eos), tokenizer(eos_token))
    assert (caught.value.field, caught.value.value) == ("model.path", str(tmp_path))


def test_the_tokenizers_own_eos_ends_a_completion_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert eos_token_ids(str(tmp_path), CONFIG, tokenizer("<eos>")) == (7,)
    assert not caplog.messages
    assert eos_token_ids(str(tmp_path), CONFIG, tokenizer("<|im_end|>")) == (7, 9)
    (message,) = caplog.messages
    assert "<eos> (7)" in message
    assert "<|im_end|> (9)" in message


@pytest.mark.parametrize("eos", [64, [7, 64], -1, "</s>", [None]])
def test_an_eos_that_is_no_token_of_the_model_is_refused(eos: Any, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(ConfigError, match="vocabulary of 64 has no such") as caught:
        eos_token_ids(str(tmp_path), CONFIG, tokenizer(None))
    assert caught.value.field == "model.path"


def test_a_tokenizers_eos_and_stop_tokens_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.path.*token id 9 .*vocabulary of 8 "):
        eos_token_ids(str(tmp_path), Qwen2Config(vocab_size=8, eos_token_id=7), tokenizer("<|im_end|>"))
    with pytest.raises(ConfigError, match=r"rollouts\.stop_token_ids.*token id 64 "):
        eos_token_ids(str(tmp_path), CONFIG, tokenizer(), stop_token_ids=[5, 64])


# Engine arguments.


def test_arguments_that_do_not_depend_on_the_machine() -> None:
    for on_gpu in (False, True):
        spec = spec_of(RolloutSettings(group_size=4, max_new_tokens=12), on_gpu=on_gpu)
        wanted = {
            "model": MODEL,
            "tokenizer": MODEL,
            "trust_remote_code": False,
            "seed": 3,
            "max_model_len": 32,
            "max_num_seqs": 32,
            "logprobs_mode": "processed_logprobs",
            "skip_tokenizer_init": True,
            # Else vLLM would lay the model's own sampling defaults under ours.
            "generation_config": "vllm",
        }
        assert {name: spec.engine_args[name] for name in wanted} == wanted
        assert spec.eos_token_ids == (7,)
        assert spec.on_gpu is on_gpu


def test_vllm_knows_every_argument() -> None:
    """A release that drops one must be seen here and not in a replica."""
    import dataclasses

    from vllm import AsyncEngineArgs

    known = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    for on_gpu in (False, True):
        assert spec_of(RolloutSettings(), on_gpu=on_gpu).engine_args.keys() <= known


@pytest.mark.parametrize("on_gpu", [False, True])
def test_families_that_vllm_cannot_run_are_refused(on_gpu: bool) -> None:
    from transformers import AutoConfig

    def refusal(kind: str) -> str:
        try:
            spec_of(RolloutSettings(), config=AutoConfig.for_model(kind, eos_token_id=7), on_gpu=on_gpu)
        except ConfigError as error:
            assert error.field == "model.path"
            return error.remedy
        return ""

    assert refusal("gpt_neo").startswith("rollouts of gpt_neo models do not work: vLLM has no class for it")
    assert not refusal("llama")
    # A language model, by its own name or as a part of one that also reads images.
    for kind in ("mamba", "qwen3_5", "qwen3_5_text"):
        assert ("set resources.device = cuda" in refusal(kind)) is not on_gpu


def test_stop_strings_need_the_tokenizer() -> None:
    assert spec_of(RolloutSettings(stop=["\n"])).engine_args["skip_tokenizer_init"] is False


@pytest.mark.parametrize(
    ("groups", "replicas", "group_size", "sequences"),
    [(8, 1, 4, 32), (8, 3, 4, 12), (1, 4, 4, 4), (4096, 1, 4, 1024), (1, 1, 2000, 2000)],
)
def test_each_replica_has_room_for_its_part_of_the_groups(
    groups: int, replicas: int, group_size: int, sequences: int
) -> None:
    rollouts = RolloutSettings(num_replicas=replicas, group_size=group_size)

    assert spec_of(rollouts, groups_in_flight=groups).engine_args["max_num_seqs"] == sequences


def test_a_cpu_engine() -> None:
    spec = spec_of(RolloutSettings(num_threads=3))

    assert spec.engine_args["enforce_eager"] is True
    assert spec.engine_args["dtype"] == "float32"
    assert spec.engine_args["distributed_executor_backend"].endswith("UniProcExecutor")
    assert "gpu_memory_utilization" not in spec.engine_args
    assert spec.env["OMP_NUM_THREADS"] == "3"
    assert spec.env["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert spec.env["TORCHDYNAMO_DISABLE"] == "1"
    assert spec.engine_args["weight_transfer_config"] == {"backend": "rlhf_ray_shared_memory"}


def test_cpu_replicas_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)

    assert spec_of(RolloutSettings(num_replicas=3)).env["OMP_NUM_THREADS"] == "2"
    assert spec_of(RolloutSettings()).env["OMP_NUM_THREADS"] == "7"
    assert spec_of(RolloutSettings(num_replicas=30)).env["OMP_NUM_THREADS"] == "1"
    # The other half is for learners that compute at the same time.
    assert spec_of(RolloutSettings(max_staleness=1)).env["OMP_NUM_THREADS"] == "4"


def test_replicas_look_into_the_cache_alone_where_the_hub_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_STATE", hub._State())
    monkeypatch.setattr(hub, "_probe", lambda endpoint: "away")
    assert spec_of(RolloutSettings(), model_path="owner/missing").env["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in spec_of(RolloutSettings()).env


def test_a_gpu_engine() -> None:
    spec = spec_of(RolloutSettings(gpu_memory_utilization=0.4, enforce_eager=False), on_gpu=True)

    assert spec.engine_args["gpu_memory_utilization"] == 0.4
    assert spec.engine_args["enforce_eager"] is False
    assert spec.engine_args["distributed_executor_backend"] == "uni"
    assert "kv_cache_memory_bytes" not in spec.engine_args
    assert "TORCHDYNAMO_DISABLE" not in spec.env
    assert "OMP_NUM_THREADS" not in spec.env
    assert spec.engine_args["weight_transfer_config"] == {"backend": "rlhf_ray_nccl"}


def test_an_engine_that_shares_its_gpu_can_sleep_and_reads_weights_from_memory() -> None:
    spec = spec_of(RolloutSettings(), on_gpu=True, colocated=True)
    assert spec.colocated
    assert spec.engine_args["enable_sleep_mode"] is True
    # Two processes on one GPU cannot be in one NCCL group.
    assert spec.weight_transfer == "shared_memory"
    # vLLM's CPU build has no allocator for it, and its engines pause instead.
    assert "enable_sleep_mode" not in spec_of(RolloutSettings(), colocated=True).engine_args
    assert "enable_sleep_mode" not in spec_of(RolloutSettings(), on_gpu=True).engine_args


def test_an_engine_over_several_gpus_runs_its_workers_on_ray() -> None:
    spec = spec_of(RolloutSettings(tensor_parallel_size=4), on_gpu=True)

    assert spec.engine_args["distributed_executor_backend"] == "ray"
    assert spec.engine_args["tensor_parallel_size"] == spec.tensor_parallel_size == 4


@pytest.mark.parametrize(
    ("setting", "on_gpu", "learners_on_gpu", "colocated", "resolved"),
    [
        ("auto", False, False, False, "shared_memory"),
        ("auto", True, True, False, "nccl"),
        ("auto", True, False, False, "shared_memory"),
        # NCCL has no two ranks on one GPU.
        ("auto", True, True, True, "shared_memory"),
        ("auto", False, False, True, "shared_memory"),
        ("shared_memory", True, True, False, "shared_memory"),
        ("shared_memory", True, True, True, "shared_memory"),
        ("nccl", True, True, False, "nccl"),
        ("ipc", True, True, True, "ipc"),
    ],
)
def test_weight_transfer(setting: Any, on_gpu: bool, learners_on_gpu: bool, colocated: bool, resolved: str) -> None:
    assert weight_transfer(setting, between_gpus=on_gpu and learners_on_gpu, colocated=colocated) == resolved
    spec = spec_of(
        RolloutSettings(weight_transfer=setting), on_gpu=on_gpu, learners_on_gpu=learners_on_gpu, colocated=colocated
    )
    assert spec.weight_transfer == resolved
    assert spec.engine_args["weight_transfer_config"] == {"backend": f"rlhf_ray_{resolved}"}


@pytest.mark.parametrize(
    ("setting", "between_gpus", "colocated", "remedy"),
    [
        ("nccl", True, True, "use ipc or shared_memory"),
        ("ipc", True, False, "only where a learner and a replica share it"),
        ("ipc", False, True, "ipc needs replicas and learners on GPUs"),
        ("nccl", False, False, "nccl needs replicas and learners on GPUs"),
    ],
)
def test_a_transfer_that_cannot_work_is_refused(setting: str, between_gpus: bool, colocated: bool, remedy: str) -> None:
    with pytest.raises(ConfigError, match=remedy) as caught:
        weight_transfer(setting, between_gpus=between_gpus, colocated=colocated)
    assert caught.value.field == "rollouts.weight_transfer"


def test_engines_quantize_to_what_vllm_has_a_name_for() -> None:
    from vllm.config.quantization import ONLINE_QUANT_SHORTHAND_NAMES

    # One of its names asks for a configuration; fp8 is per tensor where the checkpoint is not quantized.
    assert {*get_args(QuantizationName)} == {*ONLINE_QUANT_SHORTHAND_NAMES, "fp8"} - {"online"}
    for name in get_args(QuantizationName):
        assert spec_of(RolloutSettings(quantization=name), on_gpu=True).engine_args["quantization"] == name
    assert spec_of(RolloutSettings(), on_gpu=True).engine_args["quantization"] is None


def test_cpus_quantize_to_what_they_have_kernels_for() -> None:
    assert spec_of(RolloutSettings(quantization="fp8_per_block")).engine_args["quantization"] == "fp8_per_block"
    with pytest.raises(ConfigError, match="fp8_per_block alone") as caught:
        spec_of(RolloutSettings(quantization="fp8"))
    assert caught.value.field == "rollouts.quantization"


def test_users_engine_arguments_come_last() -> None:
    rollouts = RolloutSettings(engine_args={"max_num_seqs": 5, "quantization": "fp8", "enforce_eager": False})

    arguments = spec_of(rollouts).engine_args

    assert (arguments["max_num_seqs"], arguments["quantization"]) == (5, "fp8")
    assert arguments["enforce_eager"] is False
    assert arguments["model"] == MODEL


# The key-value cache of a CPU engine.


def cache_bytes(rollouts: RolloutSettings, **overrides: Any) -> int:
    return int(spec_of(rollouts, **overrides).engine_args["kv_cache_memory_bytes"])


def test_cache_holds_all_sequences_in_flight_and_a_quarter_more() -> None:
    # 8 groups of 32 sequences of 20 + 12 tokens.
    rollouts = RolloutSettings(group_size=32, max_new_tokens=12)

    assert cache_bytes(rollouts) == int(1.25 * 8 * 32 * 32) * TOKEN_BYTES
    assert cache_bytes(rollouts, dtype="bfloat16") == int(1.25 * 8 * 32 * 32) * TOKEN_BYTES // 2


def test_cache_is_never_less_than_two_longest_sequences() -> None:
    rollouts = RolloutSettings(group_size=1, max_new_tokens=12)

    assert cache_bytes(rollouts, groups_in_flight=1) == 2 * (32 + 256) * TOKEN_BYTES


def test_cache_is_bounded() -> None:
    large = Qwen2Config(
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, eos_token_id=7
    )

    found = cache_bytes(RolloutSettings(group_size=64, max_new_tokens=2000), config=large)

    assert found == 4 * 1024**3


def test_cache_of_layers_with_a_state_does_not_grow_and_is_not_shared() -> None:
    from transformers import Mamba2Config

    arguments = spec_of(RolloutSettings(), config=Mamba2Config(eos_token_id=7)).engine_args
    assert arguments["kv_cache_memory_bytes"] == 1024**3
    # The engine starts with such a cache only where prefill is split, which that of CPUs is not.
    assert arguments["enable_prefix_caching"] is False
    assert spec_of(RolloutSettings()).engine_args["enable_prefix_caching"] is None


def test_cache_may_be_set() -> None:
    assert cache_bytes(RolloutSettings(kv_cache_bytes=12345)) == 12345


def test_a_config_without_grouped_heads_counts_all_of_them() -> None:
    from transformers import GPT2Config

    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, eos_token_id=7)
    rollouts = RolloutSettings(group_size=1, max_new_tokens=12)

    # 4 heads of 8 instead of 2.
    found = spec_of(rollouts, config=config, groups_in_flight=1)
    assert found.engine_args["kv_cache_memory_bytes"] == 2 * (32 + 256) * 2 * TOKEN_BYTES


def test_spec_does_not_keep_the_settings_own_dictionary() -> None:
    rollouts = replace(RolloutSettings(), engine_args={"max_num_seqs": 5})

    spec_of(rollouts).engine_args["model"] = "changed"

    assert rollouts.engine_args == {"max_num_seqs": 5}
