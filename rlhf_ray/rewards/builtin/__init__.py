"""The built-in rewards; importing this package registers them."""

from rlhf_ray.rewards.builtin import gsm8k, length, math_equivalence, patterns

__all__ = ["gsm8k", "length", "math_equivalence", "patterns"]
