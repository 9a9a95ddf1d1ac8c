"""A learner rank's state: copies, checkpoints, exports, publications, and whether it is on the rank's device."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.tensor import DTensor

from rlhf_ray.errors import LearnerError
from rlhf_ray.learner.build import LearnerModels
from rlhf_ray.learner.credit import CreditAssignment
from rlhf_ray.learner.kept_state import KeptState, StateFile
from rlhf_ray.learner.mesh import gather_objects
from rlhf_ray.learner.residency import Residency
from rlhf_ray.learner.spec import LearnerSpec
from rlhf_ray.learner.trained_model import TrainedModel
from rlhf_ray.weight_sync.buckets import ByteArray, full_tensor, gather_buckets
from rlhf_ray.weight_sync.manifest import BucketLayout

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rlhf_ray.weight_sync.nccl import ShardedSource

__all__ = ["LearnerState"]


class LearnerState:
    """What a rank trains, as something that is copied, written, sent and moved.

    Args:
        spec: How the models were built.
        models: The models.
        credit: Whose weight of the KL penalty is part of the state.
        kept: Where copies of the state lie; ``None``: in memory that is freed when a checkpoint has been written.

    Attributes:
        policy: What is trained.
        critic: Trained with it, where the advantage asks for values.
        packed: Whether microbatches are packed rows, so that plans must be made for these.
    """

    def __init__(
        self, spec: LearnerSpec, models: LearnerModels, credit: CreditAssignment, kept: KeptState | None
    ) -> None:
        self._spec = spec
        self._models = models
        self.policy, self.critic, self.packed = models.policy, models.critic, models.packed
        self._credit = credit
        self._kept = kept or KeptState()
        self._copy: StateFile | None = None
        """Holds, or will, the state as it is now."""
        self._staged: Callable[[], Iterator[tuple[str, torch.Tensor]]] | None = None
        self._saving = ThreadPoolExecutor(1, "save-state")
        self._residency = Residency(spec.device)
        self._skipped_in_a_row = 0
        """Optimizer steps, until this one."""

    @property
    def steps_taken(self) -> int:
        """Optimizer steps of policy and critic since the run began, restarts included."""
        return sum(model.steps_taken for model in self._trained().values())

    @property
    def is_offloaded(self) -> bool:
        """Whether models and optimizers are in host memory, where nothing can be done with them."""
        return self._residency.is_offloaded

    def offload(self) -> None:
        """Take weights and optimizers to host memory; what the settings keep there is there already.

        Copies of the state that wait for this are started, and read from there.
        """
        if self.is_offloaded:
            return
        self._kept.wait_started()  # They read what is freed here, or the host memory that is used again.
        self._models.reshard()
        tensors: list[torch.Tensor] = []
        if not self._spec.learners.offload_optimizer:
            tensors += itertools.chain.from_iterable(model.tensors() for model in self._trained().values())
        reference = None if self._models.reference is None else self._models.reference.model
        if reference not in (None, self.policy.model) and not self._spec.learners.offload_reference:
            tensors += reference.parameters()
        self._residency.offload(tensors)
        self._kept.start(self._residency.bytes_of)

    def onload(self) -> None:
        """Undo :meth:`offload`, bit for bit."""
        self._residency.onload()

    def state(self) -> dict[str, torch.Tensor]:
        """This rank's share of all that an update changes, by the names of a checkpoint.

        Most of it is the models' own memory.
        """
        models = {f"{name}.{key}": one for name, of in self._trained().items() for key, one in of.state().items()}
        return models | {f"credit.{key}": one for key, one in self._credit.state_dict().items()}

    def keep_state(self, version: int, *, spare: int | None = None) -> StateFile:
        """Begin to copy the state, which is that of policy ``version``; once it succeeds, not again before a change.

        Args:
            version: The policy's.
            spare: A version that is kept and must not be overwritten.
        """
        if self._copy is None or self._copy.failed:
            self._copy = self._kept.begin(version, self.state(), spare=spare)
        return self._copy

    def wait_copied(self) -> None:
        """Wait until no copy reads the models' memory: only then may it change, move or be freed."""
        self._kept.wait()

    def recall(self, version: int) -> None:
        """Go back to the state that was kept at ``version``."""
        self._change()
        state = self.state()
        self._kept.read(version, state)
        self._take_counts(state)

    def save(self, folder: str, version: int = 0) -> Future[Any]:
        """Copy policy, critic and optimizers, and write the copy to a folder of this machine in the background.

        Args:
            folder: Of the checkpoint.
            version: Of the policy; what :meth:`keep_state` has copied of it since the last change is not copied again.

        Returns:
            Done when this rank has written its files, ``shard-<rank + 1>-*.safetensors``.
        """
        self._check_finite("saved")
        rank, file = dist.get_rank(), self.keep_state(version)
        Path(folder).mkdir(parents=True, exist_ok=True)
        shard = f"{folder}/shard-{rank + 1:05d}"
        frozen = {name: one for name, one in self._frozen_state().items() if rank == 0 or isinstance(one, DTensor)}
        copied = self._kept.write(f"{shard}-frozen.safetensors", frozen, version)

        def write() -> None:
            try:
                copied.result()
                file.copy_to(f"{shard}-model.safetensors")
            finally:
                if not self._spec.keeps_state:
                    file.free()

        file.reader = self._saving.submit(write)
        if not self._spec.keeps_state:
            self._copy = None
        return file.reader

    def load(self, folder: str) -> None:
        """Restore what :meth:`save` wrote, on any number of ranks."""
        self._change()
        state = self.state() | self._frozen_state()
        dcp.load(state, storage_reader=HuggingFaceStorageReader(folder))
        self._take_counts(state)
        self._check_finite(f"taken from {folder}")

    def export(self, folder: str) -> None:
        """Write the policy and the critic, if there is one, as Hugging Face folders: ``folder``, ``folder/critic``."""
        self._check_finite("exported")
        is_writer = dist.get_rank() == 0
        for name, trained in self._trained().items():
            weights: dict[str, torch.Tensor] = {}
            for parameter_name, parameter in trained.checkpoint.tensors(every_name=False):
                full = full_tensor(parameter.detach())  # A collective: every rank takes part, and one keeps it.
                if is_writer:
                    weights[parameter_name] = full.to("cpu", torch.float32).contiguous()
            if is_writer:
                weights |= {key: buffer.cpu().contiguous() for key, buffer in trained.checkpoint.buffers().items()}
                _write_pretrained(trained.model, weights, Path(folder, "" if name == "policy" else name))
            dist.barrier()

    def weight_buckets(self) -> Iterator[tuple[BucketLayout, list[ByteArray] | None]]:
        """Gather the policy for publication; rank 0 gets the bytes, every rank must iterate to the end."""
        dtype = self._spec.compute_dtype
        self._check_finite("published", dtype)
        policy, keep = self.policy, dist.get_rank() == 0
        # Buffers are never trained, but an engine that reloads a layer wants all of it.
        return itertools.chain(
            gather_buckets(policy.checkpoint.tensors(dtype=dtype), dtype=dtype, keep=keep),
            gather_buckets(policy.checkpoint.buffers().items(), dtype=torch.float32, keep=keep),
        )

    def stage_weights(self) -> None:
        """Copy this rank's part of the policy to host memory: what a :meth:`weight_source` sends from now on."""
        dtype = self._spec.compute_dtype
        self._check_finite("published", dtype)
        self._staged = None  # Its memory is used again.
        self._staged = self.policy.checkpoint.staged(dtype)

    def weight_source(self) -> ShardedSource:
        """The policy as vLLM's trainer engines read it, again for each version."""
        from rlhf_ray.weight_sync.nccl import ShardedSource

        dtype, policy = self._spec.compute_dtype, self.policy
        if self._staged is None:
            self._check_finite("published", dtype)
        return ShardedSource(
            lambda: policy.checkpoint.tensors(dtype=dtype) if self._staged is None else self._staged(),
            policy.checkpoint.shapes,
            dtype,
            device=self._spec.device,
            buffers=policy.checkpoint.buffers(),
        )

    def _trained(self) -> dict[str, TrainedModel]:
        assert not self.is_offloaded, "onload() comes first: the tensors have no memory"
        return self._models.trained

    def _change(self) -> None:
        """Comes before whatever changes the state."""
        self.wait_copied()
        self._copy = None

    def _frozen_state(self) -> dict[str, torch.Tensor]:
        return {f"{name}.{key}": one for name, of in self._trained().items() for key, one in of.frozen_state()}

    def _take_counts(self, state: dict[str, torch.Tensor]) -> None:
        """Take what no tensor of the models holds from a :meth:`state` that was filled."""
        for name, model in self._trained().items():
            model.restored(int(state[f"{name}.steps"]))
        self._credit.load_state_dict({"kl_coef": state["credit.kl_coef"]})
        self._skipped_in_a_row = 0

    def _check_finite(self, purpose: str, dtype: torch.dtype | None = None) -> None:
        """Check weights and moments, or the policy's weights as they are in a type; a collective.

        Raises:
            LearnerError: One is not finite; on every rank.
        """
        models = self._trained() if dtype is None else {"policy": self._trained()["policy"]}
        bad = [f"{tensor} of the {name}" for name, model in models.items() if (tensor := model.nonfinite(dtype))]
        for tensor in itertools.chain.from_iterable(gather_objects(bad)):
            in_type = "" if dtype is None else f" in {dtype}".replace("torch.", "")
            raise LearnerError(f"{tensor} is not finite{in_type}: it must not be {purpose}")


def _write_pretrained(model: PreTrainedModel, weights: dict[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    path.mkdir(parents=True, exist_ok=True)
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    model.config.save_pretrained(path)
    if model.can_generate():
        try:
            model.generation_config.save_pretrained(path)
        except ValueError:  # As the base model had it: transformers refuses settings of sampling without do_sample.
            text = model.generation_config.to_json_string()
            (path / "generation_config.json").write_text(text, encoding="utf-8")
