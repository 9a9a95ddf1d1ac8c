"""The built-in rewards, one file each; importing this package registers them."""

from rlhf_ray.rewards.builtin import exact_match, format, gsm8k, length, math_equivalence, overlong

__all__ = ["exact_match", "format", "gsm8k", "length", "math_equivalence", "overlong"]
