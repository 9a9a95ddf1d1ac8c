"""The names of sections and settings, and what a name that is none of them was meant to be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from rlhf_ray.config.settings import section_types, setting_types
from rlhf_ray.config.user_code import close_match
from rlhf_ray.errors import ConfigError

__all__ = ["OTHER_NAMES", "is_known", "missing_attribute", "named_settings", "with_todays_names"]

_OF_THIS: Final[Mapping[str, str]] = {
    "training.lr": "actor_learning_rate actor_lr learning_rate policy_lr",
    "training.critic_lr": "critic_learning_rate value_lr vf_lr",
    "training.critic_lr (the critic has an optimizer of its own, and its loss no weight)": (
        "value_loss_coef vf_coef vf_loss_coeff"
    ),
    "training.lr_schedule": "lr_scheduler lr_scheduler_type warmup_style",
    "training.lr_warmup_steps": "num_warmup_steps warmup_steps",
    "training.lr_warmup_steps (in optimizer steps, not a share of the run)": "lr_warmup_steps_ratio warmup_ratio",
    "training.adam_betas": "betas",
    "training.max_grad_norm": "grad_clip",
    "training.iterations (of the run: epochs x rows / data.batch_size)": "num_train_epochs total_epochs",
    "training.iterations (each makes training.num_epochs x training.num_minibatches optimizer steps)": (
        "max_steps total_training_steps"
    ),
    "training.num_epochs (passes over each batch) or training.iterations (of the run)": "num_iterations",
    "training.num_epochs": "num_ppo_epochs num_sgd_iter ppo_epochs",
    "training.num_minibatches": "num_mini_batches",
    "training.num_minibatches (their number in a pass, not their size)": (
        "mini_batch_size minibatch_size ppo_mini_batch_size sgd_minibatch_size steps_per_generation"
    ),
    "training.gamma": "discount",
    "training.lambda_": "gae_lambda lam lambda",
    "training.clip_low and training.clip_high": "clip_eps clip_param clip_range clip_ratio cliprange epsilon eps_clip",
    "training.clip_low": "clip_ratio_low eps_clip_low",
    "training.clip_high": "clip_ratio_high eps_clip_high epsilon_high",
    "training.dual_clip": "clip_ratio_c delta",
    "training.value_clip": "cliprange_value vf_clip_param",
    "training.entropy_coef": "ent_coef entropy_coeff",
    "training.kl_coef": "beta init_kl_coef kl_coeff kl_loss_coef",
    "training.kl_target": "target_kl",
    "training.kl_in": "use_kl_in_reward use_kl_loss",
    "training.kl_estimator": "kl_loss_type kl_penalty",
    "training.loss_aggregation": "loss_agg_mode loss_type",
    "training.advantage": "adv_estimator advantage_estimator",
    "training.advantage (dr_grpo does not divide by the standard deviation)": "norm_adv_by_std_in_grpo scale_rewards",
    "training.critic_lambda": "critic_lam lam_critic value_lambda",
    "training.lambda_alpha": "adaptive_lambda length_adaptive_alpha vapo_alpha",
    "training.whiten_advantages": "normalize_advantages whiten_adv",
    "training.mask_truncated": "mask_truncated_completions overlong_filtering",
    "training.critic_warmup_iterations": "critic_warmup",
    "data.path": "dataset dataset_name prompt_data train_dataset train_files",
    "data.eval_path": "eval_dataset val_files",
    "data.prompt_column": "input_key prompt_key",
    "data.split": "dataset_split dataset_train_split",
    "data.subset": "dataset_config",
    "data.batch_size": "rollout_batch_size",
    "data.batch_size (prompts per iteration; each has rollouts.group_size completions)": (
        "generation_batch_size train_batch_size train_batch_size_per_learner"
    ),
    "data.batch_size and training.num_minibatches, with learners.max_tokens_per_microbatch for what fits the memory": (
        "gradient_accumulation_steps per_device_train_batch_size"
    ),
    "rollouts.group_size": "n n_samples_per_prompt num_generations rollout_n",
    "rollouts.max_new_tokens": "generate_max_len max_completion_length max_response_length max_tokens response_length",
    "rollouts.max_prompt_tokens": "max_prompt_length prompt_max_len",
    "rollouts.num_replicas": "num_engines num_env_runners num_rollout_workers vllm_num_engines",
    "rollouts.tensor_parallel_size": "tensor_model_parallel_size vllm_tensor_parallel_size",
    "rollouts.gpu_memory_utilization": "vllm_gpu_memory_utilization",
    "rollouts.engine_args": "engine_kwargs vllm_args",
    "rewards.functions": "reward_fn reward_funcs",
    "rewards.functions ({name: reward_model, path: ...})": "reward_model reward_model_path reward_pretrain",
    "rewards.weights": "reward_weights",
    "rewards.normalize": "normalise whiten_rewards",
    "rewards.normalize_std": "normalise_std",
    "rewards.truncated_reward": "missing_eos_penalty",
    "learners.max_tokens_per_microbatch": "max_token_len_per_gpu micro_batch_size ppo_max_token_len_per_gpu",
    "learners.sequence_parallel": "sequence_parallel_size ulysses ulysses_sequence_parallel_size",
    "learners.num_gpus_per_learner": "num_gpus_per_worker",
    "learners.num_learners or rollouts.num_replicas (GPUs follow from them)": "n_gpus_per_node nnodes num_gpus",
    "learners.gradient_checkpointing": "enable_gradient_checkpointing",
    "learners.compile_backend": "torch_compile use_torch_compile",
    "resources.colocate": (
        "colocate_all colocate_all_models colocate_policy_ref free_cache_engine hybrid_engine share_gpus sleep "
        "vllm_enable_sleep vllm_enable_sleep_mode vllm_mode"
    ),
    "resources.cpus_per_learner": "num_cpus_per_learner",
    "resources.cpus_per_replica": "num_cpus_per_env_runner num_cpus_per_worker",
    "model.path": "model_name model_name_or_path pretrain sft_model_path",
    "model.critic_path": "critic_pretrain value_model_path",
    "model.reference_path": "ref_model_path ref_path reference_model teacher teacher_model teacher_model_name_or_path",
    "model.dtype": "bf16 fp16 torch_dtype",
    "evaluation.interval": "eval_steps evaluation_interval test_freq",
    "evaluation.at_start": "eval_on_start val_before_train",
    "evaluation.num_prompts": "evaluation_duration",
    "evaluation.samples_per_prompt": "eval_n_samples_per_prompt n_samples_per_eval_prompt",
    "checkpointing.interval": "checkpoint_frequency save_freq save_steps",
    "checkpointing.keep": "max_actor_ckpt_to_keep save_total_limit",
    "fault_tolerance.state_interval (in updates; 0: off)": "keep_learner_state",
    "reporting.run_dir": "default_local_dir output_dir",
    "reporting.wandb_project": "project_name use_wandb",
    # Parts of other libraries: sections of a file, or methods of a configuration.
    "rollouts (vLLM replicas sample completions)": "env_runners sampler vllm",
    "environment (and data for its rows)": "env envs environments",
    "model": "actor actor_rollout_ref policy rl_module",
    "training.critic_lr and model.critic_path": "critic",
    "training.kl_coef (above 0 it starts the reference)": "ref ref_model reference",
    "checkpointing": "checkpoint",
    "training and reporting": "trainer",
    "resources": "scaling_config",
    "nothing in its place: there is one policy": "multi_agent",
    "nothing in its place: it is PyTorch": "framework",
}
"""Our setting, or what there is in a name's place -> names in RLlib, TRL, verl, OpenRLHF and the earlier ones here."""

OTHER_NAMES: Final[Mapping[str, str]] = {name: ours for ours, names in _OF_THIS.items() for name in names.split()}
"""What other libraries call something -> the setting, or what there is in its place."""


def with_todays_names(sections: Mapping[str, Any]) -> Mapping[str, Any]:
    """Settings as an earlier version wrote them to the folders of its runs and checkpoints, by the names of today."""
    section, old = sections.get("fault_tolerance"), "keep_learner_state"
    if not isinstance(section, Mapping) or not isinstance(section.get(old), bool):
        return sections
    others = {name: value for name, value in section.items() if name != old}
    return {**sections, "fault_tolerance": {"state_interval": int(section[old]), **others}}


def is_known(name: str) -> bool:
    """Whether a name is that of a section or a setting, here or in another library."""
    return name in section_types() or bool(_called(name))


def named_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested sections and dotted names as dotted names; those that were dotted win.

    Raises:
        ConfigError: A section or a setting does not exist.
    """
    named: dict[str, Any] = {}
    for key, value in sorted(values.items(), key=lambda item: "." in str(item[0])):
        section, dot, name = str(key).partition(".")
        if section not in section_types():
            raise _unknown_section(str(key), section, name, value)
        # A section with nothing in it is what is left when all its lines are commented out.
        if not dot and not isinstance(value, Mapping | None):
            raise ConfigError(section, value, f"give the section's settings by name, such as {section}: {{...}}")
        for own_name, item in {name: value}.items() if dot else (value or {}).items():
            if own_name not in setting_types(section):
                raise _unknown_setting(section, own_name, item)
            named[f"{section}.{own_name}"] = item
    return named


def missing_attribute(config: str, name: str) -> AttributeError:
    """What to raise for an attribute that a configuration, of class ``config``, does not have."""
    if name in section_types():
        return AttributeError(f"{config}.{name} is a section; set its settings with config.{name}(...)")
    found = _called(name)
    if not found or name in OTHER_NAMES:
        hint = _hint(found or _near(name, section_types())) or f"its sections are {', '.join(section_types())}"
    else:
        calls = (f"config.{field.partition('.')[0]}({name}=...)" for field in found)
        hint = f"read {' or '.join(f'config.settings.{field}' for field in found)}, set {' or '.join(calls)}"
    return AttributeError(f"{config} has no {name}; {hint}")


def _unknown_section(key: str, section: str, name: str, value: Any) -> ConfigError:
    """What to raise for a ``key`` whose section does not exist."""
    near = _near(section, section_types())
    named = [f"{one}.{name}" for one in near if name in setting_types(one)] or _called(name)
    hint = _hint(named or _called(section) or near) or f"there are {', '.join(section_types())}"
    return ConfigError(key, value, f"no such section; {hint}")


def _unknown_setting(section: str, name: str, value: Any) -> ConfigError:
    """What to raise for a setting that its section does not have."""
    names = setting_types(section)
    near = [f"{section}.{match}" for match in _near(name, names)]
    hint = _hint(_called(name) or near) or f"{section} has {', '.join(names)}"
    return ConfigError(f"{section}.{name}", value, f"no such setting; {hint}")


def _hint(found: Iterable[str]) -> str:
    joined = " or ".join(found)
    if joined.startswith("nothing"):
        return f"there is {joined}"
    return f"did you mean {joined}?" if joined else ""


def _near(name: str, names: Iterable[str]) -> list[str]:
    """The name of which another one is a typing mistake; what only looks alike would mislead."""
    close = close_match(name, names, cutoff=0.87)
    return [close] if close else []


def _called(name: str) -> list[str]:
    """The settings of any section with this very name, or what another library's name means."""
    name = name.rpartition(".")[2]  # Theirs are nested deeper.
    same = [f"{section}.{name}" for section in section_types() if name in setting_types(section)]
    return same or ([OTHER_NAMES[name]] if name in OTHER_NAMES else [])
