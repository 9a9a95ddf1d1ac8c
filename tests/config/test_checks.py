from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest

from rlhf_ray import ConfigError, PPOConfig
from rlhf_ray.config.checks import check_loss, validate
from rlhf_ray.config.declaration import Bounds
from rlhf_ray.config.plugins import Plugin
from rlhf_ray.config.settings import Settings, TrainingSettings, declaration, section_types, setting_types
from rlhf_ray.config.values import typed_value

NUMBERS = {int, float}
# Checked by a function of their own, because the remedy is not a range.
NOT_A_RANGE = {
    "rollouts.top_p",
    "rollouts.top_k",
    "learners.num_gpus_per_learner",
    "training.nll_min_reward",
    "training.value_range",
}


TURNS: dict[str, Any] = {"resources.colocate": True}


def settings(changes: dict[str, Any]) -> Settings:
    return PPOConfig.from_dict(changes).settings


def error_of(changes: dict[str, Any]) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        validate(settings(changes))
    return caught.value


def numbers_in(annotation: Any) -> set[Any]:
    return {annotation}.union(*(numbers_in(part) for part in get_args(annotation))) & NUMBERS


# --- ranges ---------------------------------------------------------------------------------------------------------

# Setting -> (values that pass, values that do not).
FIELDS = [field for field, _ in Settings()]
EDGES: dict[str, tuple[list[Any], list[Any]]] = {
    "data.batch_size": ([1], [0, -4]),
    "rollouts.num_replicas": ([1, 8], [0]),
    "rollouts.group_size": ([1], [0]),
    "rollouts.max_prompt_tokens": ([1, None], [0]),
    "rollouts.max_new_tokens": ([1], [0]),
    "rollouts.temperature": ([0.01, 2.0], [0.0, 0.005, -1.0, 2.1, math.nan, math.inf]),
    "rollouts.stop_token_ids": ([[0, 5], []], [[3, -1]]),
    "rollouts.max_concurrent_groups": ([1, None], [0]),
    "rollouts.max_paused_replicas": ([1, None], [0]),
    "rollouts.tensor_parallel_size": ([1, 2], [0]),
    "rollouts.gpu_memory_utilization": ([0.01, 1.0], [0.0, 1.01]),
    "rollouts.kv_cache_bytes": ([1, None], [0]),
    "rollouts.num_threads": ([1, None], [0]),
    "rollouts.timeout_s": ([0.1], [0.0, math.inf]),
    "rollouts.startup_timeout_s": ([0.1], [0.0]),
    "rewards.weights": ([[-2.0], [0.5], None], [[math.nan], [math.inf]]),
    "rewards.num_workers": ([1], [0]),
    "rewards.timeout_s": ([0.1], [0.0]),
    "rewards.max_failures": ([0, None], [-1]),
    "training.iterations": ([1], [0]),
    "training.lr": ([1e-9], [0.0, -1e-6, math.nan, math.inf]),
    "training.critic_lr": ([1e-9], [0.0, -1e-6]),
    "training.lr_warmup_steps": ([0], [-1]),
    "training.min_lr_ratio": ([0.0, 1.0], [-0.1, 1.1]),
    "training.weight_decay": ([0.0], [-0.1]),
    "training.adam_betas": ([(0.0, 0.0), (0.9, 0.999)], [(0.9, 1.0), (-0.1, 0.9)]),
    "training.adam_eps": ([1e-12], [0.0]),
    "training.max_grad_norm": ([0.1, None], [0.0]),
    "training.critic_max_grad_norm": ([0.1, None], [0.0]),
    "training.num_epochs": ([1], [0]),
    "training.num_minibatches": ([1], [0]),
    "training.gamma": ([0.0, 1.0], [-0.1, 1.01]),
    "training.lambda_": ([0.0, 1.0], [-0.1, 1.01]),
    "training.critic_lambda": ([0.0, 1.0], [-0.1, 1.01]),
    "training.value_bins": ([None], [1, 0]),
    "training.value_smoothing": ([0.1], [0.0]),
    "training.nll_coef": ([0.0, 1.0], [-0.1]),
    "training.lambda_alpha": ([1e-6, 100.0], [0.0, -1.0]),
    "training.clip_low": ([3e-4, 1.0], [0.0, 1.1]),
    "training.clip_high": ([0.01, 5.0], [0.0]),
    "model.lora_rank": ([0, 8], [-1]),
    "model.lora_alpha": ([0.5], [0.0]),
    "training.kl_target": ([None], [0.0]),
    "training.kl_horizon": ([1], [0]),
    "training.kl_clip": ([None], [0.0]),
    "training.value_huber": ([0.1, None], [0.0]),
    "rewards.truncated_reward": ([-1.0, 0.0, None], [math.inf]),
    "rewards.bias": ([-1.0], [math.nan]),
    "rewards.scale": ([-1.0, 10.0], [math.inf]),
    "rewards.clip": ([0.1, None], [0.0]),
    "rollouts.max_staleness": ([0, 8], [-1]),
    "rollouts.stall_timeout_s": ([0.1], [0.0]),
    "training.behavior_cap": ([1.0], [0.9]),
    "training.behavior_floor": ([0.0, 1.0, None], [-0.1, 1.1]),
    "training.m2po_threshold": ([None], [0.0]),
    "rollouts.max_dropped_groups": ([1, None], [0]),
    "training.dual_clip": ([1.01, None], [1.0, 0.5]),
    "training.value_clip": ([0.1, None], [0.0]),
    "training.entropy_coef": ([0.0], [-0.1]),
    "training.kl_coef": ([0.0], [-0.1]),
    "training.critic_warmup_iterations": ([0], [-1]),
    "training.critic_warmup_explained_variance": ([None], [1.01]),
    "training.critic_epochs": ([1, 9, None], [0, -1]),
    "training.critic_num_minibatches": ([1, None], [0, -1]),
    "learners.num_learners": ([1], [0]),
    "learners.sequence_parallel": ([1], [0]),
    "learners.max_tokens_per_microbatch": ([100], [0]),
    "learners.num_threads": ([1, None], [0]),
    "learners.startup_timeout_s": ([0.1], [0.0]),
    "learners.update_timeout_s": ([0.1], [0.0]),
    "evaluation.interval": ([0], [-1]),
    "evaluation.num_prompts": ([1, None], [0]),
    "evaluation.samples_per_prompt": ([1], [0]),
    "evaluation.temperature": ([0.0, 2.0], [-0.1, 2.1]),
    "evaluation.top_p": ([1.0], [0.0, 1.1]),
    "evaluation.pass_threshold": ([-1.0, 0.0], [math.nan, math.inf]),
    "evaluation.max_new_tokens": ([1, None], [0]),
    "checkpointing.interval": ([0], [-1]),
    "checkpointing.keep": ([1], [0]),
    "checkpointing.keep_best": ([1], [0]),
    "reporting.completions_interval": ([0], [-1]),
    "reporting.timeline_interval": ([0], [-1]),
    "fault_tolerance.max_group_retries": ([0], [-1]),
    "fault_tolerance.max_learner_restarts": ([0], [-1]),
    "fault_tolerance.state_interval": ([0, 5], [-1, 10**21, 10**400]),
    "debugging.seed": ([0, 2**32 - 1], [-1, 2**32]),
    "resources.cpus_per_replica": ([0.0, 0.5, None], [-1.0]),
    "resources.cpus_per_learner": ([0.0, None], [-1.0]),
    "resources.cpus_per_reward_worker": ([0.0, None], [-1.0]),
    "resources.cpus_per_environment_worker": ([0.0, None], [-1.0]),
    # What a run without an environment may have; others are in tests/environments/test_registry.py.
    "environment.max_turns": ([1, 8], [0]),
    "environment.max_turn_tokens": ([None], [0]),
    "environment.step_timeout_s": ([60.0], [0.0]),
    "environment.timeout_s": ([3600.0], [0.0]),
    "environment.num_workers": ([1], [0]),
    "environment.startup_timeout_s": ([300.0], [0.0]),
}


@pytest.mark.parametrize("field", EDGES)
def test_edges_of_each_range(field: str) -> None:
    inside, outside = EDGES[field]
    for value in inside:
        validate(settings({field: value}))
    for value in outside:
        error = error_of({field: value})
        assert error.field == field
        assert repr(error.value) == repr(value)
        bounds = declaration(field).metadata["bounds"]
        assert error.remedy.startswith((f"must be {bounds}", "must be a number of at most 9,007,199,254,740,992"))


def test_every_number_has_bounds_and_the_bounds_a_test() -> None:
    numeric = {
        f"{section}.{name}"
        for section in section_types()
        for name, annotation in setting_types(section).items()
        if numbers_in(annotation)
    }

    assert set(EDGES) == numeric - NOT_A_RANGE
    assert {field for field in FIELDS if declaration(field).metadata["bounds"] != Bounds()} <= numeric


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("training.lr", -1.0, "training.lr = -1.0: must be a number greater than 0"),
        ("training.gamma", 2.0, "training.gamma = 2.0: must be a number of at least 0 and at most 1"),
        ("training.clip_low", 1.1, "training.clip_low = 1.1: must be a number greater than 0 and at most 1"),
        (
            "training.max_grad_norm",
            0.0,
            "training.max_grad_norm = 0.0: must be a number greater than 0, or None (no clip)",
        ),
        ("rewards.weights", [math.inf], "rewards.weights = [inf]: must be a finite number, or None (1 each)"),
    ],
)
def test_a_range_error_reads_well(field: str, value: Any, message: str) -> None:
    assert str(error_of({field: value})) == message


# --- combinations ---------------------------------------------------------------------------------------------------

GSM8K = {"model.path": "owner/model", "data.path": "train.jsonl", "rewards.functions": ["gsm8k"]}

# Changes, field of the error, part of its remedy.
IMPOSSIBLE: list[tuple[dict[str, Any], str, str]] = [
    ({"data.path": 3, "rewards.functions": ["gsm8k"]}, "data.path", "a ray.data.Dataset"),
    ({"data.path": [], "rewards.functions": ["gsm8k"]}, "data.path", "a list of files"),
    ({**GSM8K, "data.eval_path": ["a.jsonl", 3]}, "data.eval_path", "a list of files"),
    ({"data.prompt_template": "Q: {question}"}, "data.prompt_template", "write {prompt}"),
    ({"model.path": "owner/model", "data.path": "train.jsonl"}, "rewards.functions", "gsm8k"),
    ({**GSM8K, "model.path": None}, "model.path", "no model to train on it; name a folder or a hub id"),
    ({"data.eval_path": "test.jsonl"}, "rewards.functions", ".rewards(my_reward)"),
    ({"rewards.functions": ["gsm8k", "exact_mach"]}, "rewards.functions[1]", "'exact_match'"),
    ({"rewards.functions": [{"name": "gsm9k", "last_number": True}]}, "rewards.functions[0]", "'gsm8k'"),
    ({**GSM8K, "rewards.weights": [1.0, 0.5]}, "rewards.weights", "one weight per reward function: 1"),
    ({"rewards.weights": []}, "rewards.weights", "one weight per reward function: 1"),
    ({**GSM8K, "rewards.weights": [0.0]}, "rewards.weights", "not 0"),
    ({**GSM8K, "evaluation.interval": 5}, "evaluation.interval", "set data.eval_path"),
    ({**GSM8K, "evaluation.at_start": True}, "evaluation.at_start", "or at_start to False"),
    ({**GSM8K, "evaluation.at_end": True}, "evaluation.at_end", "set data.eval_path"),
    ({"evaluation.samples_per_prompt": 4}, "evaluation.samples_per_prompt", "set evaluation.temperature"),
    ({"evaluation.top_p": 0.9}, "evaluation.top_p", "set evaluation.temperature"),
    ({"evaluation.temperature": 0.001}, "evaluation.temperature", "use 0 for greedy decoding"),
    ({**GSM8K, "data.eval_path": {"a": 3}}, "data.eval_path.a", "a hub id"),
    ({**GSM8K, "data.eval_path": {"a": {"path": "a.jsonl", "as_chat": "y"}}}, "data.eval_path.a.as_chat", "True or Fa"),
    ({**GSM8K, "data.eval_path": {"a b": "a.jsonl"}}, "data.eval_path", "letters, digits"),
    ({**GSM8K, "data.csv_types": {"n": "number"}}, "data.csv_types.n", "one of 'int', 'float', 'bool'"),
    ({**GSM8K, "data.csv_types": {"n": ["int"]}}, "data.csv_types.n", "one of 'int', 'float', 'bool'"),
    (
        {**GSM8K, "data.eval_path": {"a": {"path": "a.csv", "csv_types": {"n": "text"}}}},
        "data.eval_path.a.csv_types.n",
        "one of 'int', 'float', 'bool'",
    ),
    (
        {**GSM8K, "data.eval_path": {"a": {"path": "a.csv", "final_assistant": "keep"}}},
        "data.eval_path.a.final_assistant",
        "'continue', 'drop'",
    ),
    (
        {
            **GSM8K,
            "data.eval_path": {"easy": "a.jsonl", "hard": "b.jsonl"},
            "evaluation.interval": 5,
            "checkpointing.best_metric": "evaluation/gsm8k/reward_mean",
        },
        "checkpointing.best_metric",
        "use easy or hard",
    ),
    (
        {
            "evaluation.interval": 10,
            "checkpointing.interval": 15,
            "checkpointing.best_metric": "evaluation/quickstart/reward_mean",
        },
        "checkpointing.interval",
        "a multiple of it",
    ),
    ({"rollouts.top_p": 0.9}, "rollouts.top_p", "training needs 1.0"),
    ({"rollouts.top_k": 50}, "rollouts.top_k", "training needs 0"),
    ({"training.proximal": "loglinear", "training.kl_coef": 0.1}, "training.proximal", "kl_in='loss'"),
    ({"training.kl_clip": 10.0}, "training.kl_clip", "give training.kl_coef"),
    ({"training.kl_clip": 10.0, "training.kl_coef": 0.1, "training.kl_in": "loss"}, "training.kl_clip", "kl_in=reward"),
    ({"rollouts.partial_rollouts": True}, "rollouts.partial_rollouts", "set it to 1 or more"),
    ({"training.m2po_threshold": 0.04}, "training.m2po_threshold", "with rollouts.max_staleness=0 there is none"),
    (
        {"training.m2po_threshold": 0.04, "training.proximal": "loglinear", "rollouts.max_staleness": 1},
        "training.proximal",
        "use recompute",
    ),
    (
        {"training.proximal": "loglinear", "rollouts.quantization": "fp8"},
        "training.proximal",
        "with rollouts.quantization it is not; use recompute",
    ),
    (
        {"training.proximal": "loglinear", "rollouts.engine_args": {"kv_cache_dtype": "fp8"}},
        "training.proximal",
        "with rollouts.engine_args.kv_cache_dtype it is not",
    ),
    ({"rollouts.engine_args": {"quantization": "fp8"}}, "rollouts.engine_args.quantization", "rollouts.quantization"),
    ({"rollouts.engine_args": {"seed": 1}}, "rollouts.engine_args.seed", "set debugging.seed"),
    ({"rollouts.engine_args": {"model": "x"}}, "rollouts.engine_args.model", "set model.path"),
    ({"rollouts.engine_args": {"dtype": "half"}}, "rollouts.engine_args.dtype", "set model.dtype"),
    ({"rollouts.engine_args": {"max_model_len": 9}}, "rollouts.engine_args.max_model_len", "max_prompt_tokens"),
    ({"rollouts.engine_args": {"logprobs_mode": "raw_logprobs"}}, "rollouts.engine_args.logprobs_mode", "leave it out"),
    (
        {"rollouts.engine_args": {"tensor_parallel_size": 2}},
        "rollouts.engine_args.tensor_parallel_size",
        "set rollouts.",
    ),
    (
        {"rollouts.engine_args": {"weight_transfer_config": {}}},
        "rollouts.engine_args.weight_transfer_config",
        "set rollouts.weight_transfer",
    ),
    (
        {"data.batch_size": 2, "rollouts.group_size": 2, "training.num_minibatches": 5},
        "training.num_minibatches",
        "at most 4",
    ),
    (
        {"rollouts.max_prompt_tokens": 93, "learners.max_tokens_per_microbatch": 100},
        "learners.max_tokens_per_microbatch",
        "at least 101",
    ),
    (
        {"rollouts.max_new_tokens": 100, "learners.max_tokens_per_microbatch": 100},
        "learners.max_tokens_per_microbatch",
        "at least 101",
    ),
    (
        {
            "rollouts.max_new_tokens": 200,
            "learners.max_tokens_per_microbatch": 100,
            "learners.num_learners": 2,
            "learners.sequence_parallel": 2,
        },
        "learners.max_tokens_per_microbatch",
        "at least 101 (the longest prompt and the longest completion, shared by learners.sequence_parallel = 2 ",
    ),
    (
        {"learners.num_learners": 3, "learners.sequence_parallel": 2},
        "learners.sequence_parallel",
        "learners.num_learners = 3 is not a multiple of it",
    ),
    (
        {"training.iterations": 3, "training.critic_warmup_iterations": 3},
        "training.critic_warmup_iterations",
        "less than training.iterations (3)",
    ),
    ({"training.iterations": 3, "training.lr_warmup_steps": 13}, "training.lr_warmup_steps", "at most 12"),
    *(
        ({"model.attn_implementation": kernel, **on_cpus}, "model.attn_implementation", "needs learners on GPUs")
        for kernel in ("flash_attention_2", "flex_attention")
        for on_cpus in ({"resources.device": "cpu"}, {"learners.num_gpus_per_learner": 0})
    ),
    (
        {"model.attn_implementation": "varlength"},
        "model.attn_implementation",
        "use auto, varlen, sdpa, eager, flex_att",
    ),
    ({"model.attn_implementation": "owner/flash"}, "model.attn_implementation", "pip install kernels"),
    (
        {"model.attn_implementation": "flash_attention_2", "model.dtype": "float32"},
        "model.attn_implementation",
        "no float32 kernel",
    ),
    ({"learners.num_gpus_per_learner": 0.5}, "learners.num_gpus_per_learner", "use 0 or 1"),
    ({"learners.num_gpus_per_learner": 2}, "learners.num_gpus_per_learner", "use 0 or 1"),
    ({"learners.num_gpus_per_learner": 1, "resources.device": "cpu"}, "learners.num_gpus_per_learner", "device is cpu"),
    ({"rollouts.tensor_parallel_size": 2, "resources.device": "cpu"}, "rollouts.tensor_parallel_size", "use 1"),
    ({"rollouts.weight_transfer": "nccl", "resources.device": "cpu"}, "rollouts.weight_transfer", "needs GPUs"),
    ({"rollouts.weight_transfer": "ipc", "resources.device": "cpu"}, "rollouts.weight_transfer", "ipc needs GPUs"),
    ({"rollouts.weight_transfer": "ipc", "resources.colocate": False}, "rollouts.weight_transfer", "share it"),
    (
        {"rollouts.weight_transfer": "ipc", "rollouts.max_paused_replicas": 2},
        "rollouts.max_paused_replicas",
        "ipc sends to all replicas at once",
    ),
    (
        {"rollouts.weight_transfer": "nccl", "rollouts.max_paused_replicas": 2},
        "rollouts.max_paused_replicas",
        "to all replicas at once",
    ),
    (
        {"rollouts.weight_transfer": "nccl", "learners.num_gpus_per_learner": 0},
        "rollouts.weight_transfer",
        "learners on GPUs",
    ),
    ({**TURNS, "rollouts.max_staleness": 1}, "rollouts.max_staleness", "use 0"),
    ({**TURNS, "rollouts.tensor_parallel_size": 2}, "rollouts.tensor_parallel_size", "raise rollouts.num_replicas"),
    ({**TURNS, "rollouts.num_replicas": 3}, "rollouts.num_replicas", "learners.num_learners = 1"),
    ({**TURNS, "learners.num_gpus_per_learner": 0}, "learners.num_gpus_per_learner", "leave it out"),
    ({**TURNS, "rollouts.weight_transfer": "nccl"}, "rollouts.weight_transfer", "use auto or shared_memory"),
    ({"rollouts.engine_args": {"enable_sleep_mode": True}}, "rollouts.engine_args.enable_sleep_mode", "colocate"),
    ({"training.advantage": "grpo", "training.critic_lambda": 1.0}, "training.critic_lambda", "leave it out"),
    ({"training.advantage": "grpo", "training.critic_epochs": 2}, "training.critic_epochs", "leave it out"),
    ({"training.critic_num_minibatches": 3}, "training.critic_num_minibatches", "divisor of training.num_minibatches"),
    (
        {"training.critic_warmup_explained_variance": 0.5},
        "training.critic_warmup_explained_variance",
        "critic_warmup_iterations",
    ),
    ({"training.advantage": "turn_gae", "training.lambda_alpha": 0.05}, "training.lambda_alpha", "length_alpha"),
    ({"training.value_bins": 51}, "training.value_clip", "set it to null"),
    (
        {"training.value_bins": 51, "training.value_clip": None, "training.value_huber": 1.0},
        "training.value_huber",
        "out",
    ),
    ({"training.value_range": [1.0, 1.0]}, "training.value_range", "a larger one"),
    ({"training.advantage": "grpo", "training.value_bins": 51}, "training.value_bins", "leave it out"),
    ({"model.reference_path": "owner/teacher"}, "model.reference_path", "set training.kl_coef above 0"),
    ({"data.prompt_column": ""}, "data.prompt_column", "must not be empty"),
    ({"rollouts.stop": ["\n", ""]}, "rollouts.stop", "must not be empty"),
    ({"training.lr": {"grid_search": [1e-5, 1e-6]}}, "training.lr", "tune.Tuner(..., param_space=config)"),
]


@pytest.mark.parametrize("changes, field, remedy", IMPOSSIBLE, ids=lambda item: item if isinstance(item, str) else "")
def test_impossible_combinations(changes: dict[str, Any], field: str, remedy: str) -> None:
    error = error_of(changes)

    assert error.field == field
    assert remedy in error.remedy
    assert str(error) == f"{field} = {error.value!r}: {error.remedy}"


POSSIBLE: list[dict[str, Any]] = [
    {},
    GSM8K,
    {"model.path": "Qwen/Qwen2.5-1.5B-Instruct"},
    {"rewards.functions": [len], "rewards.weights": [2.0]},
    {**GSM8K, "data.eval_path": "test.jsonl", "evaluation.interval": 5},
    {**GSM8K, "data.path": ["a.jsonl", Path("b.jsonl")]},
    {**GSM8K, "data.prompt_template": "Q: {prompt}\nA:"},
    {**GSM8K, "data.csv_types": {"n": "int", "x": "float", "flag": "bool"}},
    {"evaluation.interval": 10},
    {"evaluation.samples_per_prompt": 8, "evaluation.temperature": 0.6, "evaluation.top_p": 0.95},
    {"evaluation.at_start": True, "evaluation.at_end": True},
    {
        **GSM8K,
        "data.eval_path": {"easy": "a.jsonl", "hard": {"path": ["b.jsonl", "c.jsonl"], "prompt_column": "problem"}},
        "evaluation.interval": 5,
        "checkpointing.best_metric": "evaluation/hard/pass_at_1",
    },
    {"rewards.functions": ["my_module:reward", "rewards.py:reward", {"name": "gsm8k", "last_number": True}]},
    {"data.batch_size": 2, "rollouts.group_size": 2, "training.num_minibatches": 4},
    {"rollouts.max_prompt_tokens": 92, "learners.max_tokens_per_microbatch": 100},
    {
        "rollouts.max_new_tokens": 199,
        "learners.max_tokens_per_microbatch": 100,
        "learners.num_learners": 4,
        "learners.sequence_parallel": 2,
    },
    {"training.iterations": 3, "training.lr_warmup_steps": 4, "training.critic_warmup_iterations": 2},
    {"model.attn_implementation": "flash_attention_2", "model.dtype": "bfloat16"},
    {"model.attn_implementation": "flex_attention", "model.dtype": "float32"},
    {"model.attn_implementation": "varlen", "resources.device": "cpu"},
    {"rollouts.weight_transfer": "nccl", "resources.device": "cuda", "learners.num_gpus_per_learner": 1},
    {"rollouts.engine_args": {"max_num_seqs": 64}},
    # What masks data of another policy has such data where engines are quantized, too.
    {"rollouts.quantization": "fp8_per_block", "training.m2po_threshold": 0.04},
    {"rollouts.engine_args": {"kv_cache_dtype": "fp8"}, "training.m2po_threshold": 0.04},
    {"rollouts.weight_transfer": "ipc", "resources.device": "cuda"},
    {**TURNS, "rollouts.num_replicas": 8, "learners.num_learners": 8},
    {**TURNS, "resources.device": "cpu"},
    {"resources.colocate": False, "rollouts.max_staleness": 1, "rollouts.num_replicas": 2},
    {"resources.colocate": "auto", "rollouts.max_staleness": 1, "rollouts.weight_transfer": "nccl"},
    {"training.kl_coef": 0.01, "training.kl_in": "loss", "training.kl_estimator": "abs"},
    {"training.kl_coef": 0.01, "training.kl_clip": 10.0},
    {"training.value_bins": 51, "training.value_clip": None, "training.value_range": [0.0, 1.0]},
    {"training.critic_warmup_iterations": 5, "training.critic_warmup_explained_variance": -1.0},
    {"training.num_minibatches": 6, "training.critic_num_minibatches": 3, "training.critic_epochs": 2},
]


@pytest.mark.parametrize("changes", POSSIBLE)
def test_possible_combinations(changes: dict[str, Any]) -> None:
    validate(settings(changes))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"rollouts.max_staleness": 1}, "rollouts.max_staleness"),
        ({"rollouts.max_staleness": 1, "rollouts.quantization": "fp8"}, "rollouts.max_staleness"),
        ({"rollouts.quantization": "fp8"}, "rollouts.quantization"),
        ({"rollouts.engine_args": {"kv_cache_dtype": "fp8"}}, "rollouts.engine_args.kv_cache_dtype"),
        ({"rollouts.engine_args": {"kv_cache_dtype": "auto"}}, None),
        ({"rollouts.quantization": "fp8", "training.behavior_weights": "none"}, None),
    ],
)
def test_a_loss_that_cannot_correct_for_another_sampler_is_refused(changes: dict[str, Any], field: str | None) -> None:
    plugin = Plugin(name="mine", required_inputs=("logprobs", "old_logprobs", "advantages", "mask"), function=len)
    if field is None:
        check_loss(plugin, settings(changes))
        return
    with pytest.raises(ConfigError, match="has no parameter behavior_weights") as caught:
        check_loss(plugin, settings(changes))
    assert caught.value.field == field


def test_a_dataset_object_is_a_data_source() -> None:
    class Rows:
        def iter_batches(self) -> None: ...
        def schema(self) -> None: ...

    validate(settings({**GSM8K, "data.path": Rows()}))


def test_settings_made_by_hand_are_type_checked_too() -> None:
    with pytest.raises(ConfigError, match=r"training\.lr = 'fast': must be a number"):
        validate(Settings(training=TrainingSettings(lr="fast")))  # type: ignore[arg-type]


# --- folders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["path", "critic_path", "tokenizer_path"])
@pytest.mark.parametrize("path", ["./missing", "../missing", "~/missing-model-folder", "/missing/model", "a/b/c"])
def test_a_missing_folder(name: str, path: str) -> None:
    error = error_of({f"model.{name}": path})

    assert error.field == f"model.{name}"
    assert "no such folder" in error.remedy
    assert "hub id" in error.remedy


@pytest.mark.parametrize(
    "name, file, wrong",
    [
        ("path", "config.json", "no config.json in"),
        ("critic_path", "config.json", "no config.json in"),
        ("tokenizer_path", "tokenizer.json", "no tokenizer_config.json or tokenizer.json in"),
    ],
)
def test_a_folder_without_its_files_is_refused_until_it_has_them(
    name: str, file: str, wrong: str, tmp_path: Path
) -> None:
    error = error_of({f"model.{name}": tmp_path})
    assert error.field == f"model.{name}"
    assert f"{wrong} {tmp_path.resolve()}" in error.remedy

    (tmp_path / file).write_text("{}")
    validate(settings({f"model.{name}": tmp_path}))


def test_a_relative_folder_that_exists_is_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    validate(settings({"model.path": "models/mine"}))  # elsewhere it is a hub id

    monkeypatch.chdir(tmp_path)

    assert "not a model folder" in error_of({"model.path": "models/mine"}).remedy


def test_a_file_is_not_a_model_folder(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.touch()

    assert "is a file" in error_of({"model.path": str(weights)}).remedy


# --- types ----------------------------------------------------------------------------------------------------------

# Field, value, remedy; all from Python.
WRONG_TYPES: list[tuple[str, Any, str]] = [
    ("training.lr", "1e-6", "must be a number"),
    ("training.lr", True, "must be a number"),
    ("training.lr", None, "must be a number"),
    ("training.iterations", 3.0, "must be an integer"),
    ("training.iterations", True, "must be an integer"),
    ("training.iterations", "3", "must be an integer"),
    ("training.max_grad_norm", "off", "must be a number or None"),
    ("training.whiten_advantages", 1, "must be True or False"),
    ("training.kl_in", "rewards", "must be one of 'reward', 'loss'"),
    ("training.kl_estimator", ["k1"], "must be one of 'k1', 'k2', 'k3', 'abs'"),
    ("training.adam_betas", (0.9,), "must be 2 items, each a number"),
    ("training.adam_betas", 0.9, "must be 2 items, each a number"),
    ("rollouts.stop", "###", "must be a list, each item a string"),
    ("rollouts.stop_token_ids", ["7"], "must be a list, each item an integer"),
    ("rollouts.engine_args", [1], "must be a mapping with string keys"),
    ("rollouts.engine_args", {1: 2}, "must be a mapping with string keys"),
    ("rewards.functions", [3], "must be a list, each item a string or a function or a mapping with string keys"),
    ("rewards.weights", 1.0, "must be a list, each item a number or None"),
    ("model.path", 7, "must be a string or None"),
    ("data.split", None, "must be a string"),
    ("callbacks.on_train_result", 3, "must be a function or None"),
]


@pytest.mark.parametrize("field, value, remedy", WRONG_TYPES)
def test_wrong_types_from_python(field: str, value: Any, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        typed_value(field, value)

    assert (caught.value.field, caught.value.value, caught.value.remedy) == (field, value, remedy)


@pytest.mark.parametrize(
    "field, value, remedy",
    [
        ("training.lr", "fast", "must be a number"),
        ("training.lr", "nan", "must be a number"),
        ("training.iterations", "3", "must be an integer"),
        ("training.dual_clip", "None", "must be a number or null"),
        ("data.path", "None", "must be a value or null"),
        ("model.path", "None", "must be a string (in quotes if YAML reads it otherwise) or null"),
        ("reporting.run_dir", 2024, "must be a string (in quotes if YAML reads it otherwise) or null"),
        ("data.shuffle", "true", "must be true or false"),
    ],
)
def test_wrong_types_from_text(field: str, value: Any, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        typed_value(field, value, from_text=True)

    assert caught.value.remedy == remedy


@pytest.mark.parametrize(
    "field, given, held",
    [
        ("training.lr", 1, 1.0),
        ("training.adam_betas", [0, 0.5], (0.0, 0.5)),
        ("rewards.weights", (1, 2), [1.0, 2.0]),
        ("model.path", Path("models/mine"), "models/mine"),
        ("data.path", Path("rows.jsonl"), "rows.jsonl"),
        ("data.path", (Path("a.jsonl"), "b.jsonl"), ["a.jsonl", "b.jsonl"]),
        ("rewards.functions", ("gsm8k", len), ["gsm8k", len]),
    ],
)
def test_values_are_held_in_one_form(field: str, given: Any, held: Any) -> None:
    value = typed_value(field, given)

    assert value == held
    assert type(value) is type(held)
    if isinstance(held, float):
        assert isinstance(value, float)


def test_numpy_scalars_are_numbers() -> None:
    numpy = pytest.importorskip("numpy")

    assert type(typed_value("training.iterations", numpy.int64(3))) is int
    assert type(typed_value("training.lr", numpy.float32(0.5))) is float


@pytest.mark.parametrize("text", ["1e-6", "+1E-6", ".5", "2", "2.", "-3.5e+2"])
def test_a_quoted_number_in_text_is_a_float(text: str) -> None:
    assert typed_value("training.lr", text, from_text=True) == float(text)


def test_containers_are_copied() -> None:
    given: dict[str, Any] = {"compilation_config": {"sizes": [1]}}

    held = typed_value("rollouts.engine_args", given)
    given["compilation_config"]["sizes"].append(2)

    assert held == {"compilation_config": {"sizes": [1]}}


def test_every_setting_has_a_meaning() -> None:
    for section in section_types().values():
        assert all(item.metadata["meaning"] for item in fields(section))


def test_a_search_domain_of_ray_tune_passes_the_type_check_only() -> None:
    domain: Callable[..., Any] = pytest.importorskip("ray.tune").loguniform
    space = domain(1e-6, 1e-4)

    assert typed_value("training.lr", space) is space
    assert "tune.Tuner" in error_of({"training.lr": space}).remedy
