"""How far a run is: one value, from the first prompt of an iteration to its result."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, Self

from rlhf_ray.learner.batch import SequenceBatch
from rlhf_ray.learner.packing import UpdatePlan
from rlhf_ray.learner.remote.update_result import UpdateResult
from rlhf_ray.rollouts.flow import Collected
from rlhf_ray.weight_sync.publisher import Publication

__all__ = ["Iteration", "Stage"]


class Stage(enum.Enum):
    """What an iteration is doing."""

    COLLECTING = enum.auto()
    UPDATING = enum.auto()
    PUBLISHING = enum.auto()
    DONE = enum.auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Iteration:
    """The iteration that is being made, and what it has come to; the Algorithm replaces it as a whole.

    What happens where something dies, or Ctrl-C or an error ends ``train()`` and it is called again:

    ========== ================================================= ==================================================
    stage      repeated                                          kept
    ========== ================================================= ==================================================
    collecting groups that were in flight, with their seeds      groups that were scored, and a batch that was ready
    updating   the update: ranks that made it repeat their       the batch of groups
               answer, ranks that were started again make it
               from the newest state that all of them keep
    publishing gathering and delivering the policy               the update, and the batch that it was made from
    done       evaluation, checkpoint and report                 the result
    ========== ================================================= ==================================================

    Learners that lost their state end every stage: the run is rewound to its newest checkpoint, under the version after
    :attr:`newest_version`, and nothing is kept. A run that is restored or rewound begins by publishing, with nothing
    collected.
    """

    version: int = 0
    """Policy version that the learners have; while they are updating they may have the next one."""
    stage: Stage = Stage.COLLECTING
    collected: Collected | None = None
    batch: SequenceBatch | None = None
    """What the update was made from."""
    plan: UpdatePlan | None = None
    update: UpdateResult | None = None
    publication: Publication | None = None
    """The last one that every replica acknowledged."""
    result: dict[str, Any] | None = None

    @classmethod
    def loaded(cls, version: int) -> Self:
        """The iteration after a restore: policy ``version`` is in the learners alone."""
        return cls(version=version, stage=Stage.PUBLISHING)

    @property
    def newest_version(self) -> int:
        """The newest that a replica can have: one that starts takes what the learners have."""
        return self.version + (self.stage is Stage.UPDATING)

    @property
    def is_loaded(self) -> bool:
        """Whether it begins by publishing what was loaded."""
        return self.stage is Stage.PUBLISHING and self.update is None

    @property
    def is_interrupted(self) -> bool:
        """Whether its update began, and it has no result."""
        return self.stage is not Stage.COLLECTING and not self.is_loaded and self.result is None
