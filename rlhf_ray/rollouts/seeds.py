"""Seeds of sampled trajectories: a function of run seed, policy version, prompt and sample index alone."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

__all__ = ["Seeds", "group_seed"]


def group_seed(run_seed: int, version: int, prompt_id: int) -> int:
    """Seed of a group's first completion, below 2**62; the i-th completion's is ``group_seed(...) + i``."""
    digest = hashlib.blake2b(f"{run_seed}/{version}/{prompt_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Seeds:
    """The seeds of one group."""

    run_seed: int
    version: int
    prompt_id: int

    @property
    def first_turn(self) -> int:
        """Of the first trajectory's first turn; the i-th one's is ``first_turn + i``."""
        return group_seed(self.run_seed, self.version, self.prompt_id)
