"""Loads policy, critic and reference as Hugging Face models and shards them with FSDP2."""

from __future__ import annotations

import copy
import logging
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard

from rlhf_ray.errors import ConfigError
from rlhf_ray.learner.initial_weights import InitialWeights, without_weights
from rlhf_ray.learner.varlen_attention import VARLEN, flash_kernel, register, unsupported
from rlhf_ray.models.hub import hub_lookup
from rlhf_ray.models.weights import first_nonfinite, heads
from rlhf_ray.weight_sync.buckets import full_tensor

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = [
    "attention_kernels",
    "check_compile_backend",
    "fix_sdpa_kernels",
    "freeze",
    "head_is_new",
    "hidden_states",
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

    ``auto`` on GPUs is PyTorch's flash attention, which has no float32 kernel; where a model asks for more than that
    does, the flash attention of a package, if it is installed; then SDPA, then eager.
    """
    if setting != "auto":
        return (setting,)
    if device.type == "cuda" and compute_dtype != torch.float32:
        from transformers.utils import is_flash_attn_2_available

        of_torch = (VARLEN,) if flash_kernel() is not None else ()
        of_package = ("flash_attention_2",) if is_flash_attn_2_available() else ()
        return (*of_torch, *of_package, "sdpa", "eager")
    return ("sdpa", "eager")


def fix_sdpa_kernels() -> None:
    """Leave cuDNN out of the kernels that SDPA chooses from, for the whole life of this process.

    Importing vLLM does that (vllm/platforms/cuda.py), and a rank imports it when it first publishes over NCCL: the
    kernel, and with it the numbers, would change between the first update and the second.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def check_compile_backend(name: str) -> None:
    """Raise where ``torch.compile`` has no such backend.

    Raises:
        ConfigError: It has not.
    """
    known = torch.compiler.list_backends(exclude_tags=())
    if name not in known:
        raise ConfigError("learners.compile_backend", name, f"no such backend; there is {', '.join(known)}")


def load_policy(
    path: str,
    *,
    kernels: tuple[str, ...],
    trust_remote_code: bool,
    with_weights: bool = True,
    field: str = "model.path",
) -> PreTrainedModel:
    """Load a causal language model in float32, on the CPU, without dropout.

    Args:
        path: Local folder or hub id.
        kernels: From :func:`attention_kernels`.
        trust_remote_code: Run code that ships with the model.
        with_weights: Whether to read them; else they are on the meta device.
        field: The setting that names it, for messages.

    Raises:
        ConfigError: The folder or hub id cannot be loaded as a causal language model, lacks some of its weights, or has
            some that are not finite.
    """
    from transformers import AutoModelForCausalLM

    policy, info = _load(AutoModelForCausalLM, field, path, kernels, trust_remote_code, with_weights)
    _check_complete(field, path, sorted(info["missing_keys"]))
    return policy


def load_critic(
    path: str, *, kernels: tuple[str, ...], trust_remote_code: bool, with_weights: bool = True, num_outputs: int = 1
) -> PreTrainedModel:
    """Load a backbone with a head of so many numbers per token: the critic; other arguments as :func:`load_policy`'s.

    The class is the family's own for token classification; where transformers has none, the same head on the backbone
    that ``AutoModel`` gives. What the family does to logits (soft caps, scales) never touches values.

    A head that the checkpoint brings (a saved critic, a reward model) is kept. A causal language model has none: its
    critic's starts at zero, so that the first values are exactly 0 and the first advantages are the returns.

    Raises:
        ConfigError: The folder or hub id cannot be loaded with a token head, has one of several numbers, lacks some of
            the backbone's or of a trained head's weights, or holds weights that the critic has no place for.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    field = "model.critic_path"
    causal_names: set[str] = set()
    try:
        with hub_lookup(path):
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        with suppress(ValueError):  # A classification model of a family that has no other.
            causal = _without_weights(AutoModelForCausalLM, config, trust_remote_code)
            # What the policy takes: of some families that also read images it is a language model alone.
            config, causal_names = causal.config, _names(causal)
        config.num_labels = num_outputs
        critic_class = _critic_class(config, trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(field, path, f"cannot be loaded as a critic: {error}") from error
    is_trained = any(name.endswith("Classification") for name in config.architectures or ())
    critic, info = _load(critic_class, field, path, kernels, trust_remote_code, with_weights, config=config)
    missing, backbone = sorted(info["missing_keys"]), f"{critic.base_model_prefix}."
    _check_complete(field, path, [name for name in missing if name.startswith(backbone)])
    head = [name for name, _ in _head(critic)]
    unknown = sorted(name for name in info["unexpected_keys"] - causal_names if not name.startswith(backbone))
    if unknown or (is_trained and any(name.endswith("weight") for name in set(head) & set(missing))):
        found = f"its files hold {', '.join(unknown) or 'no head'} where {type(critic).__name__} has {', '.join(head)}"
        raise ConfigError(field, path, f"{found}; rename those weights, or name a causal language model")
    for name in missing:
        nn.init.zeros_(critic.get_parameter(name))
    return critic


def _critic_class(config: PretrainedConfig, trust_remote_code: bool) -> type[PreTrainedModel]:
    """The family's class for token classification; else one of the same layout on the family's backbone."""
    from transformers import AutoModel, AutoModelForTokenClassification

    with suppress(ValueError):
        return type(_without_weights(AutoModelForTokenClassification, config, trust_remote_code))
    return _scored(type(_without_weights(AutoModel, config, trust_remote_code)), type(config))


def _scored(backbone: type[PreTrainedModel], of_config: type[PretrainedConfig]) -> type[PreTrainedModel]:
    from transformers import PreTrainedModel
    from transformers.modeling_outputs import TokenClassifierOutput

    # What all models of a family share: how it loads, saves, shards and recomputes.
    family = next(c for c in backbone.__mro__ if c is not backbone and issubclass(c, PreTrainedModel))

    class Scored(family):  # type: ignore[misc,valid-type]
        config_class = of_config
        base_model_prefix = backbone.base_model_prefix or "model"

        def __init__(self, config: PretrainedConfig) -> None:
            super().__init__(config)
            setattr(self, self.base_model_prefix, backbone._from_config(config))
            self.score = nn.Linear(config.get_text_config().hidden_size, config.num_labels)
            self.post_init()

        def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> TokenClassifierOutput:
            return TokenClassifierOutput(logits=self.score(self.base_model(input_ids=input_ids, **kwargs)[0]))

    Scored.__name__ = Scored.__qualname__ = f"{backbone.__name__.removesuffix('Model')}ForTokenClassification"
    Scored.__module__ = backbone.__module__  # Where transformers looks up which kernels the family has.
    return Scored


def _names(model: PreTrainedModel) -> set[str]:
    """Names of its weights in memory and in a checkpoint."""
    from transformers.core_model_loading import revert_weight_conversion

    parameters = dict(model.named_parameters(remove_duplicate=False))  # Older files have a tied weight twice.
    return {*parameters, *revert_weight_conversion(model, parameters)}


def _without_weights(
    auto_class: Any, config: PretrainedConfig, trust_remote_code: bool, **kwargs: Any
) -> PreTrainedModel:
    with torch.device("meta"):
        if hasattr(auto_class, "from_config"):
            return auto_class.from_config(config, trust_remote_code=trust_remote_code, **kwargs)
        return auto_class._from_config(config, **kwargs)


def _first_kernel(
    auto_class: Any, config: PretrainedConfig, kernels: tuple[str, ...], trust_remote_code: bool
) -> str | None:
    """The first kernel that a model computes the same with as it was trained; ``None``: it cannot be built at all.

    Raises:
        ConfigError: There is none.
    """

    def refusal(kernel: str) -> str | None:
        try:
            built = _without_weights(auto_class, copy.deepcopy(config), trust_remote_code, attn_implementation=kernel)
        except (ValueError, ImportError, KeyError) as error:  # A family's own table of kernels.
            return str(error)
        return unsupported(built, kernel)

    if VARLEN in kernels:
        register()
    reasons = []
    for kernel in kernels:
        if (reason := refusal(kernel)) is None:
            return kernel
        reasons.append(reason)
    if refusal("eager") is not None:
        return None
    remedy = f"the {config.model_type} family does not have it ({reasons[0]}); use auto or eager"
    raise ConfigError("model.attn_implementation", kernels[0], remedy)


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
    head_dtype: torch.dtype = torch.float32,
    gradient_checkpointing: bool = False,
    compile_backend: str | None = None,
    offload: bool = False,
    source: PreTrainedModel | None = None,
) -> PreTrainedModel:
    """Shard a model over the mesh: one FSDP2 unit per decoder layer, one for the rest and for layers that are tiny.

    Weights come from the rank that reads them, whatever the others have, on the CPU; or from ``source``, a model that
    is sharded alike.

    Trained weights stay float32; with ``compute_dtype`` bfloat16 they are cast when gathered and gradients are reduced
    in float32. Heads get their weights in ``head_dtype``, and answer in float32 whatever the rest does: bfloat16 would
    round their answers to 8 bits. With
    ``offload`` weights and gradients, and so the optimizer's state, stay in CPU memory.
    """
    weights = InitialWeights(model)
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
        of_heads = MixedPrecisionPolicy(param_dtype=head_dtype, reduce_dtype=torch.float32)
        for head in heads(model):  # Gathered until the backward pass, which begins there.
            fully_shard(head, **kwargs | {"mp_policy": of_heads, "reshard_after_forward": False})
    for layer in _decoder_layers(model):
        if compile_backend is not None:
            # Before it is sharded: FSDP's hooks stay outside of the graph. Lengths differ in every microbatch.
            layer.compile(backend=compile_backend, dynamic=True)
        if sum(parameter.numel() for parameter in layer.parameters()) >= _MIN_UNIT_PARAMETERS:
            fully_shard(layer, **kwargs)
    fully_shard(model, **kwargs)
    weights.fill(model, mesh.device_type, offload=offload, source=source)
    return model


def reshard(model: nn.Module) -> None:
    """Free what a forward pass without a backward one leaves gathered: all parameters are shards again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def hidden_states(model: PreTrainedModel, inputs: dict[str, Any]) -> torch.Tensor:
    """``[B, L, D]`` float32, what the backbone of a (sharded) model gives its head."""
    found: list[torch.Tensor] = []
    hooks = [model.base_model.register_forward_hook(lambda _module, _inputs, output: found.append(output[0].float()))]
    if (head := model.get_output_embeddings()) is not None:  # Not every family calls its backbone as a whole.
        hooks.append(head.register_forward_pre_hook(lambda _module, inputs: found.append(inputs[0].float())))
    try:
        model(**inputs | {"use_cache": False})
    finally:
        for hook in hooks:
            hook.remove()
        reshard(model)
    return found[-1]


def _decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def _load(
    auto_class: Any,
    field: str,
    path: str,
    kernels: tuple[str, ...],
    trust_remote_code: bool,
    with_weights: bool,
    **kwargs: Any,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, and what transformers says of the names in its files."""
    logging.getLogger("transformers.modeling_utils").setLevel(logging.ERROR)
    try:
        with hub_lookup(path), nullcontext() if with_weights else without_weights():
            from transformers import AutoConfig

            config = kwargs.get("config") or AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
            model, info = auto_class.from_pretrained(
                path,
                dtype=torch.float32,
                attn_implementation=_first_kernel(auto_class, config, kernels, trust_remote_code),
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                # Not to load them: the error that follows here names them, transformers' own points to its log.
                ignore_mismatched_sizes=True,
                **kwargs,
            )
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(field, path, f"cannot be loaded as {auto_class.__name__}: {error}") from error
    if info["mismatched_keys"]:
        name, found, wanted = min(info["mismatched_keys"])
        raise ConfigError(
            field, path, f"its {name} is {list(found)} where {type(model).__name__} needs {list(wanted)}; use another"
        )
    read = ((name, tensor) for name, tensor in model.state_dict().items() if not tensor.is_meta)
    if damaged := first_nonfinite(read):  # Buffers of a checkpoint are published too.
        raise ConfigError(field, path, f"its {damaged} holds numbers that are not finite; use another")
    # For an export: a critic that began as a policy still calls itself one.
    model.config.architectures = [type(model).__name__]
    # Sampling has no dropout, so log-probabilities may have none either.
    return model.eval(), info


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
