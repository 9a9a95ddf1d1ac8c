"""What the learner ranks are asked to do, one class per command, and what they answer.

A :class:`Request` carries one command per rank from the Algorithm through the bridge to the training loop, which
matches it by type (``train_loop.py``). What the bridge must know of a command, such as whether it computes with the
models, is said by its class.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from rlhf_ray.checkpoints.folder import Folder
from rlhf_ray.learner.packing import RankPlan
from rlhf_ray.types import TokenEstimates

if TYPE_CHECKING:  # It imports PyTorch, which the bridge does without until a command brings one.
    from rlhf_ray.learner.spec import LearnerSpec

__all__ = [
    "Command",
    "ExportCommand",
    "GroupLost",
    "LayoutCommand",
    "LoadCommand",
    "OffloadCommand",
    "PublishCommand",
    "RankFailure",
    "RecallCommand",
    "Refusal",
    "RenewCommand",
    "Request",
    "SaveCommand",
    "SendCommand",
    "StageCommand",
    "StopCommand",
    "UpdateCommand",
    "UpdateResult",
    "merge_results",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """Base of all commands to one rank."""

    name: ClassVar[str]
    """For messages and the timeline."""
    needs_models: ClassVar[bool] = True
    """Whether the rank's models must be where they compute: engines that share its GPU sleep until it has answered."""
    reads_weights: ClassVar[bool] = False
    """Whether it is refused while the weights are those of no version."""
    publishes: ClassVar[bool] = False
    """Whether engines wait for it: the copy of the state that is kept is made afterward."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutCommand(Command):
    """Answer whether the rank reads packed rows."""

    name = "layout"
    needs_models = False


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateCommand(Command):
    """Train on the rank's share of a batch; the answer is an :class:`UpdateResult`."""

    name = "update"
    reads_weights = True

    batch: Any
    """Reference to the rank's own sequences."""
    plan: RankPlan
    version: int
    """Of the policy afterward."""
    update_policy: bool
    """False in the critic's warm-up."""
    with_estimates: bool
    """Whether the answer holds those of tokens."""
    keeps_state: bool
    """Whether the state afterward is to be kept."""
    spared_version: int | None
    """Whose kept state is not overwritten then, since a checkpoint is being written from it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishCommand(Command):
    """Gather the policy into the object store; rank 0 answers with its manifest and references."""

    name = "publish"
    reads_weights = True
    publishes = True


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCommand(Command):
    """Copy what :class:`SendCommand` will send, while the models are still on the GPU."""

    name = "stage"
    reads_weights = True
    publishes = True


@dataclass(frozen=True, slots=True, kw_only=True)
class SendCommand(Command):
    """Send the policy to replicas over NCCL or ipc; the answer is its size in bytes."""

    name = "send"
    needs_models = False  # Where GPUs are shared, what is sent was staged: engines are awake then.
    reads_weights = True
    publishes = True

    app_name: str
    """The Serve application of the replicas."""
    deployment_name: str
    tensor_parallel_size: int
    replica_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveCommand(Command):
    """Copy the state, and write a checkpoint from the copy in the background."""

    name = "save"
    reads_weights = True

    folder: Folder


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadCommand(Command):
    """Restore a distributed checkpoint."""

    name = "load"

    folder: Folder
    version: int
    """Of the policy in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecallCommand(Command):
    """Return to the newest kept state up to ``version``; the answer is its version, ``None`` where there is none."""

    name = "recall"

    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RenewCommand(Command):
    """Build the models again by another spec."""

    name = "renew"

    spec: LearnerSpec
    begins: bool
    """False for ranks that were restarted: what was kept under this spec stays."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportCommand(Command):
    """Write Hugging Face folders."""

    name = "export"
    reads_weights = True

    folder: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadCommand(Command):
    """Leave a shared GPU to the engine; made by the bridge, and never answered."""

    name = "offload"
    needs_models = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StopCommand(Command):
    """Return from the training loop."""

    name = "stop"
    needs_models = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One command to every rank of a worker group."""

    commands: tuple[Command, ...]
    """All of one class: one per rank, or a single one for all ranks."""
    group: str
    """The worker group that it is for."""
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def command(self, rank: int = 0) -> Command:
        """What ``rank`` is asked to do."""
        return self.commands[rank] if len(self.commands) > 1 else self.commands[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFailure:
    """An exception on one rank."""

    rank: int
    message: str
    """Traceback text."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A rank's answer to a command that must not be carried out; all ranks agree, and can take the next one."""

    message: str
    partly_updated: bool = False
    """Whether the weights are those of no version until the ranks recall one."""


@dataclass(frozen=True, slots=True)
class GroupLost:
    """The worker group that was asked is gone; another one takes its place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateResult:
    """The answer to an :class:`UpdateCommand`."""

    metrics: Mapping[str, float]
    """The same on every rank."""
    estimates: tuple[TokenEstimates, ...] | None = None
    """Of each sequence; ``None`` where they are not asked for."""
    kept_version: int | None = None
    """The newest policy version whose state is kept, on all ranks; ``None``: there is no such version."""


def merge_results(results: Sequence[UpdateResult], sequences: Sequence[Sequence[int]]) -> UpdateResult:
    """Merge the answers of all ranks to one for the whole batch.

    Args:
        results: One per rank; neighbors that read slices of the same sequences share one, and the first answers for it.
        sequences: Per share, which sequences of the batch it holds, in its local order.
    """
    metrics = results[0].metrics
    kept = [result.kept_version for result in results if result.kept_version is not None]
    kept_version = min(kept) if len(kept) == len(results) else None
    shares = results[:: len(results) // len(sequences)]
    if any(result.estimates is None for result in shares):
        return UpdateResult(metrics=metrics, kept_version=kept_version)
    of_sequence = {
        index: estimates
        for result, indices in zip(shares, sequences, strict=True)
        for index, estimates in zip(indices, result.estimates or (), strict=True)
    }
    estimates = tuple(of_sequence[index] for index in sorted(of_sequence))
    return UpdateResult(metrics=metrics, estimates=estimates, kept_version=kept_version)
