"""Seeds of sampled completions: a function of run seed, policy version, prompt and sample index alone."""

from __future__ import annotations

import hashlib

__all__ = ["group_seed"]


def group_seed(run_seed: int, version: int, prompt_id: int) -> int:
    """Seed of a group's first completion, below 2**62; the i-th completion's is ``group_seed(...) + i``."""
    digest = hashlib.blake2b(f"{run_seed}/{version}/{prompt_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2
