"""Every setting of a run, once: its name, type, default and bounds, its meaning and its unit.

``AlgorithmConfig`` (builder.py) builds a :class:`Settings`; each component receives its own section of it. Nothing
else in the package holds a default. Types and bounds are checked as they are declared here (values.py).

Defaults are those of a language model. The quickstart's model, of 0.8 million parameters, needs other numbers: its
preset, ``quickstart=`` at the settings that it changes, which applies as a whole to a run that names neither a model
nor data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, dataclass, field
from functools import cache
from types import MappingProxyType
from typing import Any, Final, Literal, Self, get_type_hints

from rlhf_ray.config.declaration import setting
from rlhf_ray.config.nested import nested

__all__ = [
    "REWARD_ARGUMENTS",
    "CallbackSettings",
    "CheckpointingSettings",
    "DataSettings",
    "DebuggingSettings",
    "EnvironmentSettings",
    "EvaluationSettings",
    "FaultToleranceSettings",
    "LearnerSettings",
    "ModelSettings",
    "ReportingSettings",
    "ResourceSettings",
    "RewardSettings",
    "RolloutSettings",
    "Settings",
    "TrainingSettings",
    "declaration",
    "quickstart_preset",
    "section_types",
    "setting_types",
]

QuantizationName = Literal[
    "fp8",
    "fp8_per_tensor",
    "fp8_per_block",
    "fp8_per_channel",
    "mxfp8",
    "mxfp4",
    "int8_per_channel_weight_only",
    "nvfp4_per_token",
]
"""What vLLM quantizes an ordinary checkpoint to; its other names are those of checkpoints that are quantized already."""
_QUANTIZING_ENGINE_ARGS: Final = ("quantization_config", "kv_cache_dtype")

RewardFunction = Callable[..., Any]
RewardSpec = str | RewardFunction | Mapping[str, Any]

REWARD_ARGUMENTS: Final = frozenset(
    {
        "prompts",
        "completions",
        "completion_ids",
        "completions_with_special_tokens",
        "turns",
        "trainer_state",
        "log_extra",
        "log_metric",
    }
)
"""Names by which every run passes something to reward functions, so that no dataset column can have them."""


_VERL: Final = "verl, ppo_trainer.yaml"
_DEEPSEEKMATH: Final = "DeepSeekMath, arXiv:2402.03300"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """Which weights are trained."""

    path: str | None = setting(
        None, "local folder or hub id of the policy; unset: the built-in quickstart model, unless data.path is given"
    )
    critic_path: str | None = setting(
        None, "local folder or hub id of the critic; unset: the policy's weights with a value head"
    )
    reference_path: str | None = setting(
        None,
        "local folder or hub id of the reference that training.kl_coef keeps the policy near, such as a teacher; unset: the policy as the run begins with it",
    )
    tokenizer_path: str | None = setting(None, "local folder or hub id of the tokenizer; unset: the policy's")
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "compute type; auto: bfloat16 on GPUs, float32 on CPUs; trained weights are kept in float32"
    )
    attn_implementation: str = setting(
        "auto",
        "attention of the learner: varlen (PyTorch's flash attention, packed rows), sdpa, eager, flex_attention, flash_attention_2, 3 or 4 (of a package), or a kernel of the hub such as kernels-community/flash-attn2; auto: varlen on GPUs in bfloat16 where the model allows it, else sdpa",
    )
    trust_remote_code: bool = setting(False, "run code that ships with the model")
    lora_rank: int = setting(
        0, "rank of LoRA adapters, which alone are trained; 0: all weights of the policy are", ge=0
    )
    lora_alpha: float = setting(32.0, "an adapter's product is multiplied by lora_alpha / lora_rank", gt=0)
    lora_targets: list[str] = setting([], "names of the linear layers with adapters; unset: all but the output layer")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSettings:
    """Where prompts come from."""

    path: Any = setting(
        None,
        "JSONL, Parquet or CSV file or folder, hub id, 'module:function' or 'file.py:function' that makes the rows, or a ray.data.Dataset; unset: the quickstart task",
    )
    subset: str | None = setting(None, "configuration name of a hub dataset; files have none")
    split: str = setting("train", "split of a hub dataset")
    eval_path: Any = setting(
        None,
        "held-out dataset, as path; or several by name: {name: path}, or {name: {path: ..., split: ..., ...}} where they differ from this section in split, subset, csv_types, prompt_column, prompt_template, system_prompt, as_chat, chat_template, chat_template_kwargs or final_assistant",
    )
    eval_split: str = setting("test", "split of a hub dataset used as eval_path")
    csv_types: dict[str, Literal["int", "float", "bool"]] = setting(
        {}, "columns of CSV files that are not text: {column: int, float or bool}; an empty cell of theirs is None"
    )
    prompt_column: str = setting("prompt", "column with the prompt: a string or a chat list of role and content")
    prompt_template: str | None = setting(None, "text around a string prompt, with {prompt} where it goes")
    system_prompt: str | None = setting(None, "system message put before a chat")
    as_chat: bool = setting(False, "wrap a string prompt as a user message and apply the chat template")
    chat_template: str | None = setting(
        None, "Jinja template of chats, as a file or as text; it goes into exported models; unset: the tokenizer's"
    )
    chat_template_kwargs: dict[str, Any] = setting(
        {},
        "arguments of the chat template, such as {enable_thinking: false}; a column of this name replaces single ones for its row",
    )
    final_assistant: Literal["continue", "drop"] | None = setting(
        None,
        "a chat that ends in an assistant message: continue lets the completion continue that message, drop takes it for the dataset's answer and leaves it out; unset: continue, with a warning",
    )
    batch_size: int = setting(
        128,
        "prompts per iteration",
        ge=1,
        quickstart=64,
        source=f"with group_size the 1,024 completions of {_DEEPSEEKMATH}, and of {_VERL}",
    )
    shuffle: bool = setting(True, "shuffle every epoch, seeded by debugging.seed")
    overlong_prompts: Literal["drop", "error"] = setting(
        "drop", "what happens to a prompt longer than rollouts.max_prompt_tokens"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutSettings:
    """How completions are sampled, and on what."""

    num_replicas: int = setting(1, "vLLM replicas in the Serve pool", ge=1)
    group_size: int = setting(8, "completions per prompt", ge=1, quickstart=4, source="TRL, GRPOConfig.num_generations")
    max_prompt_tokens: int | None = setting(
        None,
        "longest prompt in tokens; unset: what the context leaves after the longest completion, where the model's config names a context length",
        ge=1,
    )
    max_new_tokens: int = setting(1024, "longest completion in tokens", ge=1, quickstart=8, source=_DEEPSEEKMATH)
    temperature: float = setting(1.0, "sampling temperature", ge=0.01, le=2)
    top_p: float = setting(1.0, "nucleus mass; training needs 1.0")
    top_k: int = setting(0, "tokens kept at each step, 0 for all; training needs 0")
    stop: list[str] = setting([], "strings that end a completion")
    stop_token_ids: list[int] = setting([], "token ids that end a completion, in addition to EOS", ge=0)
    dynamic_sampling: bool = setting(
        False, "drop groups whose rewards, before shaping, are all equal and sample other prompts in their place (DAPO)"
    )
    max_dropped_groups: int | None = setting(
        None,
        "groups dropped by dynamic_sampling in one iteration before the run stops; unset: 10 x data.batch_size",
        ge=1,
    )
    max_staleness: int = setting(0, "versions a rollout may lag behind the policy; 0 is synchronous PPO", ge=0)
    partial_rollouts: bool = setting(
        False,
        "do not wait for a group in the last version of its bound: it continues, and its tokens that are staler than max_staleness become context that is not trained on",
    )
    max_concurrent_groups: int | None = setting(
        None, "groups in flight at once; unset: data.batch_size x (max_staleness + 1)", ge=1
    )
    max_paused_replicas: int | None = setting(
        None,
        "replicas paused at the same time to receive weights; unset: all; must be unset with nccl, which sends to all",
        ge=1,
    )
    tensor_parallel_size: int = setting(1, "GPUs per replica", ge=1)
    gpu_memory_utilization: float = setting(
        0.85,
        "fraction of a GPU's memory that an engine may use; a sleeping learner on the same GPU leaves about 1 GB in use, which must fit the rest",
        gt=0,
        le=1,
    )
    kv_cache_bytes: int | None = setting(
        None, "key-value cache of a CPU engine in bytes; unset: sized for max_concurrent_groups", ge=1
    )
    num_threads: int | None = setting(
        None,
        "threads of a CPU engine; unset: its share of all cores but one, or of half of them if max_staleness > 0",
        ge=1,
    )
    enforce_eager: bool = setting(False, "skip CUDA graph capture")
    weight_transfer: Literal["auto", "shared_memory", "nccl", "ipc"] = setting(
        "auto",
        "how weights reach the engines; auto: nccl when learners and engines are on GPUs of their own, else shared_memory; ipc: within each GPU that a learner and an engine share",
    )
    quantization: QuantizationName | None = setting(
        None,
        "what an engine rounds weights to when it loads them, by vLLM's name; learners train and send them unrounded, and the loss corrects for the difference; unset: nothing",
    )
    engine_args: dict[str, Any] = setting({}, "further vLLM AsyncEngineArgs, passed as they are")
    timeout_s: float = setting(3600.0, "longest wait for one group, in seconds", gt=0, quickstart=600.0)
    stall_timeout_s: float = setting(1800.0, "longest time without progress of any group, in seconds", gt=0)
    startup_timeout_s: float = setting(900.0, "longest wait for the replicas to start, in seconds", gt=0)

    @property
    def quantized_by(self) -> tuple[str, Any] | None:
        """The setting, and its value, that makes engines compute more coarsely than learners; ``None``: none does."""
        arguments = ((f"engine_args.{name}", self.engine_args.get(name)) for name in _QUANTIZING_ENGINE_ARGS)
        asked = [("quantization", self.quantization), *arguments]
        return next(((f"rollouts.{name}", value) for name, value in asked if value not in (None, "auto")), None)

    @property
    def is_off_policy(self) -> bool:
        """Whether completions may come from another policy than the trained one, which the loss then corrects for.

        Compute types alone make no other policy: engines and learners have one, ``model.dtype``, and differ in rounding.
        """
        return self.max_staleness > 0 or self.quantized_by is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvironmentSettings:
    """What answers the policy, turn by turn: an environment, tools, or an agent that calls the policy."""

    name: Any = setting(
        None,
        "an Environment class, 'module:Class', 'file.py:Class', the name of a built-in (calculator), or {name: one of these, arguments}; with column several by name, {guess: ..., shop: ...}; unset: none",
    )
    column: str | None = setting(None, "column in which each row names its environment; unset: there is one")
    tools: list[Any] = setting(
        [],
        "functions that the policy may call, typed and documented, each as in name; a class whose methods are tools; or {mcp: {command: [...]}} and {mcp: {url: ...}}, all tools of a server",
    )
    agent: Any = setting(
        None,
        "async def solve(row, client) -> reward, written against the OpenAI client, as a function, 'module:function' or 'file.py:function'; or {command: [...]}, a program that is given a row and prints its reward; unset: none",
    )
    tool_parser: str | None = setting(
        None, "vLLM's parser of tool calls in what the model writes, such as hermes; needed for tools"
    )
    reasoning_parser: str | None = setting(
        None, "vLLM's parser of reasoning in what the model writes, such as qwen3; unset: it stays in the content"
    )
    keep_reasoning: bool = setting(
        True,
        "keep earlier reasoning in the context; false: where the chat template drops it at a new turn of the user, the history is written anew and a further sequence of the trajectory begins",
    )
    tool_errors: Literal["observe", "fail"] = setting(
        "observe", "what a tool that raises becomes: a text that the policy reads, or a failed group"
    )
    max_turns: int = setting(8, "turns of the policy in a trajectory", ge=1)
    max_turn_tokens: int | None = setting(
        None, "longest turn in tokens; unset: rollouts.max_new_tokens, which bounds the trajectory", ge=1
    )
    step_timeout_s: float = setting(
        60.0, "time limit of one step, in seconds; the worker is killed and replaced, its other episodes replayed", gt=0
    )
    timeout_s: float = setting(3600.0, "time limit of an episode, in seconds", gt=0)
    replay: bool = setting(
        True,
        "play the other episodes of a worker that died again, from what was sampled; false, for tools with effects: they are dropped and counted",
    )
    num_workers: int = setting(1, "environment actors, each of which plays many episodes at once", ge=1)
    startup_timeout_s: float = setting(300.0, "longest wait for the environment actors to start, in seconds", gt=0)
    runtime_env: dict[str, Any] = setting({}, "Ray runtime environment of the actors, such as {pip: [...]}")

    @property
    def is_used(self) -> bool:
        """Whether completions are answered at all."""
        return self.name is not None or bool(self.tools) or self.agent is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardSettings:
    """How completions are scored."""

    functions: list[RewardSpec] = setting(
        [],
        "callables, names of built-in rewards, 'module:function', 'file.py:function', or {name: ..., arguments}, such as {name: reward_model, path: ...}; environment: what the environment gave; unset: that, or the checker of the quickstart task",
    )
    weights: list[float] | None = setting(None, "one weight per function; unset: 1 each")
    num_workers: int = setting(1, "reward actors", ge=1)
    timeout_s: float = setting(
        30.0, "time limit of one group's reward, in seconds; the actor is killed and replaced", gt=0
    )
    max_failures: int | None = setting(
        None, "failed groups in one iteration before the run stops; unset: data.batch_size", ge=0
    )
    truncated_reward: float | None = setting(
        None, "reward of a truncated completion in place of its own; unset: its own"
    )
    bias: float = setting(0.0, "added to every reward before it is scaled")
    scale: float = setting(1.0, "factor of reward plus bias")
    clip: float | None = setting(None, "largest size of a scaled reward; unset: no bound", gt=0)
    normalize: Literal["none", "group", "batch"] = setting(
        "none", "subtract the mean reward of the group or of the batch, after the clip"
    )
    normalize_std: bool = setting(True, "with normalize: also divide by the standard deviation")
    leave_one_out: bool = setting(False, "with normalize: subtract the mean of the other completions' rewards")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSettings:
    """The algorithm's numbers."""

    iterations: int = setting(100, "iterations of a run", ge=1)
    lr: float = setting(
        1e-6, "policy learning rate", gt=0, quickstart=2e-4, source=f"{_DEEPSEEKMATH}; DAPO, arXiv:2503.14476; {_VERL}"
    )
    critic_lr: float = setting(1e-5, "critic learning rate", gt=0, quickstart=3e-4, source=_VERL)
    lr_schedule: Literal["constant", "linear", "cosine"] = setting(
        "constant",
        "shape of both learning rates after warm-up, over training.iterations",
        quickstart="linear",
        source=f"DAPO, arXiv:2503.14476; {_VERL}",
    )
    lr_warmup_steps: int = setting(0, "optimizer steps of linear warm-up", ge=0)
    min_lr_ratio: float = setting(
        0.0, "learning rate at the end of the schedule, as a fraction of the peak", ge=0, le=1
    )
    weight_decay: float = setting(0.0, "AdamW weight decay of matrices (not of norms and biases)", ge=0)
    adam_betas: tuple[float, float] = setting((0.9, 0.999), "AdamW betas", ge=0, lt=1)
    adam_eps: float = setting(1e-8, "AdamW epsilon", gt=0)
    max_grad_norm: float | None = setting(1.0, "gradient norm clip of the policy; null: no clip", gt=0)
    critic_max_grad_norm: float | None = setting(1.0, "gradient norm clip of the critic; null: no clip", gt=0)
    num_epochs: int = setting(1, "passes over each batch", ge=1)
    num_minibatches: int = setting(4, "optimizer steps per pass", ge=1, source=f"{_VERL}: 1,024 / 256")
    advantage: str = setting(
        "gae",
        "how rewards become advantages: gae, turn_gae, grpo, dr_grpo, rloo, opo, maxrl, reinforce_plus_plus, remax, a name given to register_advantage, 'module:function' or 'file.py:function'",
    )
    advantage_args: dict[str, Any] = setting({}, "further arguments of the advantage function")
    loss: str = setting(
        "ppo",
        "policy loss: ppo, gspo, cispo, sapo, gmpo, a name given to register_loss, 'module:function' or 'file.py:function'",
    )
    loss_args: dict[str, Any] = setting({}, "further arguments of the loss function")
    gamma: float = setting(1.0, "discount per token", ge=0, le=1, source="Open-Reasoner-Zero, arXiv:2503.24290")
    lambda_: float = setting(
        1.0,
        "GAE lambda",
        ge=0,
        le=1,
        quickstart=0.95,
        source=f"Open-Reasoner-Zero, arXiv:2503.24290; VC-PPO, arXiv:2503.01491, for the critic; {_VERL}",
    )
    critic_lambda: float | None = setting(
        None,
        "GAE lambda of the returns that the critic learns (decoupled GAE; 1 in VC-PPO); unset: lambda_",
        ge=0,
        le=1,
    )
    lambda_alpha: float | None = setting(
        None,
        "makes the policy's GAE lambda 1 - 1 / (lambda_alpha x tokens of the trajectory) (VAPO, 0.05 in its paper); unset: lambda_",
        gt=0,
    )
    whiten_advantages: bool = setting(True, "whiten advantages over the batch")
    clip_low: float = setting(0.2, "lower clip of the ratio: 1 - clip_low (gmpo: exp(-clip_low))", gt=0, le=1)
    clip_high: float = setting(0.2, "upper clip of the ratio: 1 + clip_high (gmpo: exp(clip_high))", gt=0)
    dual_clip: float | None = setting(
        None, "bound of the loss at negative advantages (greater than 1); unset: off", gt=1
    )
    value_clip: float | None = setting(0.2, "clip of the value around the old value; null: off", gt=0)
    value_huber: float | None = setting(
        None, "error of the value beyond which its loss is linear, in reward; unset: squared everywhere", gt=0
    )
    value_bins: int | None = setting(
        None,
        "bins of a critic that predicts a distribution over returns and learns by cross-entropy (HL-Gauss), such as 101; unset: one number and squared errors",
        ge=2,
    )
    value_range: tuple[float, float] = setting((-1.0, 1.0), "smallest and largest return that value_bins tell apart")
    value_smoothing: float = setting(
        0.75, "standard deviation that value_bins blur a return by, in widths of a bin", gt=0, source="arXiv:2403.03950"
    )
    value_init: Literal["zero", "reward_mean"] = setting(
        "zero", "first values of a critic whose head is new: 0, or the mean reward of the first batch"
    )
    nonfinite_updates: Literal["error", "skip"] = setting(
        "error",
        "when rewards, advantages, losses or a gradient are not finite: end the run, or leave that optimizer step out (20 in a row end the run)",
    )
    mask_truncated: bool = setting(False, "leave truncated completions out of the losses")
    proximal: Literal["recompute", "loglinear"] = setting(
        "recompute",
        "the policy that ratios are clipped against: as it was before the update, or between it and the sampling policy on a line of log-probabilities, which saves a forward pass",
    )
    behavior_weights: Literal["token", "sequence", "none"] = setting(
        "token",
        "weight of data that another policy sampled (stale, or a quantized engine's), p(proximal) / p(sampling): of each token, of the whole completion, or none",
    )
    behavior_mode: Literal["truncate", "mask"] = setting(
        "truncate", "what happens to a weight outside behavior_floor and behavior_cap: the bound, or 0"
    )
    behavior_cap: float = setting(5.0, "largest such weight", ge=1)
    behavior_floor: float | None = setting(None, "smallest such weight; unset: 0", ge=0, le=1)
    m2po_threshold: float | None = setting(
        None,
        "mean squared log-ratio, proximal against sampling policy, that the tokens of a minibatch may have; the furthest are left out of the policy loss until it holds (M2PO; 0.04 in its paper); unset: off",
        gt=0,
    )
    entropy_coef: float = setting(0.0, "weight of the entropy bonus", ge=0)
    nll_coef: float = setting(
        0.0,
        "weight of the negative log-likelihood of successful trajectories in the policy loss (VAPO, 0.1 in its paper)",
        ge=0,
    )
    nll_min_reward: float = setting(
        1.0, "reward, before it is shaped, from which on a trajectory is successful to nll_coef"
    )
    kl_coef: float = setting(0.0, "weight of the KL to the frozen reference; 0 starts no reference", ge=0)
    kl_target: float | None = setting(
        None, "KL to the reference, in nats per token, that kl_coef is adapted to keep; unset: kl_coef is fixed", gt=0
    )
    kl_horizon: int = setting(10_000, "completions over which the adapted kl_coef changes by a fifth at most", ge=1)
    kl_estimator: Literal["k1", "k2", "k3", "abs"] = setting(
        "k1", "estimator of the KL to the reference; in the loss the gradient is that of k2 whichever it is"
    )
    kl_in: Literal["reward", "loss"] = setting("reward", "where the KL to the reference enters")
    kl_clip: float | None = setting(
        None,
        "largest size of a token's KL estimate in the reward, in nats: one token of k3 may reach thousands; unset: no cap",
        gt=0,
    )
    loss_aggregation: Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"] = (
        setting("token_mean", "how token losses become one number")
    )
    critic_epochs: int | None = setting(
        None, "passes of the critic over each batch; unset: those of the policy, num_epochs", ge=1
    )
    critic_num_minibatches: int | None = setting(
        None,
        "optimizer steps of the critic per pass, a divisor of num_minibatches; unset: those of the policy, num_minibatches",
        ge=1,
    )
    critic_warmup_iterations: int = setting(
        0, "first iterations that update the critic alone, toward Monte-Carlo returns (lambda 1)", ge=0
    )
    critic_warmup_explained_variance: float | None = setting(
        None,
        "share of the returns' variance that the critic explains at which its warm-up ends, before critic_warmup_iterations are over; unset: it does not",
        le=1,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerSettings:
    """Where and how updates run."""

    num_learners: int = setting(1, "FSDP2 workers", ge=1)
    sequence_parallel: int = setting(
        1,
        "learners that read the same sequences, each a slice of the tokens, so that long ones fit; divides num_learners "
        "and the attention heads of the models; a microbatch has this many times max_tokens_per_microbatch",
        ge=1,
    )
    num_gpus_per_learner: float | None = setting(
        None, "GPUs per learner, 0 or 1; unset: 1 on GPU clusters, 0 elsewhere"
    )
    max_tokens_per_microbatch: int = setting(
        16_384,
        "tokens per learner, padding included, in one forward and backward",
        ge=1,
        quickstart=4096,
        source=_VERL,
    )
    gradient_checkpointing: bool = setting(
        True,
        "recompute activations in the backward pass, which makes room for long sequences",
        quickstart=False,
        source=_VERL,
    )
    compile_backend: str | None = setting(
        None, "torch.compile backend of the decoder layers, inductor for one; unset: not compiled"
    )
    offload_reference: bool = setting(False, "keep the reference in CPU memory; one layer at a time is on the GPU")
    offload_optimizer: bool = setting(
        False,
        "keep weights, gradients and optimizer state in CPU memory and step there; a layer at a time is on the GPU",
    )
    num_threads: int | None = setting(
        None,
        "threads of a learner on a CPU, or of one with offload_optimizer; unset: its share of the machine's cores, or, on "
        "CPUs, of half of them if max_staleness > 0",
        ge=1,
    )
    startup_timeout_s: float = setting(900.0, "longest wait for the learners to start, in seconds", gt=0)
    update_timeout_s: float = setting(3600.0, "longest wait for one update, in seconds", gt=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSettings:
    """When and how the policy is measured on held-out prompts."""

    interval: int = setting(0, "iterations between evaluations; 0: only when evaluate() is called", ge=0)
    at_start: bool = setting(False, "evaluate before the first iteration; reported as iteration 0")
    at_end: bool = setting(False, "evaluate after the last iteration, whether interval falls on it or not")
    num_prompts: int | None = setting(None, "held-out prompts used, from the start of each set; unset: all", ge=1)
    samples_per_prompt: int = setting(1, "completions per prompt: the n of pass@k, and the k of avg@k", ge=1)
    temperature: float = setting(0.0, "sampling temperature; 0 is greedy", ge=0, le=2)
    top_p: float = setting(
        1.0, "nucleus mass; need not be 1.0, since held-out completions are not trained on", gt=0, le=1
    )
    max_new_tokens: int | None = setting(None, "longest completion in tokens; unset: rollouts.max_new_tokens", ge=1)
    pass_threshold: float = setting(1.0, "a completion passes, for pass@k, with a reward of at least this")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointingSettings:
    """When state is written."""

    interval: int = setting(
        0,
        "iterations between checkpoints, in addition to one after the last iteration; 0: only when save_to_path() is called",
        ge=0,
    )
    keep: int = setting(2, "newest checkpoints kept", ge=1)
    path: str | None = setting(
        None,
        "folder or URI (s3://, gs://, hdfs://) in which a folder named like the run directory holds its checkpoints; "
        "unset: checkpoints/ of the run directory",
    )
    best_metric: str | None = setting(
        None, "key of the result, such as evaluation/quickstart/reward_mean, whose best checkpoints are kept too"
    )
    best_mode: Literal["max", "min"] = setting("max", "whether the highest or the lowest best_metric is the best")
    keep_best: int = setting(1, "best checkpoints kept in addition to the newest, where best_metric is given", ge=1)
    resume: Literal["never", "same", "any"] = setting(
        "never",
        "where reporting.run_dir holds a run: never is an error, same resumes from its newest checkpoint if the "
        "settings are the same, any resumes with these settings",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportingSettings:
    """Where a run is reported."""

    run_dir: str | None = setting(None, "folder of the run; unset: runs/<algorithm>-<date>-<time>")
    progress: Literal["auto", "live", "plain", "off"] = setting(
        "auto", "console display; auto: live on a terminal, off in scripts, plain lines under the command line"
    )
    tensorboard: bool = setting(True, "write TensorBoard events")
    wandb_project: str | None = setting(None, "Weights & Biases project; unset: off")
    wandb_mode: Literal["online", "offline"] = setting(
        "offline", "offline writes to the run directory; sync it later with wandb sync"
    )
    mlflow_experiment: str | None = setting(None, "MLflow experiment; unset: off")
    mlflow_uri: str | None = setting(
        None, "MLflow tracking server or database; unset: MLFLOW_TRACKING_URI, else mlflow.db in the run directory"
    )
    completions_interval: int = setting(1, "iterations between completion tables; 0: none", ge=0)
    timeline_interval: int = setting(0, "iterations between timelines for Perfetto; 0: none", ge=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultToleranceSettings:
    """What a run survives."""

    max_group_retries: int = setting(3, "times a group is sent again after its replica died", ge=0)
    max_learner_restarts: int = setting(3, "times the learner group is started again after a worker died", ge=0)
    state_interval: int = setting(
        1,
        "updates between copies of the learners' state in host memory, from which a restarted group continues: it makes "
        "the updates since then again; without (0), or with the node, the run goes back to its newest checkpoint",
        ge=0,
    )

    @property
    def keeps_state(self) -> bool:
        """Whether there are such copies: they are of no use where no group is started again."""
        return self.state_interval > 0 and self.max_learner_restarts > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DebuggingSettings:
    """Reproducibility and noise."""

    seed: int = setting(0, "seed of the shuffle, the sampling and the minibatches", ge=0, le=2**32 - 1)
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = setting("WARNING", "level of the library's loggers")
    log_to_driver: bool = setting(False, "copy the workers' output to this console")


@dataclass(frozen=True, slots=True, kw_only=True)
class CallbackSettings:
    """User functions called on the driver."""

    on_rollout_group: Callable[..., None] | None = setting(
        None,
        "f(algorithm=, group=) for each scored group of a batch, before the update; group is a copy of the ScoredGroup",
    )
    on_train_result: Callable[..., None] | None = setting(
        None, "f(algorithm=, result=) after each iteration; may change the result"
    )
    on_evaluate_end: Callable[..., None] | None = setting(None, "f(algorithm=, metrics=) after each evaluation")
    on_checkpoint: Callable[..., None] | None = setting(None, "f(algorithm=, path=) after each checkpoint")


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourceSettings:
    """What a run uses of the cluster."""

    device: Literal["auto", "cpu", "cuda"] = setting(
        "auto", "auto: cuda where Ray offers GPUs and the installed vLLM is a CUDA build, else cpu"
    )
    colocate: Literal["auto"] | bool = setting(
        "auto",
        "whether each replica shares its GPU with a learner and they take turns, which needs rollouts.max_staleness 0, rollouts.tensor_parallel_size 1 and as many learners as replicas; auto: where the GPUs do not suffice for both and reward models, and never on CPUs",
    )
    ray_address: str | None = setting(None, "Ray cluster to join; unset: RAY_ADDRESS, else a Ray on this machine")
    cpus_per_replica: float | None = setting(
        None, "CPUs reserved per replica; unset: 1, or a fair share where the cluster is small", ge=0
    )
    cpus_per_learner: float | None = setting(
        None, "CPUs reserved per learner; unset: 1, or a fair share where the cluster is small", ge=0
    )
    cpus_per_reward_worker: float | None = setting(
        None, "CPUs reserved per reward actor; unset: 1, or a fair share where the cluster is small", ge=0
    )
    cpus_per_environment_worker: float | None = setting(
        None, "CPUs reserved per environment actor; unset: 1, or a fair share where the cluster is small", ge=0
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All settings of a run, one frozen section per concern."""

    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    rollouts: RolloutSettings = field(default_factory=RolloutSettings)
    environment: EnvironmentSettings = field(default_factory=EnvironmentSettings)
    rewards: RewardSettings = field(default_factory=RewardSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    learners: LearnerSettings = field(default_factory=LearnerSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    checkpointing: CheckpointingSettings = field(default_factory=CheckpointingSettings)
    reporting: ReportingSettings = field(default_factory=ReportingSettings)
    fault_tolerance: FaultToleranceSettings = field(default_factory=FaultToleranceSettings)
    debugging: DebuggingSettings = field(default_factory=DebuggingSettings)
    callbacks: CallbackSettings = field(default_factory=CallbackSettings)
    resources: ResourceSettings = field(default_factory=ResourceSettings)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Settings of these values, by dotted name, and of the defaults."""
        return cls(**{section: section_types()[section](**own) for section, own in nested(values).items()})

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """Yield every setting: its dotted name and its value."""
        for section in section_types():
            values = getattr(self, section)
            yield from ((f"{section}.{name}", getattr(values, name)) for name in setting_types(section))

    def __getitem__(self, name: str) -> Any:
        """The value of a setting by its dotted name, such as ``training.lr``, or of an item in a mapping."""
        section, setting_name, *keys = name.split(".")
        value = getattr(getattr(self, section), setting_name)
        for key in keys:
            value = value[key]
        return value


@cache
def section_types() -> Mapping[str, type[Any]]:
    """Every section's name and its dataclass, in order."""
    return MappingProxyType(get_type_hints(Settings))


@cache
def setting_types(section: str) -> Mapping[str, Any]:
    """The names and the annotations of one section, in order."""
    return MappingProxyType(get_type_hints(section_types()[section]))


def declaration(name: str) -> Field[Any]:
    """How a setting is declared, by its dotted name."""
    section, _, setting_name = name.partition(".")
    declared: Field[Any] = section_types()[section].__dataclass_fields__[setting_name]
    return declared


def quickstart_preset() -> dict[str, Any]:
    """The values of a run that names neither a model nor data, where they are not the defaults, by dotted name."""
    declared = {name: declaration(name).metadata for name, _ in Settings()}
    return {name: metadata["quickstart"] for name, metadata in declared.items() if "quickstart" in metadata}
