"""What a model's configuration says of it, and which models are refused for what it says.

Families name the same things differently, or not at all: every other module asks here.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

from rlhf_ray.errors import ConfigError
from rlhf_ray.models.hub import hub_lookup

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

__all__ = [
    "check_causal",
    "check_reads_vocabulary",
    "check_sequence_parallel",
    "check_unquantized",
    "check_vocabulary",
    "context_length",
    "keeps_states",
    "kv_token_bytes",
    "load_model_config",
]

_LOG = logging.getLogger(__name__)

# Those that vLLM reads, so that an engine takes what is found here.
_CONTEXT_LENGTHS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "model_max_length",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
)
# A size of the states of state spaces, convolutions and linear attention, by family.
_STATE_SIZES = (
    "state_size",
    "ssm_state_size",
    "mamba_d_state",
    "conv_L_cache",
    "linear_conv_kernel_dim",
)


def load_model_config(field: str, path: str, *, trust_remote_code: bool) -> PretrainedConfig:
    """Read the configuration of a model that can be trained.

    Args:
        field: The setting that names the model, for messages.
        path: Local folder or hub id.
        trust_remote_code: Whether to run code that ships with the model.

    Raises:
        ConfigError: There is no model, or it is quantized.
    """
    from transformers import AutoConfig

    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        with hub_lookup(path):
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(field, path, f"is no model folder or reachable hub id: {reason}") from error
    check_unquantized(field, path, config)
    return config


def check_unquantized(field: str, path: str, config: PretrainedConfig) -> None:
    """Refuse a checkpoint of quantized weights, which transformers would dequantize without a word.

    Raises:
        ConfigError: It is one.
    """
    for part in (config, config.get_text_config()):
        settings: Any = getattr(part, "quantization_config", None)
        if settings:
            settings = settings if isinstance(settings, dict) else settings.to_dict()
            method = settings.get("quant_method", "of an unnamed method")
            remedy = f"its weights are quantized ({method}), and float32 weights are what is trained and published"
            raise ConfigError(field, path, f"{remedy}; name the checkpoint that it was made from, or dequantize it")


def check_causal(field: str, path: str, config: PretrainedConfig) -> None:
    """Refuse a policy that is no causal language model.

    Raises:
        ConfigError: It is an encoder, an encoder and a decoder, or of a family without one.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind, remote = config.model_type, getattr(config, "auto_map", None) or {}
    if config.get_text_config().is_encoder_decoder:
        reason = f"{kind} is an encoder-decoder model, which does not continue its prompt"
    elif hasattr(config, "add_cross_attention") and getattr(config, "is_decoder", None) is False:
        reason = f"{kind} is an encoder: each token sees those that follow"
    elif kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or "AutoModelForCausalLM" in remote:
        return
    else:
        reason = f"transformers has no causal language model of type {kind}"
    raise ConfigError(field, path, f"{reason}; name a decoder-only language model")


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> int:
    """Compare the tokenizer with the model's embedding.

    A tokenizer with tokens beyond it is common (a padding token that was added to it alone) and does no harm until a
    prompt holds one, so it is told; prompts are checked row by row.

    Returns:
        How many tokens the model has an embedding for.
    """
    size = int(config.get_text_config().vocab_size)
    if tokens := sorted((token, text) for text, token in tokenizer.get_vocab().items() if token >= size):
        _LOG.warning(
            "the tokenizer has %d tokens that the model has no embedding for, from %r (id %d) on: prompts that hold "
            "one are refused",
            len(tokens),
            tokens[0][1],
            tokens[0][0],
        )
    return size


def check_reads_vocabulary(
    field: str, path: str, other: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig
) -> None:
    """Refuse a critic or a reference that cannot read what the policy writes.

    Args:
        field: The setting that names it.
        path: Where it is.
        other: Its configuration.
        tokenizer: The policy's.
        config: The policy's.

    Raises:
        ConfigError: Its embedding ends before the tokens that tokenizer and policy share.
    """
    size, of_policy = (int(one.get_text_config().vocab_size) for one in (other, config))
    last = max((token for token in tokenizer.get_vocab().values() if token < of_policy), default=-1)
    if last >= size:
        remedy = f"its embedding ends with token {size - 1}, and the policy's tokens with {last}"
        raise ConfigError(field, path, f"{remedy}; name a model with the policy's vocabulary")


def check_sequence_parallel(size: int, field: str, config: PretrainedConfig) -> None:
    """Refuse a model of which ``size`` learners cannot each read a slice of the tokens, as far as it tells.

    Args:
        size: ``learners.sequence_parallel``.
        field: The setting that names the model, for messages.
        config: Its configuration.

    Raises:
        ConfigError: Its attention heads cannot be shared out, or what a layer computes of a token depends on others by
            other ways than attention to all of them, or on how many a learner reads.
    """
    if size == 1:
        return
    text = config.get_text_config()
    layers = text.per_layer_config if text.is_heterogeneous else [text]
    heads = math.gcd(*(int(getattr(layer, "num_attention_heads", None) or 0) for layer in layers))
    sliding = ["sliding_attention"] if getattr(text, "sliding_window", None) else []
    kinds = {*(getattr(text, "layer_types", None) or sliding)} - {"full_attention", "attention"}
    ropes = getattr(text, "rope_parameters", None) or {}
    ropes = [one for one in (ropes, *ropes.values()) if isinstance(one, dict)]
    lengths = {one.get("rope_type") for one in ropes} & {"dynamic", "longrope"}
    if heads == 0 or keeps_states(config):
        reason = "has layers that carry a state from token to token; use 1"
    elif kinds:
        reason = f"has layers of {', '.join(sorted(kinds))}, which see a part of the tokens; use 1"
    elif lengths:
        reason = f"has {lengths.pop()} rotary embeddings, which depend on how many tokens are read; use 1"
    elif heads % size:
        possible = [str(n) for n in range(1, heads + 1) if heads % n == 0]
        reason = f"has {heads} attention heads, which {size} learners cannot share; use {' or '.join(possible)}"
    else:
        return
    raise ConfigError("learners.sequence_parallel", size, f"{field}: {config.model_type} {reason}")


def context_length(config: PretrainedConfig) -> int | None:
    """The model's context in tokens; ``None``: it has no limit, or names none."""
    text = config.get_text_config()
    found = [getattr(text, name, None) for name in _CONTEXT_LENGTHS]
    return min((int(length) for length in found if length is not None), default=None)


def keeps_states(config: PretrainedConfig) -> bool:
    """Whether some layers carry a state from token to token instead of keys and values."""
    text = config.get_text_config()
    return any(getattr(text, name, None) for name in _STATE_SIZES)


def kv_token_bytes(config: PretrainedConfig, dtype_bytes: int) -> int | None:
    """Key-value cache of one token: a key and a value in each head of each layer.

    ``None`` where no layer has heads, so that the cache does not grow with the sequence. Layers that keep a state
    instead, or share a latent vector, are counted as if they had keys and values: the need is never less than told.
    """
    text = config.get_text_config()
    layers = text.per_layer_config if text.is_heterogeneous else [text] * text.num_hidden_layers
    sizes = [_head_sizes(layer) for layer in layers]
    return 2 * dtype_bytes * sum(sizes) if all(sizes) else None


def _head_sizes(layer: PretrainedConfig) -> int:
    all_heads = getattr(layer, "num_attention_heads", None)
    if all_heads is None:
        return 0
    head_size = getattr(layer, "head_dim", None) or layer.hidden_size // all_heads
    return int((getattr(layer, "num_key_value_heads", None) or all_heads) * head_size)
