"""The whole loop as a script: PPO on GSM8K, measured on held-out problems before and after.

::

    python examples/gsm8k_ppo.py                                                       # settings of this file, hub data
    python examples/gsm8k_ppo.py --config examples/gsm8k_ppo.yaml training.lr=2e-6     # the same from a YAML file
    python examples/gsm8k_ppo.py data.path=gsm8k/train.jsonl data.eval_path=gsm8k/test.jsonl model.path=models/my-model

``rlhf-ray train examples/gsm8k_ppo.yaml`` needs no script; write one like this to put something around the loop.
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
    """Train, and say what became of it."""
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
    parser.add_argument("--config", metavar="CONF.yaml", help="settings to use instead of those of this script")
    parser.add_argument("overrides", nargs="*", metavar="section.name=value", help="settings that replace those")
    return parser.parse_args(argv)


def gsm8k() -> PPOConfig:
    """Build what ``gsm8k_ppo.yaml`` says; the reasons for the numbers stand there."""
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
    """Name the hub's test set where the hub's training set is used; files name their own."""
    data = config.settings.data
    if data.path == HUB_ID:
        config.data(eval_path=data.eval_path or HUB_ID)
    return config


def train(algo: Algorithm) -> None:
    """Run every iteration; a line each."""
    while algo.iteration < algo.settings.training.iterations:
        result = algo.train()
        rollouts, timers = result["rollouts"], result["timers"]
        print(
            f"iteration {result['training_iteration']}: reward {rollouts['reward_mean']:.3f}, "
            f"{rollouts['completion_tokens_mean']:.0f} tokens a completion, {timers['iteration_s']:.1f} s",
            flush=True,
        )


def show_accuracy(when: str, algo: Algorithm) -> None:
    """Print the mean reward of the held-out set, which is the share of right answers."""
    evaluated = algo.evaluate()
    for name, metrics in evaluated.items():
        print(f"{when} training: {metrics['reward_mean']:.1%} of {metrics['num_prompts']} problems of {name} are right")
    if not evaluated:
        print(f"{when} training: no held-out set; name one in data.eval_path")


if __name__ == "__main__":
    main()
