"""The built-in rewards; importing this package registers them."""

from rlhf_ray.rewards.builtin import environment, gsm8k, length, math_equivalence, patterns

__all__ = ["environment", "gsm8k", "length", "math_equivalence", "patterns"]
