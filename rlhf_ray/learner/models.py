"""Loads policy, critic and reference as Hugging Face models and shards them with FSDP2."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard

from rlhf_ray.errors import ConfigError
from rlhf_ray.hub import hub_lookup
from rlhf_ray.model_weights import first_nonfinite, heads
from rlhf_ray.weight_sync.buckets import full_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "attention_kernels",
    "check_compile_backend",
    "freeze",
    "head_is_new",
    "load_critic",
    "load_policy",
    "reshard",
    "set_head_bias",
    "shard",
]

# Gathering a smaller layer by itself costs more than the memory that it frees is worth: 4 MiB in float32.
_MIN_UNIT_PARAMETERS = 2**20


def attention_kernels(setting: str, device: torch.device, compute_dtype: torch.dtype) -> tuple[str, ...]:
    """Resolve ``model.attn_implementation``: what to load a model with, the next one where it does not have that.

    ``auto`` is flash attention, which has no float32 kernel, on GPUs where it is installed; then SDPA, then eager.
    """
    if setting != "auto":
        return (setting,)
    if device.type == "cuda" and compute_dtype != torch.float32:
        from transformers.utils import is_flash_attn_2_available

        if is_flash_attn_2_available():
            return ("flash_attention_2", "sdpa", "eager")
    return ("sdpa", "eager")


def check_compile_backend(name: str) -> None:
    """Raise where ``torch.compile`` has no such backend.

    Raises:
        ConfigError: It has not.
    """
    known = torch.compiler.list_backends(exclude_tags=())
    if name not in known:
        raise ConfigError("learners.compile_backend", name, f"no such backend; there is {', '.join(known)}")


def load_policy(path: str, *, kernels: tuple[str, ...], trust_remote_code: bool) -> PreTrainedModel:
    """Load a causal language model in float32, on the CPU, without dropout.

    Args:
        path: Local folder or hub id.
        kernels: From :func:`attention_kernels`.
        trust_remote_code: Run code that ships with the model.

    Raises:
        ConfigError: The folder or hub id cannot be loaded as a causal language model, lacks some of its weights, or has
            some that are not finite.
    """
    from transformers import AutoModelForCausalLM

    policy, missing = _load(AutoModelForCausalLM, "model.path", path, kernels, trust_remote_code)
    _check_complete("model.path", path, missing)
    return policy


def load_critic(path: str, *, kernels: tuple[str, ...], trust_remote_code: bool) -> PreTrainedModel:
    """Load a backbone with a one-number head a token: the critic; arguments as :func:`load_policy`'s.

    A head that the checkpoint brings (a saved critic, a reward model) is kept. What it lacks of one starts at zero:
    without a head the first values are exactly 0 and the first advantages are the returns.

    Raises:
        ConfigError: The folder or hub id cannot be loaded with a token head, has one of several numbers, or lacks some
            of the backbone's weights.
    """
    from transformers import AutoModelForTokenClassification

    critic, missing = _load(
        AutoModelForTokenClassification,
        "model.critic_path",
        path,
        kernels,
        trust_remote_code,
        num_labels=1,
    )
    backbone = f"{critic.base_model_prefix}."
    _check_complete("model.critic_path", path, [name for name in missing if name.startswith(backbone)])
    for name in missing:
        nn.init.zeros_(critic.get_parameter(name))
    return critic


def head_is_new(critic: PreTrainedModel) -> bool:
    """Whether a (sharded) critic still has the head of zeros that :func:`load_critic` gives it."""
    return all(float(full_tensor(parameter.detach()).abs().max()) == 0.0 for _, parameter in _head(critic))


def set_head_bias(critic: PreTrainedModel, value: float) -> None:
    """Make a (sharded) critic with a new head predict ``value`` everywhere.

    Raises:
        ConfigError: Its head has no bias.
    """
    biases = [parameter for name, parameter in _head(critic) if name.endswith("bias")]
    if not biases:
        remedy = f"the head of {type(critic).__name__} has no bias to hold the mean; use zero"
        raise ConfigError("training.value_init", "reward_mean", remedy)
    with torch.no_grad():
        biases[0].fill_(value)


def _head(critic: PreTrainedModel) -> list[tuple[str, torch.Tensor]]:
    backbone = f"{critic.base_model_prefix}."
    return [(name, parameter) for name, parameter in critic.named_parameters() if not name.startswith(backbone)]


def freeze(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Take a model that is not trained out of autograd, its weights in the types that :func:`shard` computes in."""
    model.requires_grad_(False)
    kept = {id(parameter) for head in heads(model) for parameter in head.parameters()}
    for parameter in model.parameters():  # Buffers, such as rotary frequencies, keep theirs.
        if id(parameter) not in kept:
            parameter.data = parameter.data.to(dtype)


def shard(
    model: PreTrainedModel,
    mesh: DeviceMesh,
    *,
    compute_dtype: torch.dtype,
    gradient_checkpointing: bool = False,
    compile_backend: str | None = None,
    offload: bool = False,
) -> PreTrainedModel:
    """Shard a model over the mesh: one FSDP2 unit a decoder layer, one for the rest and for layers that are tiny.

    The model may be on the CPU: FSDP moves it to the mesh's device unit by unit, so that no GPU ever holds all of it.

    Trained weights stay float32; with ``compute_dtype`` bfloat16 they are cast when gathered and gradients are reduced
    in float32. Heads compute in float32 whatever the rest does: bfloat16 would round their answers to 8 bits. With
    ``offload`` weights and gradients, and so the optimiser's state, stay in CPU memory.
    """
    kwargs: dict[str, Any] = {"mesh": mesh}
    if offload:
        kwargs["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu")
    if gradient_checkpointing:
        try:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        except ValueError as error:
            remedy = f"{type(model).__name__} cannot recompute its activations; use false"
            raise ConfigError("learners.gradient_checkpointing", True, remedy) from error
        _checkpoint_in_evaluation_mode(model)
    if compute_dtype != torch.float32:
        kwargs["mp_policy"] = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
        in_float32 = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32)
        for head in heads(model):  # Gathered until the backward pass, which begins there.
            fully_shard(head, **kwargs | {"mp_policy": in_float32, "reshard_after_forward": False})
    for layer in _decoder_layers(model):
        if compile_backend is not None:
            # Before it is sharded: FSDP's hooks stay outside of the graph. Lengths differ in every microbatch.
            layer.compile(backend=compile_backend, dynamic=True)
        if sum(parameter.numel() for parameter in layer.parameters()) >= _MIN_UNIT_PARAMETERS:
            fully_shard(layer, **kwargs)
    fully_shard(model, **kwargs)
    return model


def reshard(model: nn.Module) -> None:
    """Free what a forward pass without a backward one leaves gathered: all parameters are shards again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def _load(
    auto_class: Any, field: str, path: str, kernels: tuple[str, ...], trust_remote_code: bool, **kwargs: Any
) -> tuple[PreTrainedModel, list[str]]:
    """The model, and the names of the weights that its files do not hold."""
    logging.getLogger("transformers.modeling_utils").setLevel(logging.ERROR)
    kernel, *others = kernels
    try:
        with hub_lookup(path):
            model, info = auto_class.from_pretrained(
                path,
                dtype=torch.float32,
                attn_implementation=kernel,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                # Not to load them: the error that follows here names them, transformers' own points to its log.
                ignore_mismatched_sizes=True,
                **kwargs,
            )
    except (OSError, ValueError) as error:
        if others and isinstance(error, ValueError):  # Not every architecture has every kernel.
            return _load(auto_class, field, path, tuple(others), trust_remote_code, **kwargs)
        raise ConfigError(field, path, f"cannot be loaded as {auto_class.__name__}: {error}") from error
    if info["mismatched_keys"]:
        name, found, wanted = min(info["mismatched_keys"])
        raise ConfigError(
            field, path, f"its {name} is {list(found)} where {type(model).__name__} needs {list(wanted)}; use another"
        )
    if damaged := first_nonfinite(model.named_parameters()):
        raise ConfigError(field, path, f"its {damaged} holds numbers that are not finite; use another")
    # For an export: a critic that began as a policy still calls itself one.
    model.config.architectures = [type(model).__name__]
    # Sampling has no dropout, so log-probabilities may have none either.
    return model.eval(), sorted(info["missing_keys"])


def _check_complete(field: str, path: str, missing: list[str]) -> None:
    if missing:
        raise ConfigError(field, path, f"its files lack {len(missing)} weights, {missing[0]} first; use a complete one")


def _checkpoint_in_evaluation_mode(model: PreTrainedModel) -> None:
    """Let modules recompute their activations in training mode only, where transformers looks at it, and draw nothing.

    Modules below them stay in evaluation mode; those themselves may have a dropout, or a router's jitter, as a number.
    """
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True
            for name, value in vars(module).items():
                if isinstance(value, float) and ("drop" in name or "jitter" in name):
                    setattr(module, name, 0.0)
