"""The embedded quickstart: the models and the tasks that a run without a model path and a data path uses.

``model/`` holds the weights and the tokenizer for sums of two numbers, ``task.py`` is their data and their reward.
``calculator_model/`` holds those for the task of several turns, ``calculator.py`` is its data and its environment.
``make_model.py`` made both.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from types import MappingProxyType
from typing import Any, Final

__all__ = ["CALCULATOR", "model_path"]

_HERE = files(__name__)
CALCULATOR: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "model.path": str(_HERE / "calculator_model"),
        "data.path": "rlhf_ray.quickstart.calculator:train_rows",
        "data.eval_path": {"calculator": "rlhf_ray.quickstart.calculator:eval_rows"},
        "data.batch_size": 64,
        "environment.name": "calculator",
        "environment.max_turns": 4,
        "environment.max_turn_tokens": 8,
        "rollouts.group_size": 4,
        "rollouts.max_prompt_tokens": 16,
        "rollouts.max_new_tokens": 48,
        "training.iterations": 60,
        "training.lr": 2e-4,
        "training.critic_lr": 3e-4,
        "training.lr_schedule": "linear",
        "training.lambda_": 0.95,
        "learners.max_tokens_per_microbatch": 4096,
        "learners.gradient_checkpointing": False,
    }
)
"""Settings of ``rlhf-ray quickstart --environment calculator``, by dotted name."""


def model_path() -> str:
    """Return the folder of the embedded model, weights and tokenizer, as transformers and vLLM load it."""
    return str(_HERE / "model")
