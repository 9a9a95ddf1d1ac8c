"""The settings of a reward model. They are a reward function, so that they go where functions go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from rlhf_ray.config.local_path import absolute_if_local
from rlhf_ray.errors import ConfigError
from rlhf_ray.rewards.registry import register

if TYPE_CHECKING:
    from rlhf_ray.types import PromptText

__all__ = ["RewardModelReward"]


@dataclass(frozen=True, slots=True)
class RewardModelReward:
    """Score completions with a sequence-classification model: the logit of its label is the reward.

    In a run the model has actors of its own, which start with the replicas and end with the run; in YAML it is
    ``{name: reward_model, path: ...}``. Called as a function it loads the model in the calling process.

    Args:
        path: Local folder or hub id of the model, as ``AutoModelForSequenceClassification`` loads it.
        label: Index or name of the label whose logit is the reward; unset: the only one.
        tokenizer_path: Local folder or hub id of its tokenizer; unset: the model's.
        as_chat: Write prompt and completion as messages with its tokenizer's chat template; unset: where it has one,
            else a string prompt and the completion follow each other as they are.
        max_length: Longest sequence in tokens; unset: the model's context.
        overlong: What becomes of a longer one: its group fails, or its start is left out.
        max_tokens_per_batch: Tokens, padding included, in one forward pass.
        dtype: Compute type; auto: bfloat16 on GPUs, float32 on CPUs.
        num_workers: Actors, each with the whole model.
        num_gpus: GPUs per actor, a share such as 0.5 too, 0 for CPUs; unset: 1 where the run is on GPUs, else 0.
        timeout_s: Longest wait for one call of an actor, in seconds; it is then killed and replaced.
        startup_timeout_s: Longest wait for an actor to load the model, in seconds.
        trust_remote_code: Run code that ships with the model.

    Raises:
        ConfigError: A number is out of range.
    """

    path: str
    _: KW_ONLY
    label: int | str | None = None
    tokenizer_path: str | None = None
    as_chat: bool | None = None
    max_length: int | None = None
    overlong: Literal["error", "truncate_left"] = "error"
    max_tokens_per_batch: int = 16384
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    num_workers: int = 1
    num_gpus: float | None = None
    timeout_s: float = 600.0
    startup_timeout_s: float = 900.0
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        """Check what can be checked without the model."""
        if not self.path:
            raise ConfigError("reward_model.path", self.path, "name the model's folder or hub id")
        for name, choices in (("overlong", ("error", "truncate_left")), ("dtype", ("auto", "float32", "bfloat16"))):
            if getattr(self, name) not in choices:
                raise ConfigError(f"reward_model.{name}", getattr(self, name), f"use one of {', '.join(choices)}")
        for name in ("max_length", "max_tokens_per_batch", "num_workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"reward_model.{name}", value, "must be 1 or more")
        for name in ("timeout_s", "startup_timeout_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"reward_model.{name}", getattr(self, name), "must be greater than 0")
        # Ray gives out shares below one GPU, and whole GPUs.
        if self.num_gpus is not None and (self.num_gpus < 0 or (self.num_gpus > 1 and self.num_gpus % 1)):
            raise ConfigError("reward_model.num_gpus", self.num_gpus, "use 0, a share below 1, or a whole number")

    def __call__(self, *, prompts: Sequence[PromptText], completions: Sequence[Any], **columns: Any) -> list[float]:
        """Score in this process; ``[G]``.

        Raises:
            ConfigError: The model cannot be loaded.
            DataError: A sequence cannot be scored.
        """
        from rlhf_ray.rewards.arguments import completion_texts
        from rlhf_ray.rewards.reward_model.model import model_of_this_process

        model = model_of_this_process(self)
        scores: list[float] = model.scores(model.encoded(prompts, completion_texts(completions))).tolist()
        return scores

    def to_spec(self) -> dict[str, Any]:
        """As YAML has it: what differs from the defaults."""
        given = {item.name: getattr(self, item.name) for item in fields(self)}
        defaults = {item.name: item.default for item in fields(self)}
        return {"name": "reward_model"} | {name: value for name, value in given.items() if value != defaults[name]}

    def with_absolute_paths(self) -> RewardModelReward:
        """The same in any working directory."""
        own = None if self.tokenizer_path is None else absolute_if_local(self.tokenizer_path)
        return replace(self, path=absolute_if_local(self.path), tokenizer_path=own)

    def gpus_per_worker(self, *, on_gpu: bool) -> float:
        """``num_gpus`` of a run on GPUs, or on none."""
        return float(on_gpu) if self.num_gpus is None else self.num_gpus


register("reward_model", RewardModelReward)
