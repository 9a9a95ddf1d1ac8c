"""Before the loop: settings that cannot go together in ``rollouts``, and sampling that cannot be trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from rlhf_ray.config.settings import Settings
from rlhf_ray.errors import ConfigError

__all__ = ["check_dynamic_sampling", "check_engine_args", "check_off_policy", "check_trainable_sampling"]


_FIXED_ENGINE_ARGS: Final[Mapping[str, str]] = {
    "model": "set model.path",
    "tokenizer": "set model.tokenizer_path",
    "dtype": "set model.dtype",
    "trust_remote_code": "set model.trust_remote_code",
    "tensor_parallel_size": "set rollouts.tensor_parallel_size",
    "data_parallel_size": "set rollouts.num_replicas",
    "gpu_memory_utilization": "set rollouts.gpu_memory_utilization",
    "kv_cache_memory_bytes": "set rollouts.kv_cache_bytes",
    "enforce_eager": "set rollouts.enforce_eager",
    "enable_sleep_mode": "set resources.colocate",
    "max_model_len": "set rollouts.max_prompt_tokens and rollouts.max_new_tokens, which it follows from",
    "seed": "set debugging.seed, which the seed of every completion follows from",
    "weight_transfer_config": "set rollouts.weight_transfer",
    "quantization": "set rollouts.quantization",
    "worker_extension_cls": "leave it out; the weight transfer needs it",
    "logprobs_mode": "leave it out; the learner needs the log-probabilities of the distribution sampled from",
    "skip_tokenizer_init": "leave it out; prompts and completions are token ids already",
}


def check_trainable_sampling(settings: Settings) -> None:
    """Training samples from the full distribution."""
    why = "the learner recomputes log-probabilities over the full distribution"
    if settings.rollouts.top_p != 1.0:
        raise ConfigError("rollouts.top_p", settings.rollouts.top_p, f"training needs 1.0: {why}")
    if settings.rollouts.top_k != 0:
        raise ConfigError("rollouts.top_k", settings.rollouts.top_k, f"training needs 0: {why}")


def check_off_policy(settings: Settings) -> None:
    """What corrects or masks data of another policy has such data, and the forward pass it needs."""
    training, quantized_by = settings.training, settings.rollouts.quantized_by
    if settings.rollouts.partial_rollouts and settings.rollouts.max_staleness == 0:
        remedy = "with rollouts.max_staleness=0 nothing that is carried over may be trained on; set it to 1 or more"
        raise ConfigError("rollouts.partial_rollouts", True, remedy)
    if training.proximal == "loglinear" and training.kl_coef > 0 and training.kl_in == "reward":
        remedy = "a KL in the reward needs the forward pass that this saves; use recompute, or kl_in='loss'"
        raise ConfigError("training.proximal", training.proximal, remedy)
    if training.m2po_threshold is not None and training.proximal == "loglinear":
        remedy = "m2po_threshold needs the forward pass that this saves; use recompute"
        raise ConfigError("training.proximal", training.proximal, remedy)
    if training.proximal == "loglinear" and quantized_by is not None:
        remedy = f"it takes the sampling policy for an earlier version; with {quantized_by[0]} it is not; use recompute"
        raise ConfigError("training.proximal", training.proximal, remedy)
    if training.m2po_threshold is not None and not settings.rollouts.is_off_policy:
        remedy = "it masks stale data, and with rollouts.max_staleness=0 there is none; leave it out"
        raise ConfigError("training.m2po_threshold", training.m2po_threshold, remedy)


def check_engine_args(settings: Settings) -> None:
    """Engine arguments leave alone what other settings decide."""
    for name, value in settings.rollouts.engine_args.items():
        if name in _FIXED_ENGINE_ARGS:
            raise ConfigError(f"rollouts.engine_args.{name}", value, _FIXED_ENGINE_ARGS[name])


def check_dynamic_sampling(settings: Settings) -> None:
    """A group that is kept for its differences has more than one completion."""
    if settings.rollouts.dynamic_sampling and settings.rollouts.group_size < 2:
        remedy = "rollouts.dynamic_sampling compares the rewards of a group, and one is always equal; use at least 2"
        raise ConfigError("rollouts.group_size", settings.rollouts.group_size, remedy)
