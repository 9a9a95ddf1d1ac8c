"""One learner rank: estimates, advantages and optimizer steps over its share of a batch.

Consumes a :class:`SequenceBatch` and its :class:`RankPlan`; produces updated policy and critic, and the figures of the
update. Plain class on ``torch.distributed``, no Ray: the train loop (train_loop.py) constructs and drives it. All
ranks call the same methods in step.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.tensor import DTensor

from rlhf_ray.advantages import kl
from rlhf_ray.advantages.padding import blank
from rlhf_ray.config.plugins import Plugin
from rlhf_ray.config.settings import TrainingSettings
from rlhf_ray.errors import LearnerError
from rlhf_ray.learner.batch import SequenceBatch
from rlhf_ray.learner.credit import CreditAssignment, merged_moments
from rlhf_ray.learner.estimates import Estimates, put, take
from rlhf_ray.learner.finite import MOST_SKIPPED, FiniteGuard
from rlhf_ray.learner.initial_weights import local_part, outline, reads_weights
from rlhf_ray.learner.kept_state import KeptState, StateFile
from rlhf_ray.learner.layout import Microbatch, lay_out, unpad_completions
from rlhf_ray.learner.logprob_head import LogprobHead, TokenScorer, usable_head
from rlhf_ray.learner.lora import LoraSpec, add_adapters
from rlhf_ray.learner.mesh import LearnerMesh
from rlhf_ray.learner.metrics import MetricSums
from rlhf_ray.learner.models import (
    attention_kernels,
    fix_sdpa_kernels,
    freeze,
    head_is_new,
    load_critic,
    load_policy,
    reshard,
    set_head_bias,
    shard,
)
from rlhf_ray.learner.objective import PolicyObjective, PolicyTerms
from rlhf_ray.learner.off_policy import (
    correction_weights,
    effective_sample_size,
    loglinear_proximal,
    m2po_kept,
    staleness_metrics,
)
from rlhf_ray.learner.packed_rows import keeps_sequences_apart, skips_other_sequences, takes_lengths
from rlhf_ray.learner.packing import Minibatch, RankPlan
from rlhf_ray.learner.process_memory import return_freed_tensors
from rlhf_ray.learner.residency import Residency
from rlhf_ray.learner.sequence_parallel import SequenceSlices, SlicedScorer
from rlhf_ray.learner.trained_model import TrainedModel
from rlhf_ray.losses import aggregate, global_normalizer, value_loss
from rlhf_ray.losses.chunked_logprobs import sums_halves_in_float32
from rlhf_ray.models.weights import heads
from rlhf_ray.types import Float32Array
from rlhf_ray.weight_sync.buckets import ByteArray, full_tensor, gather_buckets
from rlhf_ray.weight_sync.manifest import BucketLayout

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

    from rlhf_ray.weight_sync.nccl import ShardedSource

__all__ = ["Learner", "LearnerSpec"]

_LOG = logging.getLogger(__name__)
_GRAD_NORMS = {"policy": "grad_norm", "critic": "critic_grad_norm"}
_REMEDY = "the weights are those before this step, which training.nonfinite_updates = skip leaves out"


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerSpec:
    """What a rank needs to build its models; made once on the driver."""

    training: TrainingSettings
    advantage: Plugin
    loss: Plugin
    policy_path: str
    critic_path: str | None
    """``None``: the advantage asks for no values, and there is no critic."""
    lora: LoraSpec | None
    """Adapters of the policy; ``None``: all its weights are trained."""
    attn_implementation: str
    trust_remote_code: bool
    gradient_checkpointing: bool
    compile_backend: str | None
    """Of ``torch.compile``; ``None``: models run as they are."""
    offload_reference: bool
    """Keep the reference in CPU memory."""
    offload_optimizer: bool
    """Keep all of policy and critic in CPU memory, and step there."""
    dtype: str
    """Compute type: ``float32`` or ``bfloat16``."""
    wire_dtype: str
    """Type of published weights: the engines' own."""
    temperature: float
    """Sampling temperature: log-probabilities are those of the distribution sampled from."""
    max_new_tokens: int
    max_staleness: int
    """Versions that data may lag behind the policy."""
    total_steps: int
    """Optimizer steps of the run."""
    policy_steps: int
    """Those of them that update the policy: all but the critic's warm-up."""
    on_gpu: bool
    timeline: bool
    """Whether ranks tell what they do when."""
    keeps_state: bool
    """Whether ranks keep copies of their state outside of their processes, and not for checkpoints alone."""
    num_threads: int | None
    """CPU threads of a rank; none: its share of the machine's cores."""
    weight_transfer: str = "nccl"
    """How ranks send weights to replicas themselves: ``nccl`` or ``ipc``."""
    quantized_sampler: bool = False
    """Whether engines compute more coarsely than learners, and so sample from another policy."""
    sequence_parallel: int = 1
    """Ranks that read the same sequences, a slice of each."""
    colocated: bool = False
    """Whether a replica shares this rank's device, and takes turns with it."""

    @property
    def off_policy(self) -> bool:
        """Whether the sampler may be another policy than the trained one, so that the loss corrects for it."""
        return self.max_staleness > 0 or self.quantized_sampler

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return torch.device("cuda", torch.cuda.current_device()) if self.on_gpu else torch.device("cpu")


class Learner:
    """Policy, critic and reference of one rank, on an initialized process group.

    There is a critic only where the advantage asks for values, and a reference only where ``kl_coef`` is not 0.

    Args:
        spec: How models are built.
        kept: Where copies of its state lie; none: in memory that is freed when a checkpoint has been written.

    Attributes:
        policy: What is trained.
        critic: Trained beside it.
        advantages: Of the last update's sequences, where it was asked to keep them: ``[T]`` each, as they enter the
            loss; ``[0]`` where the completion is left out of it.
        packed: Whether microbatches are packed rows, so that plans must be made for these.
    """

    def __init__(self, spec: LearnerSpec, kept: KeptState | None = None) -> None:
        return_freed_tensors()
        self._spec = spec
        self._kept = kept or KeptState()
        self._copy: StateFile | None = None
        """Holds, or will, the state as it is now."""
        self._staged: Callable[[], Iterator[tuple[str, torch.Tensor]]] | None = None
        self._saving = ThreadPoolExecutor(1, "save-state")
        self._training = spec.training
        device = spec.device
        fix_sdpa_kernels()
        if (num_threads := _num_threads(spec)) is not None:
            torch.set_num_threads(num_threads)
        self._device = device
        self._world_size = dist.get_world_size()
        self._mesh = LearnerMesh.of(device.type, spec.sequence_parallel)
        compute_dtype: torch.dtype = getattr(torch, spec.dtype)
        loading: dict[str, Any] = {
            "kernels": attention_kernels(spec.attn_implementation, device, compute_dtype),
            "trust_remote_code": spec.trust_remote_code,
            "with_weights": reads_weights(),
        }

        def sharded(model: PreTrainedModel, *, source: PreTrainedModel | None = None, **more: Any) -> PreTrainedModel:
            return shard(
                model,
                self._mesh.ranks,
                compute_dtype=compute_dtype,
                gradient_checkpointing=spec.gradient_checkpointing and source is None,
                compile_backend=spec.compile_backend,
                offload=spec.offload_optimizer if source is None else spec.offload_reference,
                source=source,
                **more,
            )

        def scorer(model: PreTrainedModel, *, source: PreTrainedModel | None = None) -> TokenScorer:
            head = LogprobHead.adopt(model)
            # Engines sample from weights of that type, too.
            in_half = head is not None and sums_halves_in_float32(device)
            model = sharded(model, source=source, head_dtype=compute_dtype if in_half else torch.float32)
            head = usable_head(model, head, device, compute_dtype)
            return TokenScorer(model, head, temperature=spec.temperature)

        training = self._training
        self._residency = Residency(device)
        policy = load_policy(spec.policy_path, **loading)
        reference: PreTrainedModel | None = None
        if spec.lora is not None:
            add_adapters(policy, spec.lora)
        elif training.kl_coef > 0:
            reference = outline(policy)
            freeze(reference, compute_dtype)
        self._slices: SequenceSlices | None = None
        self._score: TokenScorer | SlicedScorer = scorer(policy)
        self.policy = TrainedModel(
            self._score.model,
            training,
            lr=training.lr,
            max_grad_norm=training.max_grad_norm,
            total_steps=spec.policy_steps,
        )
        self.critic: TrainedModel | None = None
        if spec.critic_path is not None:
            self.critic = TrainedModel(
                sharded(load_critic(spec.critic_path, **loading)),
                training,
                lr=training.critic_lr,
                max_grad_norm=training.critic_max_grad_norm,
                total_steps=spec.total_steps,
            )
        self.packed = self._can_pack()
        if self._mesh.sequence is not None:
            self._slices = SequenceSlices(self._mesh.sequence, device, compute_dtype)
            self._slices.adopt_tested(self._score.model, "model.path", packed=self.packed)
            self._score = SlicedScorer(self._score, self._slices)
            if self.critic is not None:
                self._slices.adopt_tested(self.critic.model, "model.critic_path", packed=self.packed)
        self.advantages: tuple[Float32Array, ...] | None = None
        self._credit = CreditAssignment(training, spec.advantage.loaded(), device, self._mesh.data)
        self._objective = PolicyObjective(training, spec.loss.loaded())
        self._reference: TokenScorer | SlicedScorer | None = None
        if reference is not None:  # The policy's weights, before any update.
            self._reference = scorer(reference, source=policy)
            if self._slices is not None:
                self._slices.adopt(self._reference.model)
                self._reference = SlicedScorer(self._reference, self._slices)
        elif training.kl_coef > 0:
            self._reference = self._score.initial()
        self._kl_in_reward = self._reference is not None and training.kl_in == "reward"
        self._proximal_is_recomputed = training.proximal == "recompute"
        self._proximal_comes_first = self._kl_in_reward or training.m2po_threshold is not None
        self._skipped_in_a_row = 0

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
        for model in self._all_models():
            reshard(model)
        tensors: list[torch.Tensor] = []
        if not self._spec.offload_optimizer:
            tensors += itertools.chain.from_iterable(model.tensors() for model in self._models().values())
        if self._reference is not None and not self._spec.offload_reference and self._spec.lora is None:
            tensors += self._reference.model.parameters()
        self._residency.offload(tensors)
        self._kept.start(self._residency.bytes_of)

    def onload(self) -> None:
        """Undo :meth:`offload`, bit for bit."""
        self._residency.onload()

    @property
    def steps_taken(self) -> int:
        """Optimizer steps of policy and critic since the run began, restarts included."""
        return sum(model.steps_taken for model in self._models().values())

    def update(
        self, batch: SequenceBatch, plan: RankPlan, *, update_policy: bool = True, keep_advantages: bool = False
    ) -> dict[str, float]:
        """Train on one batch; returns the figures of the update, the same on every rank.

        Args:
            batch: This rank's sequences.
            plan: Minibatches, microbatches and epochs over them.
            update_policy: False in the critic's warm-up.
            keep_advantages: Whether to leave them in :attr:`advantages`.

        Raises:
            LearnerError: A number is not finite, and ``training.nonfinite_updates`` ends the run by it; on every rank,
                with weights, moments and schedules as they were before the step that would have read it.
        """
        self._check_here()
        started = time.perf_counter()
        metrics = MetricSums()
        microbatches = {
            rows: lay_out(batch, rows, packed=self.packed, device=self._device)
            for minibatch in plan.minibatches
            for rows in minibatch.microbatches
        }
        try:
            if self._training.value_init == "reward_mean":
                self._start_values_at_mean(batch)
            estimates = self._estimate(batch, microbatches, plan, update_policy=update_policy)
            for model in self._all_models():  # Else the reference's output layer stays gathered for all steps.
                reshard(model)
            kl_coef = self._credit.kl_coef
            figures = self._credit.assign(batch, estimates, metrics)
            assert estimates.advantages is not None
            self.advantages = unpad_completions(estimates.advantages, batch.loss_mask()) if keep_advantages else None
            if self._training.m2po_threshold is not None and update_policy:
                self._mask_far_tokens(plan, estimates, self._training.m2po_threshold)
            guard = FiniteGuard(batch, estimates, plan.sequences)
            if self._training.nonfinite_updates == "error" and (refusal := guard.refusal({})):
                raise LearnerError(f"{refusal}; {_REMEDY}")
            estimated = time.perf_counter()
            first, skipped = True, 0
            for index in itertools.chain.from_iterable(plan.epochs):
                minibatch = plan.minibatches[index]
                skipped += not self._step(
                    minibatch, microbatches, estimates, metrics, guard, update_policy, first=first
                )
                first = False
        finally:
            for model in self._all_models():
                reshard(model)
        self._check_finite("kept after an update, whose learning rate may be too high")
        figures |= effective_sample_size(metrics.merge(len(plan.minibatches) * len(plan.epochs), self._mesh.data))
        if self._reference is not None:
            figures["kl_coef"] = kl_coef
            self._credit.adapt(figures.get("kl_to_reference"), sum(len(m.completion_lengths) for m in plan.minibatches))
        if self._training.nonfinite_updates == "skip":
            figures["skipped_updates"] = float(skipped)
        figures["lr"] = self.policy.lr
        if self.critic is not None:
            figures["critic_lr"] = self.critic.lr
        ended = time.perf_counter()
        return figures | {"advantage_s": estimated - started, "update_s": ended - estimated}

    def weight_buckets(self) -> Iterator[tuple[BucketLayout, list[ByteArray] | None]]:
        """Gather the policy for publication; rank 0 gets the bytes, every rank must iterate to the end."""
        dtype: torch.dtype = getattr(torch, self._spec.wire_dtype)
        self._check_finite("published", dtype)
        policy, keep = self.policy, dist.get_rank() == 0
        # Nobody trains buffers, but an engine that reloads a layer wants all of it.
        return itertools.chain(
            gather_buckets(policy.checkpoint_parameters(dtype=dtype), dtype=dtype, keep=keep),
            gather_buckets(policy.checkpoint_buffers().items(), dtype=torch.float32, keep=keep),
        )

    def stage_weights(self) -> None:
        """Copy this rank's part of the policy to host memory: what a :meth:`weight_source` sends from now on."""
        dtype: torch.dtype = getattr(torch, self._spec.wire_dtype)
        self._check_finite("published", dtype)
        self._staged = None  # Its memory is used again.
        self._staged = self.policy.stage_parameters(dtype)

    def weight_source(self) -> ShardedSource:
        """The policy as vLLM's trainer engines read it, again for each version."""
        from rlhf_ray.weight_sync.nccl import ShardedSource

        dtype: torch.dtype = getattr(torch, self._spec.wire_dtype)
        policy = self.policy
        if self._staged is None:
            self._check_finite("published", dtype)
        return ShardedSource(
            lambda: policy.checkpoint_parameters(dtype=dtype) if self._staged is None else self._staged(),
            policy.checkpoint_shapes(),
            dtype,
            device=self._device,
            buffers=policy.checkpoint_buffers(),
        )

    def save(self, folder: str, version: int = 0) -> Future[Any]:
        """Copy policy, critic and optimizers, and write the copy to a folder of this machine while others run.

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
        state = self._named(self.state()) | self._frozen_state()
        dcp.load(state, storage_reader=HuggingFaceStorageReader(folder))
        self._take_counts(state)
        self._check_finite(f"taken from {folder}")

    def state(self) -> dict[str, Any]:
        """This rank's share of all that an update changes; most of it is the models' own memory."""
        models = {name: model.local_state() for name, model in self._models().items()}
        return models | {"credit": self._credit.state_dict()}

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def restore_state(self, state: dict[str, Any]) -> None:
        """Go back to a copy of what :meth:`state` gave, in a process with the same rank of as many.

        For callers without a :class:`KeptState`; the train loop goes back to one of its own (:meth:`recall`).
        """
        self._change()
        mine = self._named(self.state())
        for name, tensor in self._named(state).items():
            local_part(mine[name]).copy_(local_part(tensor))
        self._take_counts(mine)

    def keep_state(self, version: int, *, spare: int | None = None) -> StateFile:
        """Begin to copy the state, which is that of policy ``version``; once it succeeds, not again before a change.

        Args:
            version: The policy's.
            spare: A version that is kept and must not be overwritten.
        """
        if self._copy is None or self._copy.failed:
            self._copy = self._kept.begin(version, self._named(self.state()), spare=spare)
        return self._copy

    def wait_copied(self) -> None:
        """Wait until no copy reads the models' memory: only then may it change, move or be freed."""
        self._kept.wait()

    def recall(self, version: int) -> None:
        """Go back to the state that was kept at ``version``."""
        self._change()
        state = self._named(self.state())
        self._kept.read(version, state)
        self._take_counts(state)

    def export(self, folder: str) -> None:
        """Write the policy and the critic, if there is one, as Hugging Face folders: ``folder``, ``folder/critic``."""
        self._check_finite("exported")
        is_writer = dist.get_rank() == 0
        for name, trained in self._models().items():
            path = Path(folder) if name == "policy" else Path(folder) / name
            weights: dict[str, torch.Tensor] = {}
            for parameter_name, parameter in trained.checkpoint_parameters(every_name=False):
                full = full_tensor(parameter.detach())  # A collective: every rank takes part, and one keeps it.
                if is_writer:
                    weights[parameter_name] = full.to("cpu", torch.float32).contiguous()
            if is_writer:
                weights |= {key: buffer.cpu().contiguous() for key, buffer in trained.checkpoint_buffers().items()}
                _write_pretrained(trained.model, weights, path)
            dist.barrier()

    def close(self) -> None:
        """Give back what the process would keep, when nothing is being copied or saved any more."""
        self.wait_copied()
        self._saving.shutdown()
        self._mesh.close()

    def _can_pack(self) -> bool:
        """Whether rows are packed, on all ranks or none."""
        probed: dict[PreTrainedModel, Callable[[Microbatch], Sequence[torch.Tensor]]]
        probed = {self._score.model: self._score}
        if self.critic is not None:
            probed[self.critic.model] = self._states_at_head
        kernels = [model.config._attn_implementation for model in probed]
        apart: list[bool] = []
        if all(map(skips_other_sequences, kernels)) and all(map(takes_lengths, probed)):
            apart = [
                keeps_sequences_apart(
                    score,
                    vocabulary_size=model.get_input_embeddings().num_embeddings,
                    device=self._device,
                    compute_dtype=getattr(torch, self._spec.dtype),
                )
                for model, score in probed.items()
            ]
        for model in probed:
            reshard(model)
        answers: list[Any] = [None] * self._world_size
        dist.all_gather_object(answers, apart != [] and all(apart))
        packed = all(answers)
        if dist.get_rank() == 0:
            level = logging.WARNING if self._device.type == "cuda" and not packed else logging.INFO
            _LOG.log(level, "learners read %s rows, attention by %s", "packed" if packed else "padded", kernels[0])
        return packed

    def _states_at_head(self, micro: Microbatch) -> tuple[torch.Tensor]:
        """``[B, T, H]``, what the critic's head reads before each completion token: a new head answers 0 to all."""
        assert self.critic is not None
        states: list[torch.Tensor] = []
        hook = heads(self.critic.model)[-1].register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
        try:
            self._values(micro)
        finally:
            hook.remove()
        return (states[0].flatten(0, -2)[micro.value_index].float(),)

    def _check_finite(self, purpose: str, dtype: torch.dtype | None = None) -> None:
        """Check weights and moments, or the policy's weights as they are in a type; a collective.

        Raises:
            LearnerError: One is not finite; on every rank.
        """
        models = self._models() if dtype is None else {"policy": self._models()["policy"]}
        bad = [f"{tensor} of the {name}" for name, model in models.items() if (tensor := model.nonfinite(dtype))]
        found: list[list[str]] = [bad] * self._world_size
        dist.all_gather_object(found, bad)
        for tensor in itertools.chain.from_iterable(found):
            in_type = "" if dtype is None else f" in {dtype}".replace("torch.", "")
            raise LearnerError(f"{tensor} is not finite{in_type}: it must not be {purpose}")

    def _all_models(self) -> list[PreTrainedModel]:
        reference = [] if self._reference is None else [self._reference.model]
        return [*(trained.model for trained in self._models().values()), *reference]

    def _check_here(self) -> None:
        assert not self.is_offloaded, "onload() comes first: the tensors have no memory"

    def _models(self) -> dict[str, TrainedModel]:
        self._check_here()
        return {"policy": self.policy} | ({} if self.critic is None else {"critic": self.critic})

    def _change(self) -> None:
        """Comes before whatever changes the state."""
        self.wait_copied()
        self._copy = None

    def _named(self, state: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The tensors of a :meth:`state` by their names in a checkpoint."""
        models = {
            f"{name}.{key}": one for name, model in self._models().items() for key, one in model.named(state[name])
        }
        return models | {f"credit.{key}": one for key, one in state["credit"].items()}

    def _frozen_state(self) -> dict[str, torch.Tensor]:
        return {f"{name}.{key}": one for name, of in self._models().items() for key, one in of.frozen_state()}

    def _take_counts(self, state: dict[str, torch.Tensor]) -> None:
        """Take what no tensor of the models holds from a :meth:`_named` that was filled."""
        for name, model in self._models().items():
            model.restored(int(state[f"{name}.steps"]))
        self._credit.load_state_dict({"kl_coef": state["credit.kl_coef"]})
        self._skipped_in_a_row = 0

    def _start_values_at_mean(self, batch: SequenceBatch) -> None:
        """Before the first step of a critic whose head is new: predict the mean reward everywhere."""
        critic = self.critic
        if critic is not None and critic.steps_taken == 0 and head_is_new(critic.model):
            rewards = torch.tensor(batch.rewards, device=self._device)
            (of_rewards,) = merged_moments(self._mesh.data, torch.ones_like(rewards, dtype=torch.bool), rewards)
            if math.isfinite(of_rewards.mean):  # Else no step is made either.
                self._change()
                set_head_bias(critic.model, of_rewards.mean)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def _estimate(
        self,
        batch: SequenceBatch,
        microbatches: dict[tuple[int, ...], Microbatch],
        plan: RankPlan,
        *,
        update_policy: bool,
    ) -> Estimates:
        estimates = Estimates.of(
            batch,
            device=self._device,
            values=self.critic is not None,
            reference=self._reference is not None and (self._kl_in_reward or update_policy),
        )
        for index, minibatch in enumerate(plan.minibatches):
            # The policy does not change before the first step, whose own forward pass gives the same numbers.
            is_first = index == plan.epochs[0][0] and not self._proximal_comes_first
            proximal = self._kl_in_reward or (update_policy and self._proximal_is_recomputed and not is_first)
            for rows in minibatch.microbatches:
                self._estimate_microbatch(microbatches[rows], estimates, proximal=proximal)
        if estimates.bootstrap is not None:
            estimates.bootstrap *= torch.tensor(batch.truncated, device=self._device)
        return estimates

    def _estimate_microbatch(self, micro: Microbatch, estimates: Estimates, *, proximal: bool) -> None:
        if estimates.values is not None and estimates.bootstrap is not None:
            values = self._values(micro)
            put(estimates.values, micro, values[micro.value_index])
            if len(micro.rows):
                estimates.bootstrap[micro.rows] = values[micro.last_index]
        if proximal:
            put(estimates.proximal_logprobs, micro, self._score.logprobs(micro))
        if self._reference is not None and estimates.ref_logprobs is not None:
            put(estimates.ref_logprobs, micro, self._reference.logprobs(micro))

    def _mask_far_tokens(self, plan: RankPlan, estimates: Estimates, threshold: float) -> None:
        estimates.kept = estimates.mask.clone()
        for minibatch in plan.minibatches:
            rows = torch.tensor([row for part in minibatch.microbatches for row in part], device=self._device).long()
            estimates.kept[rows] = m2po_kept(estimates, rows, threshold=threshold, group=self._mesh.data)

    def _step(
        self,
        minibatch: Minibatch,
        microbatches: dict[tuple[int, ...], Microbatch],
        estimates: Estimates,
        metrics: MetricSums,
        guard: FiniteGuard,
        update_policy: bool,
        *,
        first: bool,
    ) -> bool:
        """One optimizer step of critic and policy over a minibatch; false where it was skipped."""
        guard.begin(row for rows in minibatch.microbatches for row in rows)
        normalizer = global_normalizer(
            minibatch.completion_lengths, self._training.loss_aggregation, max_length=self._spec.max_new_tokens
        )
        last = len(minibatch.microbatches) - 1
        trained = self._models().values()
        for position, rows in enumerate(minibatch.microbatches):
            micro = microbatches[rows]
            for model in trained:
                # Unreduced, the gradients of a whole model would stay on every GPU; on CPUs each reduction costs more.
                model.sync_gradients(position == last or self._device.type == "cuda")
            if self.critic is not None:
                self._backward_critic(micro, estimates, normalizer, metrics, guard)
            if update_policy:
                self._backward_policy(micro, estimates, normalizer, metrics, guard, first=first)
        stepped = {name: model for name, model in self._models().items() if update_policy or name != "policy"}
        norms = {name: model.grad_norm() for name, model in stepped.items()}
        refusal = guard.refusal(norms)
        metrics.add({_GRAD_NORMS[name]: norm for name, norm in norms.items()}, 1.0)
        self._change()
        for name, model in stepped.items():
            if refusal is None:
                model.step(norms[name])
            else:
                model.drop_gradients()
        self._skipped_in_a_row = 0 if refusal is None else self._skipped_in_a_row + 1
        if refusal is not None and self._training.nonfinite_updates == "error":
            raise LearnerError(f"{refusal}; {_REMEDY}")
        if self._skipped_in_a_row >= MOST_SKIPPED:
            raise LearnerError(f"{MOST_SKIPPED} optimizer steps in a row were skipped, the last one for: {refusal}")
        return refusal is None

    def _backward_critic(
        self, micro: Microbatch, estimates: Estimates, normalizer: float, metrics: MetricSums, guard: FiniteGuard
    ) -> None:
        assert estimates.values is not None
        assert estimates.returns is not None
        values = self._values(micro)[micro.value_index]
        loss, means = value_loss(
            values,
            take(estimates.values, micro),
            take(estimates.returns, micro),
            micro.mask,
            clip=self._training.value_clip,
            huber=self._training.value_huber,
            aggregation=self._training.loss_aggregation,
            normalizer=normalizer,
        )
        guard.look("values", micro, values)
        guard.look("value loss", micro, loss)
        # FSDP averages gradients over ranks; the global denominator wants their sum.
        (loss * self._world_size).backward()
        metrics.add_loss("value_loss", loss)
        metrics.add(means, len(micro.scored))

    def _backward_policy(
        self,
        micro: Microbatch,
        estimates: Estimates,
        normalizer: float,
        metrics: MetricSums,
        guard: FiniteGuard,
        *,
        first: bool,
    ) -> None:
        assert estimates.advantages is not None
        logprobs, entropies = self._score(micro, entropy_gradient=self._training.entropy_coef != 0.0)
        sampling, staleness = take(estimates.sampling_logprobs, micro), take(estimates.staleness, micro)
        if first and self._proximal_is_recomputed and not self._proximal_comes_first:
            put(estimates.proximal_logprobs, micro, logprobs.detach())
        proximal = take(estimates.proximal_logprobs, micro)
        if not self._proximal_is_recomputed:
            proximal = loglinear_proximal(logprobs, sampling, staleness)
        weights: torch.Tensor | None = None
        of_weights: dict[str, torch.Tensor] = {}
        if self._spec.off_policy:
            kept = None if estimates.kept is None else take(estimates.kept, micro)
            weights, of_weights = correction_weights(self._training, proximal, sampling, micro.mask, kept)
            by_distance = staleness_metrics(proximal, sampling, staleness, micro.mask, micro.num_by_staleness)
            for of_distance, tokens in by_distance:
                metrics.add(of_distance, tokens)
        terms = PolicyTerms(
            logprobs=logprobs,
            entropies=entropies,
            proximal_logprobs=proximal,
            ref_logprobs=None if estimates.ref_logprobs is None else take(estimates.ref_logprobs, micro),
            advantages=take(estimates.advantages, micro),
            behavior_weights=weights,
            mask=micro.mask,
        )
        total, loss, means = self._objective(terms, normalizer=normalizer, kl_coef=self._credit.kl_coef)
        guard.look("log-probabilities", micro, logprobs, proximal)
        guard.look("policy loss", micro, loss, total)
        (total * self._world_size).backward()
        metrics.add_loss("policy_loss", loss)
        means = means | of_weights | {"entropy": aggregate(entropies.detach(), micro.mask, "token_mean")}
        if terms.ref_logprobs is not None and not self._kl_in_reward:
            penalty = kl(terms.proximal_logprobs, terms.ref_logprobs, estimator=self._training.kl_estimator)
            means["kl_to_reference"] = aggregate(penalty, micro.mask, "token_mean")
        metrics.add(means, len(micro.scored))
        if first:
            self._compare_logprobs(micro, estimates, logprobs.detach(), terms.proximal_logprobs, metrics)

    def _compare_logprobs(
        self,
        micro: Microbatch,
        estimates: Estimates,
        logprobs: torch.Tensor,
        proximal: torch.Tensor,
        metrics: MetricSums,
    ) -> None:
        """Exactness: the engine's log-probabilities against ours, and the first ratio against 1."""
        # An engine keeps what it computed of earlier tokens under older weights: one stale token touches all others.
        if micro.num_fresh:
            fresh = micro.mask & take(estimates.fresh, micro)
            difference = blank((logprobs - take(estimates.sampling_logprobs, micro)).abs(), fresh)
            mean = aggregate(difference, fresh, "token_mean")
            metrics.add(
                {"sampling_logprob_diff_mean": mean, "sampling_logprob_diff_max": difference.max()}, micro.num_fresh
            )
        if self._kl_in_reward:  # Elsewhere they are one tensor.
            deviation = blank(((logprobs - proximal).exp() - 1.0).abs(), micro.mask)
            metrics.add({"first_ratio_deviation_max": deviation.max()}, len(micro.scored))

    def _values(self, micro: Microbatch) -> torch.Tensor:
        """``[tokens of input_ids]``, the critic's value of the state after each token."""
        assert self.critic is not None
        model = self.critic.model
        if self._slices is None:
            return model(**micro.model_inputs()).logits.float().flatten()
        sliced = model(**self._slices.shard(micro, model).model_inputs()).logits.float().squeeze(-1)
        return self._slices.gather_columns(sliced, micro).flatten()


def _num_threads(spec: LearnerSpec) -> int | None:
    """CPU threads of a rank whose CPU computes: models or optimizers are there; ``None``: PyTorch's own default.

    That default is one, by Ray. Unset, a rank takes its share of the machine's cores, or of half of them where engines
    on CPUs sample at the same time.
    """
    if spec.num_threads is not None or (spec.on_gpu and not spec.offload_optimizer):
        return spec.num_threads
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    cores = len(os.sched_getaffinity(0))
    beside_engines = spec.max_staleness > 0 and not spec.on_gpu
    return max(1, (cores // 2 if beside_engines else cores) // ranks_here)


def _write_pretrained(model: PreTrainedModel, weights: dict[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    path.mkdir(parents=True, exist_ok=True)
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    model.config.save_pretrained(path)
    if model.can_generate():
        _write_generation_config(model.generation_config, path)


def _write_generation_config(config: GenerationConfig, path: Path) -> None:
    """Write it as the base model had it: transformers refuses figures of sampling without ``do_sample``."""
    try:
        config.save_pretrained(path)
    except ValueError:
        (path / "generation_config.json").write_text(config.to_json_string(), encoding="utf-8")
