"""Every setting of a run, once: its name, its default, its meaning and its unit.

``AlgorithmConfig`` (config.py) builds a :class:`Settings`; each component receives its own section of it. Nothing
else in the package holds a default.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = [
    "CallbackSettings",
    "CheckpointingSettings",
    "DataSettings",
    "DebuggingSettings",
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
]

RewardFunction = Callable[..., Any]
RewardSpec = str | RewardFunction | Mapping[str, Any]


def setting(default: Any, meaning: str) -> Any:
    """Declare a setting: its default and one line of meaning with the unit."""
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata={"meaning": meaning})
    return field(default=default, metadata={"meaning": meaning})


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """Which weights are trained."""

    path: str | None = setting(None, "local folder or hub id of the policy; none: the embedded quickstart model")
    critic_path: str | None = setting(
        None, "local folder or hub id of the critic; none: the policy's weights with a value head"
    )
    tokenizer_path: str | None = setting(None, "local folder or hub id of the tokenizer; none: the policy's")
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "compute type; auto: bfloat16 on GPUs, float32 on CPUs; trained weights are kept in float32"
    )
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = setting(
        "auto",
        "attention kernel of the learner; auto: flash attention with packed rows where it is installed, else sdpa",
    )
    trust_remote_code: bool = setting(False, "run code that ships with the model")
    lora_rank: int = setting(0, "rank of LoRA adapters, which alone are trained; 0: all weights of the policy are")
    lora_alpha: float = setting(32.0, "an adapter's product is multiplied by lora_alpha / lora_rank")
    lora_targets: list[str] = setting([], "names of the linear layers with adapters; none: all but the output layer")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSettings:
    """Where prompts come from."""

    path: Any = setting(
        None, "JSONL, Parquet or CSV file or folder, hub id, or a ray.data.Dataset; none: the quickstart task"
    )
    subset: str | None = setting(None, "configuration name of a hub dataset; files have none")
    split: str = setting("train", "split of a hub dataset")
    eval_path: Any = setting(
        None,
        "held-out dataset, as path; or several by name: {name: path}, or {name: {path: ..., split: ..., subset: ..., prompt_column: ..., prompt_template: ..., system_prompt: ..., as_chat: ...}} where they differ from this section",
    )
    eval_split: str = setting("test", "split of a hub dataset used as eval_path")
    prompt_column: str = setting("prompt", "column with the prompt: a string or a chat list of role and content")
    prompt_template: str | None = setting(None, "text around a string prompt, with {prompt} where it goes")
    system_prompt: str | None = setting(None, "system message put before a chat")
    as_chat: bool = setting(False, "wrap a string prompt as a user message and apply the chat template")
    batch_size: int = setting(64, "prompts an iteration")
    shuffle: bool = setting(True, "shuffle every epoch, seeded by debugging.seed")
    overlong_prompts: Literal["drop", "error"] = setting(
        "drop", "what happens to a prompt longer than rollouts.max_prompt_tokens"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutSettings:
    """How completions are sampled, and on what."""

    num_replicas: int = setting(1, "vLLM replicas in the Serve pool")
    group_size: int = setting(4, "completions a prompt")
    max_prompt_tokens: int | None = setting(
        None,
        "longest prompt in tokens; none: what the context leaves beside the longest completion, where the model's config "
        "names one",
    )
    max_new_tokens: int = setting(8, "longest completion in tokens")
    temperature: float = setting(1.0, "sampling temperature")
    top_p: float = setting(1.0, "nucleus mass; training needs 1.0")
    top_k: int = setting(0, "tokens kept at each step, 0 for all; training needs 0")
    stop: list[str] = setting([], "strings that end a completion")
    stop_token_ids: list[int] = setting([], "token ids that end a completion, beside EOS")
    dynamic_sampling: bool = setting(
        False, "drop groups whose rewards, before shaping, are all equal and sample other prompts in their place (DAPO)"
    )
    max_dropped_groups: int | None = setting(
        None, "groups dropped by dynamic_sampling in one iteration before the run stops; none: 10 x data.batch_size"
    )
    max_staleness: int = setting(0, "versions a rollout may lag behind the policy; 0 is synchronous PPO")
    partial_rollouts: bool = setting(
        False,
        "do not wait for a group in the last version of its bound: it goes on, and of its tokens those that have become staler than max_staleness are context and not trained on",
    )
    max_concurrent_groups: int | None = setting(
        None, "groups in flight at once; none: data.batch_size x (max_staleness + 1)"
    )
    max_paused_replicas: int | None = setting(
        None, "replicas that stand still for new weights at the same time; none: all. Not with nccl, which sends to all"
    )
    tensor_parallel_size: int = setting(1, "GPUs a replica")
    gpu_memory_utilization: float = setting(0.85, "share of a GPU's memory that an engine may take")
    kv_cache_bytes: int | None = setting(
        None, "key-value cache of a CPU engine in bytes; none: sized for max_concurrent_groups"
    )
    num_threads: int | None = setting(
        None, "threads of a CPU engine; none: its share of all cores but one, of half of them if max_staleness > 0"
    )
    enforce_eager: bool = setting(False, "skip CUDA graph capture")
    weight_transfer: Literal["auto", "shared_memory", "nccl"] = setting(
        "auto", "how weights reach the engines; auto: nccl when learners and engines are on GPUs"
    )
    engine_args: dict[str, Any] = setting({}, "further vLLM AsyncEngineArgs, passed as they are")
    timeout_s: float = setting(600.0, "longest wait for one group, in seconds")
    stall_timeout_s: float = setting(1800.0, "longest wait without any group getting further, in seconds")
    startup_timeout_s: float = setting(900.0, "longest wait for the replicas to start, in seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardSettings:
    """How completions are scored."""

    functions: list[RewardSpec] = setting(
        [],
        "callables, names of built-in rewards, 'module:function', 'file.py:function', or {name: ..., arguments}, such as {name: reward_model, path: ...}; none: the quickstart task's checker",
    )
    weights: list[float] | None = setting(None, "one weight a function; none: 1 each")
    num_workers: int = setting(1, "reward actors")
    timeout_s: float = setting(30.0, "time limit of one group's reward, in seconds; the actor is killed and replaced")
    max_failures: int | None = setting(
        None, "failed groups in one iteration before the run stops; none: data.batch_size"
    )
    truncated_reward: float | None = setting(
        None, "reward of a truncated completion in place of its own; none: its own"
    )
    bias: float = setting(0.0, "added to every reward before it is scaled")
    scale: float = setting(1.0, "factor of reward plus bias")
    clip: float | None = setting(None, "largest size of a scaled reward; none: no bound")
    normalise: Literal["none", "group", "batch"] = setting(
        "none", "subtract the mean reward of the group or of the batch, after the clip"
    )
    normalise_std: bool = setting(True, "with normalise: also divide by the standard deviation")
    leave_one_out: bool = setting(False, "with normalise: subtract the mean of the other completions' rewards")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSettings:
    """The algorithm's numbers."""

    iterations: int = setting(100, "iterations of a run")
    lr: float = setting(2e-4, "policy learning rate")
    critic_lr: float = setting(3e-4, "critic learning rate")
    lr_schedule: Literal["constant", "linear", "cosine"] = setting(
        "linear", "shape of both learning rates after warm-up, over training.iterations"
    )
    lr_warmup_steps: int = setting(0, "optimiser steps of linear warm-up")
    min_lr_ratio: float = setting(0.0, "learning rate at the end of the schedule, as a share of the peak")
    weight_decay: float = setting(0.0, "AdamW weight decay of matrices (not of norms and biases)")
    adam_betas: tuple[float, float] = setting((0.9, 0.999), "AdamW betas")
    adam_eps: float = setting(1e-8, "AdamW epsilon")
    max_grad_norm: float | None = setting(1.0, "gradient norm clip of the policy; none: no clip")
    critic_max_grad_norm: float | None = setting(1.0, "gradient norm clip of the critic; none: no clip")
    num_epochs: int = setting(1, "passes over each batch")
    num_minibatches: int = setting(4, "optimiser steps a pass")
    advantage: str = setting(
        "gae",
        "how rewards become advantages: gae, grpo, dr_grpo, rloo, opo, maxrl, reinforce_plus_plus, remax, a name given to register_advantage, 'module:function' or 'file.py:function'",
    )
    advantage_args: dict[str, Any] = setting({}, "further arguments of the advantage function")
    loss: str = setting(
        "ppo",
        "policy loss: ppo, gspo, cispo, sapo, gmpo, a name given to register_loss, 'module:function' or 'file.py:function'",
    )
    loss_args: dict[str, Any] = setting({}, "further arguments of the loss function")
    gamma: float = setting(1.0, "discount a token")
    lambda_: float = setting(0.95, "GAE lambda")
    whiten_advantages: bool = setting(True, "whiten advantages over the batch")
    clip_low: float = setting(0.2, "lower clip of the ratio: 1 - clip_low (gmpo: exp(-clip_low))")
    clip_high: float = setting(0.2, "upper clip of the ratio: 1 + clip_high (gmpo: exp(clip_high))")
    dual_clip: float | None = setting(None, "bound of the loss at negative advantages (greater than 1); none: off")
    value_clip: float | None = setting(0.2, "clip of the value around the old value; none: off")
    value_huber: float | None = setting(
        None, "error of the value beyond which its loss is linear, in reward; none: squared everywhere"
    )
    value_init: Literal["zero", "reward_mean"] = setting(
        "zero", "first values of a critic whose head is new: 0, or the mean reward of the first batch"
    )
    mask_truncated: bool = setting(False, "leave truncated completions out of the losses")
    proximal: Literal["recompute", "loglinear"] = setting(
        "recompute",
        "the policy that ratios are clipped against: as it was before the update, or between it and the sampling policy on a line of log-probabilities, which saves a forward pass",
    )
    behavior_weights: Literal["token", "sequence", "none"] = setting(
        "token", "weight of stale data, p(proximal) / p(sampling): of each token, of the whole completion, or none"
    )
    behavior_mode: Literal["truncate", "mask"] = setting(
        "truncate", "what becomes of a weight outside behavior_floor and behavior_cap: the bound, or 0"
    )
    behavior_cap: float = setting(5.0, "largest weight of stale data")
    behavior_floor: float | None = setting(None, "smallest weight of stale data; none: 0")
    m2po_threshold: float | None = setting(
        None,
        "mean squared log-ratio, proximal against sampling policy, that the tokens of a minibatch may have; those furthest off are left out of the policy loss until it holds (M2PO; 0.04 in its paper); none: off",
    )
    entropy_coef: float = setting(0.0, "weight of the entropy bonus")
    kl_coef: float = setting(0.0, "weight of the KL to the frozen reference; 0 starts no reference")
    kl_target: float | None = setting(
        None, "KL to the reference, in nats a token, that kl_coef is adapted to keep; none: kl_coef is fixed"
    )
    kl_horizon: int = setting(10_000, "completions over which the adapted kl_coef changes by a fifth at most")
    kl_estimator: Literal["k1", "k2", "k3", "abs"] = setting(
        "k1", "estimator of the KL to the reference; in the loss the gradient is that of k2 whichever it is"
    )
    kl_in: Literal["reward", "loss"] = setting("reward", "where the KL to the reference enters")
    loss_aggregation: Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"] = (
        setting("token_mean", "how token losses become one number")
    )
    critic_warmup_iterations: int = setting(0, "first iterations that update the critic alone")


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerSettings:
    """Where and how updates run."""

    num_learners: int = setting(1, "FSDP2 workers")
    num_gpus_per_learner: float | None = setting(None, "GPUs a learner, 0 or 1; none: 1 on GPU clusters, 0 elsewhere")
    max_tokens_per_microbatch: int = setting(4096, "tokens, padding included, in one forward and backward")
    gradient_checkpointing: bool = setting(False, "recompute activations in the backward pass")
    compile_backend: str | None = setting(
        None, "torch.compile backend of the decoder layers, inductor for one; none: they are not compiled"
    )
    offload_reference: bool = setting(False, "keep the reference in CPU memory; a layer at a time is on the GPU")
    offload_optimizer: bool = setting(
        False,
        "keep weights, gradients and optimiser state in CPU memory and step there; a layer at a time is on the GPU",
    )
    num_threads: int | None = setting(
        None, "threads of a CPU learner; none: its share of the machine's cores, of half of them if max_staleness > 0"
    )
    startup_timeout_s: float = setting(900.0, "longest wait for the learners to start, in seconds")
    update_timeout_s: float = setting(3600.0, "longest wait for one update, in seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSettings:
    """When and how the policy is measured on held-out prompts."""

    interval: int = setting(0, "iterations between evaluations; 0: only when evaluate() is called")
    at_start: bool = setting(False, "evaluate before the first iteration; reported as iteration 0")
    at_end: bool = setting(False, "evaluate after the last iteration, whether interval falls on it or not")
    num_prompts: int | None = setting(None, "held-out prompts used, from the start of each set; none: all")
    samples_per_prompt: int = setting(1, "completions a prompt: the n of pass@k, and the k of avg@k")
    temperature: float = setting(0.0, "sampling temperature; 0 is greedy")
    top_p: float = setting(1.0, "nucleus mass; held-out completions are not trained on, so any will do")
    max_new_tokens: int | None = setting(None, "longest completion in tokens; none: rollouts.max_new_tokens")
    pass_threshold: float = setting(1.0, "a completion passes, for pass@k, with a reward of at least this")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointingSettings:
    """When state is written."""

    interval: int = setting(
        0, "iterations between checkpoints, beside that of the last iteration; 0: only when save_to_path() is called"
    )
    keep: int = setting(2, "newest checkpoints kept")
    path: str | None = setting(
        None,
        "folder or URI (s3://, gs://, hdfs://) in which a folder named like the run directory holds its checkpoints; "
        "none: checkpoints/ of the run directory",
    )
    best_metric: str | None = setting(
        None, "key of the result, such as evaluation/quickstart/reward_mean, whose best checkpoints are kept too"
    )
    best_mode: Literal["max", "min"] = setting("max", "whether the highest or the lowest best_metric is the best")
    keep_best: int = setting(1, "best checkpoints kept beside the newest, where best_metric is given")
    resume: Literal["never", "same", "any"] = setting(
        "never",
        "where reporting.run_dir holds a run: never is an error, same goes on from its newest checkpoint if the "
        "settings are the same, any goes on with these settings",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportingSettings:
    """Where a run is seen."""

    run_dir: str | None = setting(None, "folder of the run; none: runs/<algorithm>-<date>-<time>")
    progress: Literal["auto", "live", "plain", "off"] = setting(
        "auto", "console display; auto: live on a terminal, off in scripts, plain lines under the command line"
    )
    tensorboard: bool = setting(True, "write TensorBoard events")
    wandb_project: str | None = setting(None, "Weights & Biases project; none: off")
    wandb_mode: Literal["online", "offline"] = setting(
        "offline", "offline writes to the run directory; sync it later with wandb sync"
    )
    mlflow_experiment: str | None = setting(None, "MLflow experiment; none: off")
    mlflow_uri: str | None = setting(
        None, "MLflow tracking server or database; none: MLFLOW_TRACKING_URI, else mlflow.db in the run directory"
    )
    completions_interval: int = setting(1, "iterations between completion tables; 0: none")
    timeline_interval: int = setting(0, "iterations between timelines for Perfetto; 0: none")


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultToleranceSettings:
    """What a run survives."""

    max_group_retries: int = setting(3, "times a group is sent again after its replica died")
    max_learner_restarts: int = setting(3, "times the learner group is started again after a worker died")
    keep_learner_state: bool = setting(
        True,
        "copy the learners' state to the object store after every update, from where a restarted group goes on; "
        "without it, or with the node, the run goes back to its newest checkpoint",
    )

    @property
    def keeps_state(self) -> bool:
        """Whether there are such copies: nobody needs them where no group is started again."""
        return self.keep_learner_state and self.max_learner_restarts > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DebuggingSettings:
    """Reproducibility and noise."""

    seed: int = setting(0, "seed of the shuffle, the sampling and the minibatches")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = setting("WARNING", "level of the library's loggers")
    log_to_driver: bool = setting(False, "copy the workers' output to this console")


@dataclass(frozen=True, slots=True, kw_only=True)
class CallbackSettings:
    """User functions called on the driver."""

    on_rollout_group: Callable[..., None] | None = setting(
        None, "f(algorithm=, group=) for each scored group of a batch, before the update; group is a ScoredGroup"
    )
    on_train_result: Callable[..., None] | None = setting(
        None, "f(algorithm=, result=) after each iteration; may change the result"
    )
    on_evaluate_end: Callable[..., None] | None = setting(None, "f(algorithm=, metrics=) after each evaluation")
    on_checkpoint: Callable[..., None] | None = setting(None, "f(algorithm=, path=) after each checkpoint")


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourceSettings:
    """What a run takes of the cluster."""

    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: cuda when the Ray cluster has GPUs")
    ray_address: str | None = setting(None, "Ray cluster to join; none: RAY_ADDRESS, else a Ray on this machine")
    cpus_per_replica: float | None = setting(
        None, "CPUs reserved a replica; none: 1, or a fair share where the cluster is small"
    )
    cpus_per_learner: float | None = setting(
        None, "CPUs reserved a learner; none: 1, or a fair share where the cluster is small"
    )
    cpus_per_reward_worker: float | None = setting(
        None, "CPUs reserved a reward actor; none: 1, or a fair share where the cluster is small"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The whole of a run's settings, one frozen section a concern."""

    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    rollouts: RolloutSettings = field(default_factory=RolloutSettings)
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
