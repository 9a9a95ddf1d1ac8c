"""PPO on GSM8K as a script, with an evaluation on held-out problems before and after training.

::

    python examples/gsm8k_ppo.py                                                       # settings of this file, hub data
    python examples/gsm8k_ppo.py --config examples/gsm8k_ppo.yaml training.lr=2e-6     # the same from a YAML file
    python examples/gsm8k_ppo.py data.path=gsm8k/train.jsonl data.eval_path=gsm8k/test.jsonl model.path=models/my-model

``rlhf-ray train examples/gsm8k_ppo.yaml`` does the same without a script. Write a script to add code around the loop.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rlhf_ray import Algorithm, AlgorithmConfig, PPOConfig

HUB_ID = "openai/gsm8k"

PROMPT_TEMPLATE = """\
{prompt}

Reason step by step. End with a last line that holds nothing but #### and the final number."""


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate, train, evaluate again, and export the model."""
    args = parse(argv)
    config = gsm8k() if args.config is None else PPOConfig.from_yaml(args.config)
    algo = with_test_set(config.apply_overrides(args.overrides)).build_algo()
    try:
        show_accuracy("before", algo)
        train(algo)
        show_accuracy("after", algo)
        print("trained model:", algo.export_hf(algo.run_dir / "model"))
    finally:
        algo.stop()


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="PPO with a critic on GSM8K.")
    parser.add_argument("--config", metavar="CONF.yaml", help="settings to use instead of those in this script")
    parser.add_argument("overrides", nargs="*", metavar="section.name=value", help="settings to override")
    return parser.parse_args(argv)


def gsm8k() -> PPOConfig:
    """Build the same configuration as ``gsm8k_ppo.yaml``, which explains the values."""
    return (
        PPOConfig()
        .model(path="Qwen/Qwen2.5-1.5B-Instruct")
        .data(
            path=HUB_ID,
            subset="main",
            prompt_column="question",
            prompt_template=PROMPT_TEMPLATE,
            as_chat=True,
            batch_size=64,
        )
        .rollouts(num_replicas=1, group_size=4, max_prompt_tokens=1024, max_new_tokens=512)
        .rewards({"name": "gsm8k"})
        .training(
            iterations=200,
            lr=1e-6,
            critic_lr=1e-5,
            lr_schedule="linear",
            num_minibatches=4,
            gamma=1.0,
            lambda_=1.0,
            clip_low=0.2,
            clip_high=0.2,
            kl_coef=0.0,
        )
        .learners(num_learners=1, max_tokens_per_microbatch=4096, gradient_checkpointing=False)
        .checkpointing(interval=50)
    )


def with_test_set(config: AlgorithmConfig) -> AlgorithmConfig:
    """Use the hub's test set with the hub's training set; for files, set ``data.eval_path``."""
    data = config.settings.data
    if data.path == HUB_ID:
        config.data(eval_path=data.eval_path or HUB_ID)
    return config


def train(algo: Algorithm) -> None:
    """Run all iterations and print one line for each."""
    while algo.iteration < algo.settings.training.iterations:
        result = algo.train()
        rollouts, timers = result["rollouts"], result["timers"]
        print(
            f"iteration {result['training_iteration']}: reward {rollouts['reward_mean']:.3f}, "
            f"{rollouts['completion_tokens_mean']:.0f} tokens per completion, {timers['iteration_s']:.1f} s",
            flush=True,
        )


def show_accuracy(when: str, algo: Algorithm) -> None:
    """Print the mean reward of each held-out set, which is the fraction of correct answers."""
    evaluated = algo.evaluate()
    for name, metrics in evaluated.items():
        print(f"{when} training: {metrics['reward_mean']:.1%} of {metrics['num_prompts']} problems of {name} correct")
    if not evaluated:
        print(f"{when} training: no held-out set; set data.eval_path")


if __name__ == "__main__":
    main()
