"""Before the loop: what the machine must have for the settings: GPUs, packages and the folders of models."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from rlhf_ray.config.settings import Settings
from rlhf_ray.errors import ConfigError
from rlhf_ray.models.path import looks_local

__all__ = [
    "check_attention",
    "check_attention_device",
    "check_colocation",
    "check_learner_gpus",
    "check_lora",
    "check_model_folders",
    "check_sequence_parallel",
    "check_tensor_parallel",
    "check_weight_transfer",
]


_ON_ANY_DEVICE: Final = ("auto", "varlen", "sdpa", "eager")
_ON_GPUS: Final = ("flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4")
_OF_THE_HUB: Final = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?(:\w+)?")


def check_attention(settings: Settings) -> None:
    """The attention exists, and has the device and the dtype that it needs."""
    kernel = settings.model.attn_implementation
    is_of_the_hub = _OF_THE_HUB.fullmatch(kernel) is not None
    if not (is_of_the_hub or kernel in _ON_ANY_DEVICE or kernel in _ON_GPUS):
        choices = ", ".join((*_ON_ANY_DEVICE, *_ON_GPUS))
        remedy = f"use {choices}, or a kernel of the hub such as kernels-community/flash-attn2"
        raise ConfigError("model.attn_implementation", kernel, remedy)
    if is_of_the_hub and find_spec("kernels") is None:
        raise ConfigError("model.attn_implementation", kernel, "needs the package kernels: pip install kernels")
    on_cpus = settings.resources.device == "cpu" or settings.learners.num_gpus_per_learner == 0
    check_attention_device(kernel, on_gpu=not on_cpus, dtype=settings.model.dtype)


def check_attention_device(kernel: str, *, on_gpu: bool, dtype: str) -> None:
    """The learners can compute an attention: again when it is known what ``auto`` means.

    Raises:
        ConfigError: They cannot.
    """
    if kernel in _ON_ANY_DEVICE:
        return
    if not on_gpu:
        raise ConfigError("model.attn_implementation", kernel, "needs learners on GPUs; use auto, varlen or sdpa")
    if dtype == "float32" and "flash" in kernel:
        remedy = "flash attention has no float32 kernel; set model.dtype to bfloat16, or use auto, varlen or sdpa"
        raise ConfigError("model.attn_implementation", kernel, remedy)


def check_lora(settings: Settings) -> None:
    """LoRA has a rank and its package."""
    model = settings.model
    if model.lora_rank == 0 and model.lora_targets:
        raise ConfigError("model.lora_targets", model.lora_targets, "set model.lora_rank, or leave the targets out")
    if model.lora_rank > 0 and find_spec("peft") is None:
        raise ConfigError("model.lora_rank", model.lora_rank, "needs the package peft: pip install 'rlhf-ray[lora]'")


def check_learner_gpus(settings: Settings) -> None:
    """A learner drives one GPU, where there are any."""
    gpus = settings.learners.num_gpus_per_learner
    if gpus not in (None, 0, 1):
        remedy = "use 0 or 1: a learner is one FSDP2 rank, and a rank drives one GPU; raise learners.num_learners"
        raise ConfigError("learners.num_gpus_per_learner", gpus, remedy)
    if gpus and settings.resources.device == "cpu":
        remedy = "use 0 or None, since resources.device is cpu"
        raise ConfigError("learners.num_gpus_per_learner", gpus, remedy)


def check_sequence_parallel(settings: Settings) -> None:
    """Learners can be divided into groups that read the same sequences."""
    size, count = settings.learners.sequence_parallel, settings.learners.num_learners
    if count % size:
        remedy = f"learners.num_learners = {count} is not a multiple of it; change one of the two"
        raise ConfigError("learners.sequence_parallel", size, remedy)


def check_tensor_parallel(settings: Settings) -> None:
    """Only GPUs are split over."""
    size = settings.rollouts.tensor_parallel_size
    if size > 1 and settings.resources.device == "cpu":
        remedy = "use 1, since resources.device is cpu; raise rollouts.num_replicas"
        raise ConfigError("rollouts.tensor_parallel_size", size, remedy)


def check_weight_transfer(settings: Settings) -> None:
    """NCCL and ipc have GPUs at both ends and send to all replicas at once."""
    transfer = settings.rollouts.weight_transfer
    if transfer not in ("nccl", "ipc"):
        return
    if settings.resources.device == "cpu":
        raise ConfigError("rollouts.weight_transfer", transfer, f"{transfer} needs GPUs; use auto or shared_memory")
    if settings.learners.num_gpus_per_learner == 0:
        remedy = f"{transfer} needs learners on GPUs; use auto, or set learners.num_gpus_per_learner to 1"
        raise ConfigError("rollouts.weight_transfer", transfer, remedy)
    if transfer == "ipc" and settings.resources.colocate is False:
        remedy = "weights stay on a GPU only where a learner and a replica share it (resources.colocate); use auto"
        raise ConfigError("rollouts.weight_transfer", transfer, remedy)
    if settings.rollouts.max_paused_replicas is not None:
        remedy = f"{transfer} sends to all replicas at once; use None, or rollouts.weight_transfer shared_memory"
        raise ConfigError("rollouts.max_paused_replicas", settings.rollouts.max_paused_replicas, remedy)


def check_colocation(settings: Settings) -> None:
    """One replica and one learner take turns on each GPU, and publish through the memory of their machine."""
    if settings.resources.colocate is not True:
        return
    rollouts, learners = settings.rollouts, settings.learners

    def refuse(field: str, value: object, remedy: str) -> ConfigError:
        return ConfigError(field, value, f"with resources.colocate = true {remedy}, or set resources.colocate = false")

    if rollouts.max_staleness > 0:
        remedy = "replicas and learners take turns, and none samples while another trains; use 0"
        raise refuse("rollouts.max_staleness", rollouts.max_staleness, remedy)
    if rollouts.tensor_parallel_size > 1:
        remedy = "a replica has one GPU; use 1 and raise rollouts.num_replicas"
        raise refuse("rollouts.tensor_parallel_size", rollouts.tensor_parallel_size, remedy)
    if rollouts.num_replicas != learners.num_learners:
        remedy = f"each GPU has one replica and one learner; set it to learners.num_learners = {learners.num_learners}"
        raise refuse("rollouts.num_replicas", rollouts.num_replicas, remedy)
    if learners.num_gpus_per_learner == 0:
        raise refuse("learners.num_gpus_per_learner", 0, "learners are on the replicas' GPUs; leave it out")
    if rollouts.weight_transfer == "nccl":
        remedy = "two processes share each GPU, which NCCL refuses; use auto or shared_memory"
        raise refuse("rollouts.weight_transfer", "nccl", remedy)


_CONFIG_FILES: Final = ("config.json",)
_TOKENIZER_FILES: Final = ("tokenizer_config.json", "tokenizer.json")


def check_model_folders(settings: Settings) -> None:
    """A folder that is named holds a model, or a tokenizer."""
    model = settings.model
    _check_folder("model.path", model.path, "model", _CONFIG_FILES)
    _check_folder("model.critic_path", model.critic_path, "model", _CONFIG_FILES)
    _check_folder("model.tokenizer_path", model.tokenizer_path, "tokenizer", _TOKENIZER_FILES)


def _check_folder(field: str, path: str | None, kind: str, files: tuple[str, ...]) -> None:
    if path is None:
        return
    folder = Path(path).expanduser()
    if not (folder.exists() or looks_local(path)):
        return
    if not folder.is_dir():
        reason = "is a file" if folder.exists() else "no such folder"
        raise ConfigError(field, path, f"{reason}; give the {kind}'s folder or a hub id such as owner/name")
    if not any((folder / file).is_file() for file in files):
        raise ConfigError(field, path, f"not a {kind} folder: no {' or '.join(files)} in {folder.resolve()}")
