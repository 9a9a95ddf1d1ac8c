"""What is wrong with a reward model, found without loading its weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_ray.config.local_path import looks_local
from rlhf_ray.errors import ConfigError
from rlhf_ray.models.config import context_length, load_model_config
from rlhf_ray.rewards.reward_model.reward import RewardModelReward

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

__all__ = ["check_reward_model", "label_index", "reward_tokenizer"]

_WITHOUT_HEAD = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration", "ForTokenClassification")


def check_reward_model(reward: RewardModelReward, field: str) -> None:
    """Read the model's config and tokenizer.

    Args:
        reward: The reward model.
        field: The setting that asks for it, for messages.

    Raises:
        ConfigError: There is no such model, it is quantized or has no classification head, or a setting does not go
            with it.
    """
    local = Path(reward.path).expanduser()
    if not local.is_dir() and (local.exists() or looks_local(reward.path)):
        reason = "is a file" if local.exists() else "no such folder"
        raise ConfigError(field, reward.path, f"{reason}; give the reward model's folder or a hub id")
    config = load_model_config(field, reward.path, trust_remote_code=reward.trust_remote_code)
    architectures = config.architectures or []
    if architectures and all(name.endswith(_WITHOUT_HEAD) for name in architectures):
        remedy = (
            f"this is a {', '.join(architectures)}, which has no classification head; name a model that was trained as "
            "a reward model (AutoModelForSequenceClassification)"
        )
        raise ConfigError(field, reward.path, remedy)
    label_index(config, reward, field)
    context = context_length(config)
    if reward.max_length is not None and context is not None and reward.max_length > context:
        raise ConfigError(f"{field}.max_length", reward.max_length, f"use at most {context}, the model's context")
    tokenizer = reward_tokenizer(reward, field)
    if reward.as_chat and tokenizer.chat_template is None:
        remedy = "its tokenizer has no chat template; name one that has it in tokenizer_path, or leave as_chat out"
        raise ConfigError(f"{field}.as_chat", True, remedy)


def reward_tokenizer(reward: RewardModelReward, field: str) -> PreTrainedTokenizerBase:
    """The reward model's tokenizer.

    Raises:
        ConfigError: It cannot be loaded.
    """
    from rlhf_ray.prompts.tokenizer import load_tokenizer

    path = reward.tokenizer_path or reward.path
    try:
        return load_tokenizer(path, trust_remote_code=reward.trust_remote_code)
    except ConfigError as error:
        reason = error.remedy.partition(";")[0]
        remedy = f"the reward model's tokenizer cannot be loaded: {reason}; name its folder or hub id in tokenizer_path"
        raise ConfigError(field, path, remedy) from error


def label_index(config: PretrainedConfig, reward: RewardModelReward, field: str) -> int:
    """Which of the model's logits is the reward.

    Raises:
        ConfigError: It has several and none is named, or there is no such label.
    """
    names = [str(config.id2label[index]) for index in range(config.num_labels)]
    label = reward.label
    if label is None and len(names) == 1:
        return 0
    if isinstance(label, str) and label in names:
        return names.index(label)
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(names):
        return label
    listed = ", ".join(f"{index} ({name})" for index, name in enumerate(names))
    raise ConfigError(f"{field}.label", label, f"name the label whose logit is the reward: {listed}")
