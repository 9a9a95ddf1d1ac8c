"""The memory and disk space that models, optimizers and caches will take, compared with what is available.

Training keeps float32 weights (4 bytes per parameter), gradients (4) and Adam's two moments (8), for the policy and for
the critic, sharded over the learners; a reference is weights alone. Host memory has two copies of weights and moments
(``fault_tolerance.state_interval``). Where replicas and learners share GPUs (``resources.colocate``), weights and
moments have a further copy there while engines sample, and an engine's weights while learners update. What a pass holds
besides, gathered layers and activations, is an estimate.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_ray.config.local_path import absolute_if_local, looks_local
from rlhf_ray.config.settings import Settings
from rlhf_ray.doctor.check import Check, in_units
from rlhf_ray.doctor.machine import Machine
from rlhf_ray.errors import ConfigError
from rlhf_ray.models.config import kv_token_bytes, load_model_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["RESIDUE_BYTES", "MemoryNeed", "ModelFacts", "check_disk", "check_memory", "check_model", "count_parameters"]


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is known of a model before it is loaded."""

    path: str
    num_parameters: int
    config: PretrainedConfig


def check_model(
    field: str, path: str, *, tokenizer_path: str | None = None, trust_remote_code: bool = False
) -> tuple[Check, ModelFacts | None]:
    """Read a model's configuration, tokenizer and the headers of its weights.

    Args:
        field: The setting that names it, for the report.
        path: Local folder or hub id.
        tokenizer_path: Where its tokenizer is; ``None``: no tokenizer is needed.
        trust_remote_code: Whether to run code that ships with the model.

    Returns:
        The check, and what was read where that worked.
    """
    remedy = f"give {field} a Hugging Face model folder or a hub id"
    if looks_local(path) and not Path(path).expanduser().is_dir():
        return Check(field, "fail", f"{path}: no such folder", remedy), None
    from rlhf_ray.prompts.tokenizer import load_tokenizer

    try:
        # As the run itself names it: transformers takes ~ for the name of a folder.
        read_from = absolute_if_local(path)
        config = load_model_config(field, read_from, trust_remote_code=trust_remote_code)
        num_parameters = count_parameters(read_from, config, trust_remote_code=trust_remote_code)
        if tokenizer_path is not None:
            load_tokenizer(tokenizer_path, trust_remote_code=trust_remote_code)
    except ConfigError as error:
        return Check(field, "fail", f"{path}: {error.remedy}", f"correct {error.field}"), None
    except Exception as error:
        # transformers has no common error for "this is not a model": each kind of damage raises its own.
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        return Check(field, "fail", f"{path}: {reason}", remedy), None
    kind = (config.architectures or [config.model_type])[0]
    size = f"{num_parameters / 1e9:.2f}B" if num_parameters >= 1e9 else f"{num_parameters / 1e6:.2f}M"
    facts = ModelFacts(read_from, num_parameters, config)
    return Check(field, "ok", f"{path}: {kind}, {size} parameters"), facts


def count_parameters(path: str, config: PretrainedConfig, *, trust_remote_code: bool = False) -> int:
    """Count a model's parameters, from the headers of local safetensors files, else from its architecture.

    Raises:
        ValueError: A weights file is missing, cut short, or not what its name says.
    """
    folder = Path(path).expanduser()
    if files := _weight_files(folder):
        return sum(_parameters_in(file) for file in files)
    if folder.is_dir() and not any(folder.glob("pytorch_model*.bin")):
        raise ValueError("the folder holds no weights (*.safetensors)")
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return int(model.num_parameters())


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    if missing := sorted(name for name in names if not (folder / name).is_file()):
        raise ValueError(f"{index.name} names {missing[0]}, which is not there ({len(missing)} missing)")
    return [folder / name for name in sorted(names)]


def _parameters_in(file: Path) -> int:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as tensors:
            return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file.name} is cut short, or no safetensors file (a Git LFS pointer?): {error}") from None


_GIB = 1024**3

_TRAINED_BYTES = 16

_WEIGHT_BYTES = 4

_SAVED_BYTES = 12

"""A checkpoint: weights and Adam's moments."""

_COPIES = 2

# Resident size of a process with torch and transformers, and of vLLM's two processes, before any weights.
_LEARNER_PROCESS_BYTES = int(0.7 * _GIB)

_ENGINE_PROCESSES_BYTES = int(1.3 * _GIB)

_DRIVER_AND_RAY_BYTES = int(1.5 * _GIB)

_LOGS_BYTES = _GIB // 4

# What a process leaves on a GPU while another one has its turn: context, libraries, captured graphs. An estimate.
RESIDUE_BYTES = int(1.5 * _GIB)

# Of chunks of logits, and of what else is allocated for moments.
_CHUNK_BYTES = 2 * _GIB


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryNeed:
    """Bytes that a run's models take, without activations and processes."""

    learner: int
    """Policy, critic, optimizers and reference, per learner."""
    offloaded: int
    """What of it a learner on a GPU keeps in CPU memory."""
    working: int
    """An estimate of gathered layers and activations of a microbatch, per learner."""
    away: int
    """What of it is in CPU memory while an engine on the same GPU has its turn."""
    copies: int
    """Kept copies of a learner's state, in CPU memory."""
    engine_weights: int
    """An engine's weights, per GPU of it."""
    sequence: int
    """Key-value cache of one longest sequence, per GPU of the engine; 0 where it does not grow with the sequence."""
    cpu_cache: int
    """Key-value cache that a CPU engine reserves."""

    @classmethod
    def of(
        cls,
        settings: Settings,
        policy: ModelFacts,
        critic: ModelFacts | None,
        *,
        dtype_bytes: int,
        max_tokens: int,
        cpu_cache: int = 0,
    ) -> MemoryNeed:
        """Work out the need.

        Args:
            settings: The run's settings.
            policy: The model to train.
            critic: The model that the critic starts from; ``None``: there is no critic.
            dtype_bytes: Bytes of a weight in the type that is computed in.
            max_tokens: Longest prompt and completion together.
            cpu_cache: Key-value cache that a CPU engine will reserve.
        """
        # The frozen weights serve as the reference too.
        lora, learners = settings.model.lora_rank > 0, settings.learners
        # Adapters are small compared with the weights, which are then frozen.
        num_trained = _parameters(critic) + (0 if lora else policy.num_parameters)
        trained = _TRAINED_BYTES * num_trained
        copies = _COPIES * _SAVED_BYTES * num_trained if settings.fault_tolerance.keeps_state else 0
        reference = dtype_bytes * policy.num_parameters if settings.training.kl_coef > 0 and not lora else 0
        base = _WEIGHT_BYTES * policy.num_parameters if lora else 0
        # Gradients are kept by an optimizer that is there anyway.
        asleep = trained if learners.offload_optimizer else _SAVED_BYTES * num_trained
        offloaded = (trained + base) * learners.offload_optimizer + reference * learners.offload_reference
        shards = settings.rollouts.tensor_parallel_size
        return cls(
            learner=(trained + base + reference) // learners.num_learners,
            offloaded=offloaded // learners.num_learners,
            working=_working(policy, learners.max_tokens_per_microbatch, dtype_bytes, learners.gradient_checkpointing),
            away=(asleep + base + reference) // learners.num_learners,
            copies=copies // learners.num_learners,
            engine_weights=dtype_bytes * policy.num_parameters // shards,
            sequence=max_tokens * (kv_token_bytes(policy.config, dtype_bytes) or 0) // shards,
            cpu_cache=cpu_cache,
        )


def _working(model: ModelFacts, tokens: int, dtype_bytes: int, recomputed: bool) -> int:
    """Estimate what a forward and backward pass over ``tokens`` holds besides weights, gradients and moments.

    Two layers are gathered, and the gradient of one. With activations recomputed, each layer leaves its input, and one
    has all of its own: about ten times the width and three times that of its feed-forward part per token.
    """
    config = model.config.get_text_config()
    width, layers = config.hidden_size, config.num_hidden_layers
    inner = getattr(config, "intermediate_size", None) or 4 * width
    layer = tokens * (10 * width + 3 * inner) * dtype_bytes
    activations: int = tokens * width * layers * dtype_bytes + layer if recomputed else layers * layer
    head = (config.vocab_size or 0) * width
    gathered: int = (
        3 * dtype_bytes * max(0, model.num_parameters - head) // layers + (dtype_bytes + _WEIGHT_BYTES) * head
    )
    return activations + gathered + _CHUNK_BYTES


def check_memory(
    settings: Settings, machine: Machine, need: MemoryNeed, *, on_gpu: bool, colocated: bool
) -> Iterator[Check]:
    """Compare the need with this machine; a cluster's nodes are taken to be like it.

    Args:
        settings: The run's settings.
        machine: This machine.
        need: What models take.
        on_gpu: Whether engines run on GPUs.
        colocated: Whether each learner takes turns with an engine, on one GPU.
    """
    learners_on_gpu = on_gpu and settings.learners.num_gpus_per_learner != 0
    if learners_on_gpu:
        yield _learner_gpu(machine, need, colocated=colocated)
    if on_gpu:
        yield _engine_gpu(settings, machine, need, colocated=colocated)
    learner = need.away if colocated else need.offloaded if learners_on_gpu else need.learner
    engine = need.engine_weights + need.cpu_cache if not on_gpu else need.engine_weights if colocated else 0
    yield _cpu_memory(settings, machine, need, learner=learner, engine=engine)


def check_disk(settings: Settings, policy: ModelFacts, critic: ModelFacts | None) -> Check:
    """Compare the space of the run directory's disk with the checkpoints and the exported model."""
    wanted = Path(settings.reporting.run_dir or "runs").expanduser().absolute()
    existing = next(folder for folder in (wanted, *wanted.parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    checkpointing, kept = settings.checkpointing, 0
    if checkpointing.interval and checkpointing.path is None:
        # The newest is written before the oldest is deleted.
        kept = checkpointing.keep + 1 + (0 if checkpointing.best_metric is None else checkpointing.keep_best)
    checkpoint = _SAVED_BYTES * (policy.num_parameters + _parameters(critic))
    needed = _LOGS_BYTES + kept * checkpoint + _WEIGHT_BYTES * policy.num_parameters
    detail = f"{in_units(free)} free at {existing}"
    if free < needed:
        text = f"{detail}, wants {in_units(needed)} for {kept} checkpoints, the model and logs"
        return Check("disk", "fail", text, "choose another reporting.run_dir, or a smaller checkpointing.keep")
    return Check("disk", "ok", f"{detail}, the run takes about {in_units(needed)}")


def _parameters(model: ModelFacts | None) -> int:
    return 0 if model is None else model.num_parameters


def _cpu_memory(settings: Settings, machine: Machine, need: MemoryNeed, *, learner: int, engine: int = 0) -> Check:
    """Compare what learners and engines have in CPU memory with what is free."""
    learners, replicas = settings.learners.num_learners, settings.rollouts.num_replicas
    processes = learners * _LEARNER_PROCESS_BYTES + replicas * _ENGINE_PROCESSES_BYTES + _DRIVER_AND_RAY_BYTES
    total = learners * (learner + need.copies) + replicas * engine + processes
    parts = [f"learners {in_units(learners * learner)}"]
    if need.copies:
        parts.append(f"copies of their state {in_units(learners * need.copies)}")
    if engine:
        cache = f" with cache {in_units(need.cpu_cache)} each" if need.cpu_cache else ""
        parts.append(f"engines {in_units(replicas * engine)}{cache}")
    parts.append(f"programs {in_units(processes)}")
    detail = f"{in_units(total)} ({', '.join(parts)}), {in_units(machine.available_bytes)} free"
    if settings.resources.ray_address is not None:
        return Check("memory", "ok", f"{detail} here; the cluster's nodes share it")
    if total > machine.available_bytes:
        remedy = "use a smaller model, fewer replicas" + ", less rollouts.kv_cache_bytes" * (need.cpu_cache > 0)
        if need.copies:
            remedy += ", or turn copies off: fault_tolerance.state_interval=0"
        return Check("memory", "fail", detail, remedy)
    if total > 0.8 * machine.available_bytes:
        return Check("memory", "warn", detail, "activations may not fit: lower learners.max_tokens_per_microbatch")
    return Check("memory", "ok", detail)


def _learner_gpu(machine: Machine, need: MemoryNeed, *, colocated: bool) -> Check:
    name = "learner memory"
    on_gpu = need.learner - need.offloaded
    detail = f"{in_units(on_gpu)} per GPU for weights, gradients and Adam, about {in_units(need.working)} to compute"
    if not machine.gpu_bytes:
        return Check(name, "ok", f"{detail}; no GPU here to compare with")
    size = machine.gpu_bytes - RESIDUE_BYTES * colocated
    detail = f"{detail}, of {in_units(size)}"
    if on_gpu > size:
        enough = -(-on_gpu // max(1, size - need.working)) if size > need.working else -(-2 * on_gpu // size)
        remedy = f"shard over more GPUs (learners.num_learners times {enough}) or set learners.offload_optimizer"
        return Check(name, "fail", detail, remedy)
    if on_gpu + need.working > size:
        remedy = "may not fit: more num_learners, gradient_checkpointing, or a smaller max_tokens_per_microbatch"
        return Check(name, "warn", detail, remedy)
    return Check(name, "ok", detail)


def _engine_gpu(settings: Settings, machine: Machine, need: MemoryNeed, *, colocated: bool) -> Check:
    name = "engine memory"
    weights = f"{in_units(need.engine_weights)} of weights per GPU"
    if not machine.gpu_bytes:
        return Check(name, "ok", f"{weights}; no GPU here to compare with")
    share = int(settings.rollouts.gpu_memory_utilization * machine.gpu_bytes)
    detail = f"{weights}, of {in_units(share)}"
    if colocated and share + RESIDUE_BYTES > machine.gpu_bytes:
        remedy = f"lower rollouts.gpu_memory_utilization: a sleeping learner leaves about {in_units(RESIDUE_BYTES)}"
        return Check(name, "fail", detail, remedy)
    if need.sequence == 0 and need.engine_weights < share:
        return Check(name, "ok", detail)
    sequences = (share - need.engine_weights) // max(1, need.sequence)
    detail = f"{detail}; cache for {max(0, sequences)} longest sequences"
    if sequences < 1:
        remedy = "raise rollouts.tensor_parallel_size, or lower max_prompt_tokens and max_new_tokens"
        return Check(name, "fail", detail, remedy)
    if sequences < settings.rollouts.group_size:
        return Check(name, "warn", detail, "not one group fits at its longest: sampling will be slow; shorten or shard")
    return Check(name, "ok", detail)
