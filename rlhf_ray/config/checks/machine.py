"""Combinations that cannot work on a machine: devices, packages, placement, and the folders of models."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from rlhf_ray.config.local_path import looks_local
from rlhf_ray.config.settings import Settings

__all__ = ["COMBINATIONS", "attention_device_problems"]

_ON_ANY_DEVICE: Final = ("auto", "varlen", "sdpa", "eager")
_ON_GPUS: Final = ("flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4")
_OF_THE_HUB: Final = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?(:\w+)?")
_ATTENTION: Final = "model.attn_implementation"


def attention_problems(settings: Settings) -> Iterator[tuple[str, str]]:
    """The attention exists, and has the device and the dtype that it needs."""
    kernel, choices = settings.model.attn_implementation, (*_ON_ANY_DEVICE, *_ON_GPUS)
    is_of_the_hub = _OF_THE_HUB.fullmatch(kernel) is not None
    if not is_of_the_hub and kernel not in choices:
        yield _ATTENTION, f"use {', '.join(choices)}, or a kernel of the hub such as kernels-community/flash-attn2"
    if is_of_the_hub and find_spec("kernels") is None:
        yield _ATTENTION, "needs the package kernels: pip install kernels"
    on_cpus = settings.resources.device == "cpu" or settings.learners.num_gpus_per_learner == 0
    yield from attention_device_problems(kernel, on_gpu=not on_cpus, dtype=settings.model.dtype)


def attention_device_problems(kernel: str, *, on_gpu: bool, dtype: str) -> Iterator[tuple[str, str]]:
    """The learners can compute the attention."""
    if kernel not in _ON_ANY_DEVICE and not on_gpu:
        yield _ATTENTION, "needs learners on GPUs; use auto, varlen or sdpa"
    if "flash" in kernel and dtype == "float32":
        yield (
            _ATTENTION,
            "flash attention has no float32 kernel; set model.dtype to bfloat16, or use auto, varlen or sdpa",
        )


def lora_problems(settings: Settings) -> Iterator[tuple[str, str]]:
    """LoRA has a rank and its package."""
    if settings.model.lora_rank == 0 and settings.model.lora_targets:
        yield "model.lora_targets", "set model.lora_rank, or leave the targets out"
    if settings.model.lora_rank > 0 and find_spec("peft") is None:
        yield "model.lora_rank", "needs the package peft: pip install 'rlhf-ray[lora]'"


def gpu_problems(settings: Settings) -> Iterator[tuple[str, str]]:
    """Learners and replicas divide what GPUs there are, and weights can go from the ones to the others."""
    learners, rollouts, on_cpus = settings.learners, settings.rollouts, settings.resources.device == "cpu"
    if learners.num_gpus_per_learner not in (None, 0, 1):
        yield (
            "learners.num_gpus_per_learner",
            "use 0 or 1: a learner is one FSDP2 rank, and a rank drives one GPU; raise learners.num_learners",
        )
    if learners.num_gpus_per_learner and on_cpus:
        yield "learners.num_gpus_per_learner", "use 0 or None, since resources.device is cpu"
    if learners.num_learners % learners.sequence_parallel:
        yield (
            "learners.sequence_parallel",
            f"learners.num_learners = {learners.num_learners} is not a multiple of it; change one of the two",
        )
    if rollouts.tensor_parallel_size > 1 and on_cpus:
        yield (
            "rollouts.tensor_parallel_size",
            "use 1, since resources.device is cpu; raise rollouts.num_replicas",
        )
    transfer = rollouts.weight_transfer
    if transfer not in ("nccl", "ipc"):
        return
    if on_cpus:
        yield "rollouts.weight_transfer", f"{transfer} needs GPUs; use auto or shared_memory"
    if learners.num_gpus_per_learner == 0:
        yield (
            "rollouts.weight_transfer",
            f"{transfer} needs learners on GPUs; use auto, or set learners.num_gpus_per_learner to 1",
        )
    if transfer == "ipc" and settings.resources.colocate is False:
        yield (
            "rollouts.weight_transfer",
            "weights stay on a GPU only where a learner and a replica share it (resources.colocate); use auto",
        )
    if rollouts.max_paused_replicas is not None:
        yield (
            "rollouts.max_paused_replicas",
            f"{transfer} sends to all replicas at once; use None, or rollouts.weight_transfer shared_memory",
        )


def colocation_problems(settings: Settings) -> Iterator[tuple[str, str]]:
    """One replica and one learner take turns on each GPU, and publish through the memory of their machine."""
    if settings.resources.colocate is not True:
        return
    rollouts, learners, found = settings.rollouts, settings.learners, {}
    if rollouts.max_staleness > 0:
        found["rollouts.max_staleness"] = (
            "replicas and learners take turns, and none samples while another trains; use 0"
        )
    if rollouts.tensor_parallel_size > 1:
        found["rollouts.tensor_parallel_size"] = "a replica has one GPU; use 1 and raise rollouts.num_replicas"
    if rollouts.num_replicas != learners.num_learners:
        found["rollouts.num_replicas"] = (
            f"each GPU has one replica and one learner; set it to learners.num_learners = {learners.num_learners}"
        )
    if learners.num_gpus_per_learner == 0:
        found["learners.num_gpus_per_learner"] = "learners are on the replicas' GPUs; leave it out"
    if rollouts.weight_transfer == "nccl":
        found["rollouts.weight_transfer"] = (
            "two processes share each GPU, which NCCL refuses; use auto or shared_memory"
        )
    for field, remedy in found.items():
        yield field, f"with resources.colocate = true {remedy}, or set resources.colocate = false"


_FOLDERS: Final = {
    "model.path": ("model", ("config.json",)),
    "model.critic_path": ("model", ("config.json",)),
    "model.reference_path": ("model", ("config.json",)),
    "model.tokenizer_path": ("tokenizer", ("tokenizer_config.json", "tokenizer.json")),
}


def folder_problems(settings: Settings) -> Iterator[tuple[str, str]]:
    """A folder that is named holds a model, or a tokenizer."""
    for field, (kind, files) in _FOLDERS.items():
        path = settings[field]
        folder = Path(path or "").expanduser()
        if path is None or not (folder.exists() or looks_local(path)):
            continue
        if not folder.is_dir():
            reason = "is a file" if folder.exists() else "no such folder"
            yield field, f"{reason}; give the {kind}'s folder or a hub id such as owner/name"
        elif not any((folder / file).is_file() for file in files):
            yield field, f"not a {kind} folder: no {' or '.join(files)} in {folder.resolve()}"


COMBINATIONS = (attention_problems, lora_problems, gpu_problems, colocation_problems, folder_problems)
