"""The exactness contract of the learner, on a tiny model: on one rank here, on two in processes of their own."""

from __future__ import annotations

import gc
import importlib.util
import json
import math
import os
import re
import shutil
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import learner_scenarios as runs
import numpy as np
import pytest
import torch
from learner_scenarios import RESUMED, SCENARIOS, Outcome, RankResult, Scenario
from model_families import tiny_config
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from rlhf_ray.learner import varlen_attention
from rlhf_ray.learner.batch import SequenceBatch
from rlhf_ray.learner.layout import Microbatch, lay_out
from rlhf_ray.learner.learner import Learner
from rlhf_ray.learner.lora import LoraSpec
from rlhf_ray.learner.metrics import MetricSums
from rlhf_ray.learner.packed_rows import can_pack
from rlhf_ray.learner.packing import plan_update
from rlhf_ray.learner.remote.commands import UpdateResult, merge_results
from rlhf_ray.learner.trained_model import TrainedModel
from rlhf_ray.reporting.metrics import metric_for
from rlhf_ray.types import Float32Array, TokenEstimates
from rlhf_ray.weight_sync.buckets import ByteArray
from rlhf_ray.weight_sync.manifest import BucketLayout, under_each_name

pytestmark = pytest.mark.usefixtures("one_rank")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def two_ranks(models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RankResult, RankResult]:
    """The folder that two ranks wrote to, and what each left behind."""
    folder = tmp_path_factory.mktemp("two_ranks")
    for name in ("policy", "critic", "small_critic", "made_critic", "experts", "transposed"):
        (folder / name).symlink_to(models / name)
    runs.run_ranks(runs.__file__, folder, 2)
    first, second = (torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in (0, 1))
    return folder, first, second


@pytest.fixture
def make_learner(models: Path) -> Callable[..., Learner]:
    """Build a learner; keyword arguments are training settings."""

    def make(scenario: Scenario | None = None, **training: Any) -> Learner:
        scenario = scenario or Scenario()
        return Learner(runs.make_spec(models, replace(scenario, training=scenario.training | training)))

    return make


@pytest.fixture
def policy_forwards(make_learner: Callable[..., Learner]) -> Callable[[Scenario], int]:
    """Count the policy's forward passes in one update of a scenario."""

    def count(scenario: Scenario) -> int:
        learner = make_learner(scenario)
        calls: list[int] = []
        handle = learner.policy.model.base_model.register_forward_hook(lambda *_: calls.append(1))
        runs.update(learner, scenario, 0)
        handle.remove()
        return len(calls)

    return count


def test_sdpa_chooses_from_the_same_kernels_before_and_after_vllm_is_imported(
    make_learner: Callable[..., Learner],
) -> None:
    folder = importlib.util.find_spec("vllm").submodule_search_locations[0]  # type: ignore[union-attr,index]
    code = "\n".join(file.read_text() for file in Path(folder, "platforms").glob("*.py"))
    # What vLLM does to the process that imports it, and so to a rank, when it first publishes over NCCL.
    assert re.findall(r"enable_(\w+)_sdp\((\w+)\)", code) == [("cudnn", "False")]
    torch.backends.cuda.enable_cudnn_sdp(True)
    make_learner()
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize(
    ("on_gpu", "offload", "staleness", "asked", "threads"),
    [
        (False, False, 0, None, 4),
        (False, False, 1, None, 2),
        (False, False, 1, 7, 7),
        # The optimizer steps on the CPU; engines on GPUs need little of it.
        (True, True, 1, None, 4),
        (True, True, 0, 7, 7),
        (True, False, 0, None, None),
        (True, False, 0, 7, 7),
    ],
)
def test_threads_of_a_rank_are_its_share_of_the_cores_that_compute(
    on_gpu: bool,
    offload: bool,
    staleness: int,
    asked: int | None,
    threads: int | None,
    models: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    changes = {"learners_on_gpu": on_gpu, "offload_optimizer": offload, "max_staleness": staleness}
    spec = runs.make_spec(models, Scenario(spec=changes | {"num_threads": asked}))
    assert spec.threads(1) == threads


def assert_same(outcome: Outcome, wanted: Outcome, tolerance: float = 1e-5) -> None:
    for mine, theirs in zip(
        runs.without_wall_times(outcome.figures), runs.without_wall_times(wanted.figures), strict=True
    ):
        assert mine == pytest.approx(theirs, rel=tolerance, abs=tolerance)
    assert_same_weights(outcome.policy, wanted.policy, tolerance)
    assert_same_weights(outcome.critic, wanted.critic, tolerance)


def assert_same_weights(mine: runs.Weights, theirs: runs.Weights, tolerance: float) -> None:
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=0.0, atol=tolerance, msg=name)


def one_microbatch(batch: SequenceBatch, *, packed: bool = False) -> Microbatch:
    return lay_out(batch, range(len(batch)), packed=packed, device=CPU)


def estimates_of(learner: Learner, batch: SequenceBatch) -> Any:
    """What the learner computes before the first step, advantages included."""
    scenario = Scenario(num_minibatches=1)
    own, plan = runs.share_of(batch, scenario)
    microbatches = {
        rows: lay_out(own, rows, packed=False, device=CPU)
        for minibatch in plan.minibatches
        for rows in minibatch.microbatches
    }
    estimates, _ = learner._estimate(own, microbatches, plan, update_policy=True)
    return own, learner._credit.assign(own, estimates, MetricSums())[0]


# Denominators are global: no split of the batch changes figures or weights.


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_ranks_with_small_microbatches_do_what_one_rank_does(
    name: str, on_one_rank: Callable[[str], Outcome], two_ranks: tuple[Path, RankResult, RankResult]
) -> None:
    _, first, second = two_ranks

    assert_same(first.outcomes[name], on_one_rank(name))
    assert runs.without_wall_times(first.outcomes[name].figures) == runs.without_wall_times(
        second.outcomes[name].figures
    )


def test_two_ranks_with_large_microbatches_do_what_one_rank_does(
    on_one_rank: Callable[[str], Outcome], two_ranks: tuple[Path, RankResult, RankResult]
) -> None:
    assert_same(two_ranks[1].in_large_microbatches, on_one_rank("token_mean"))


@pytest.mark.parametrize("name", ["token_mean", "kl_in_loss"])
def test_small_microbatches_change_nothing_on_one_rank(
    name: str, on_one_rank: Callable[[str], Outcome], models: Path
) -> None:
    assert_same(runs.run(runs.in_small_microbatches(SCENARIOS[name]), models), on_one_rank(name))


def test_packed_rows_learn_the_same_as_padded_ones(
    on_one_rank: Callable[[str], Outcome],
    two_ranks: tuple[Path, RankResult, RankResult],
    models: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    padded = runs.run(replace(SCENARIOS["packed"], packed=False), models)
    monkeypatch.setattr("rlhf_ray.learner.packed_rows.skips_other_sequences", lambda kernel: True)
    by_block_mask = runs.run(replace(SCENARIOS["packed"], spec={"attn_implementation": "sdpa"}), models)

    for packed in (on_one_rank("packed"), two_ranks[1].outcomes["packed"], by_block_mask):
        assert packed.figures[-1]["value_loss"] == pytest.approx(padded.figures[-1]["value_loss"], rel=1e-6)
        assert_same_weights(packed.policy, padded.policy, 1e-6)
        assert_same_weights(packed.critic, padded.critic, 1e-6)


def test_packed_rows_are_read_as_padded_ones(make_learner: Callable[..., Learner]) -> None:
    """Log-probabilities and values, whatever the other sequences of the row hold; the longest alone, too."""
    learner = make_learner(Scenario(packed=True))
    batch = runs.make_batch(9, seed=5)
    ends = np.cumsum(batch.lengths)
    garbage = batch.token_ids.copy()
    garbage[: ends[7]] = 3
    longest = int(batch.lengths.argmax())

    def read(batch: SequenceBatch, rows: range, *, packed: bool) -> tuple[torch.Tensor, torch.Tensor]:
        micro = lay_out(batch, rows, packed=packed, device=CPU)
        return learner._models.score(micro)[0], learner._models.values(micro)[micro.value_index] * micro.mask

    with torch.no_grad():
        for rows in (range(9), range(longest, longest + 1)):
            both = zip(read(batch, rows, packed=True), read(batch, rows, packed=False), strict=True)
            for packed, padded in both:
                torch.testing.assert_close(packed, padded, rtol=1e-6, atol=1e-6)
        one, other = (read(each, range(9), packed=True) for each in (batch, replace(batch, token_ids=garbage)))
    assert not torch.equal(one[0][7], other[0][7])
    assert all(torch.equal(mine[8], theirs[8]) for mine, theirs in zip(one, other, strict=True))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sliding_windows_in_packed_rows_learn_the_same(checkpointing: bool, tmp_path: Path) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"vocab_size": runs.VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "num_key_value_heads": 2}
    MistralForCausalLM(MistralConfig(**sizes, **tokens, sliding_window=4, initializer_range=0.2)).save_pretrained(
        tmp_path / "policy"
    )
    scenario = Scenario(critic="policy", num_epochs=2, packed=True, spec={"gradient_checkpointing": checkpointing})

    packed, padded = (runs.run(each, tmp_path) for each in (scenario, replace(scenario, packed=False)))

    assert_same_weights(packed.policy, padded.policy, 1e-6)
    assert_same_weights(packed.critic, padded.critic, 1e-6)


def test_an_export_does_not_name_what_it_was_trained_with(models: Path, tmp_path: Path) -> None:
    runs.build(models, Scenario(packed=True)).export(str(tmp_path))

    for folder in (tmp_path, tmp_path / "critic"):
        assert "varlen" not in (folder / "config.json").read_text()


def test_a_critic_that_mixes_packed_sequences_gets_padded_rows(models: Path, tmp_path: Path) -> None:
    """Convolutions read the tokens before a sequence, whatever its attention does; a new head shows nothing of it."""
    (tmp_path / "policy").symlink_to(models / "policy")
    AutoModelForCausalLM.from_config(tiny_config("lfm2")).save_pretrained(tmp_path / "critic")

    assert not Learner(runs.make_spec(tmp_path, Scenario(packed=True))).packed


def test_lengths_stay_integers_in_half_precision(models: Path) -> None:
    scenario = Scenario(num_minibatches=1, packed=True, spec={"dtype": "bfloat16"})

    packed, padded = (runs.run(each, models) for each in (scenario, replace(scenario, packed=False)))

    assert packed.figures[0]["grad_norm"] == pytest.approx(padded.figures[0]["grad_norm"], rel=0.05)


def test_ranks_say_once_what_rows_they_read(models: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="rlhf_ray.learner"):
        runs.build(models, Scenario(packed=True))
        padded = runs.build(models, Scenario())
        # Nothing is computed there: SDPA is not asked.
        can_pack(padded._models.score, None, torch.device("cuda", 0), torch.float32)

    said = [record for record in caplog.records if record.name == "rlhf_ray.learner.packed_rows"]
    assert [(record.levelname, record.message) for record in said] == [
        ("INFO", "learners read packed rows, attention by varlen"),
        ("INFO", "learners read padded rows, attention by sdpa"),
        ("WARNING", "learners read padded rows, attention by sdpa"),
    ]


@pytest.mark.parametrize("name", ["token_mean", "packed", "kl_in_loss", "grpo", "stale", "lora", "small_critic"])
def test_every_trainable_parameter_moves(name: str, models: Path) -> None:
    scenario = SCENARIOS[name]
    learner = runs.build(models, scenario)
    before = {model: trainable(model) for model in learner._models.trained.values()}

    runs.update(learner, scenario, 0)

    for model, weights in before.items():
        after = trainable(model)
        assert [each for each in weights if torch.equal(weights[each], after[each])] == []


def test_every_parameter_moves_where_a_probe_was_broken_off(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backbone wants an argument that only the model itself passes on, and asks for it at its end."""
    from transformers import Qwen2Model

    forward = Qwen2Model.forward

    def demanding(backbone: Any, **inputs: Any) -> Any:
        output = forward(backbone, **inputs)
        inputs["attention_mask"]
        return output

    def picky(backbone: Any, *args: Any, **inputs: Any) -> Any:
        try:
            return demanding(backbone, *args, **inputs)
        except KeyError as error:
            raise TypeError("attention_mask is missing") from error

    monkeypatch.setattr(Qwen2Model, "forward", picky)
    learner = Learner(runs.make_spec(models, Scenario(training={"advantage": "grpo"})))
    before = trainable(learner.policy)

    runs.update(learner, Scenario(), 0)

    assert learner._models.score.head is None
    after = trainable(learner.policy)
    assert [each for each in before if torch.equal(before[each], after[each])] == []


def trainable(trained: TrainedModel) -> dict[str, torch.Tensor]:
    named = trained.model.named_parameters()
    return {name: one.detach().full_tensor().clone() for name, one in named if one.requires_grad}


def test_recomputed_activations_change_nothing(on_one_rank: Callable[[str], Outcome], models: Path) -> None:
    scenario = replace(SCENARIOS["token_mean"], spec={"gradient_checkpointing": True})

    assert_same(runs.run(scenario, models), on_one_rank("token_mean"))


@pytest.mark.parametrize("name", ["kl_in_reward", "lora"])
def test_models_in_cpu_memory_learn_the_same(name: str, on_one_rank: Callable[[str], Outcome], models: Path) -> None:
    scenario = SCENARIOS[name]
    offloaded = scenario.spec | {"offload_reference": True, "offload_optimizer": True}

    assert_same(runs.run(replace(scenario, spec=offloaded), models), on_one_rank(name))


@pytest.mark.slow
def test_compiled_layers_learn_the_same(on_one_rank: Callable[[str], Outcome], models: Path) -> None:
    """By PyTorch's backend that traces as the others do and generates no code: inductor takes a minute."""
    scenario = replace(SCENARIOS["kl_in_loss"], spec={"compile_backend": "aot_eager"})
    torch._dynamo.utils.counters.clear()

    assert_same(runs.run(scenario, models), on_one_rank("kl_in_loss"))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_the_scenarios_hold_what_they_say() -> None:
    """Idle ranks, empty microbatches, and runs that really move both models."""

    def plan(name: str) -> Any:
        scenario = runs.in_small_microbatches(SCENARIOS[name])
        batch = runs.make_batch(scenario.num_sequences, seed=100)
        return plan_update(
            batch.lengths.tolist(),
            batch.completion_lengths.tolist(),
            num_minibatches=scenario.num_minibatches,
            num_epochs=scenario.num_epochs,
            num_ranks=2,
            max_tokens=scenario.max_tokens,
            attention_length=1536.0,
            packed=False,
            seed=0,
        )

    assert plan("idle_rank").sequences[1] == ()
    assert any(rows == () for share in plan("empty_microbatch").ranks for rows in share.minibatches[0].microbatches)
    assert len(plan("token_mean").ranks[0].minibatches[0].microbatches) > 1


def test_aggregations_differ(on_one_rank: Callable[[str], Outcome]) -> None:
    losses = {round(on_one_rank(mode).figures[0]["value_loss"], 6) for mode in runs.AGGREGATIONS}

    assert len(losses) == len(runs.AGGREGATIONS)


def test_updates_move_both_models(on_one_rank: Callable[[str], Outcome], make_learner: Callable[..., Learner]) -> None:
    start, end = make_learner(), on_one_rank("token_mean")

    for before, after in (
        (runs.full_weights(start.policy), end.policy),
        (runs.full_weights(start.critic), end.critic),
    ):
        assert max(float((after[name] - before[name]).abs().max()) for name in before) > 1e-3


@pytest.mark.parametrize("name", ["kl_in_reward", "kl_in_loss"])
def test_every_figure_is_declared(name: str, on_one_rank: Callable[[str], Outcome]) -> None:
    for figure in on_one_rank(name).figures[0]:
        assert metric_for(f"{'timers' if figure in runs.WALL_TIMES else 'learner'}/{figure}") is not None, figure


def test_both_ranks_refuse_what_one_of_them_cannot_use(
    models: Path, two_ranks: tuple[Path, RankResult, RankResult]
) -> None:
    group = runs.batch_of(runs.REFUSED, 1).group_ids[3]

    refusals = {runs.refusal(models), *(rank.refusal for rank in two_ranks[1:])}

    assert len(refusals) == 1
    assert refusals.pop().startswith(f"rewards not finite, first in sequence 3 of the batch, of group {group}; ")


# The host waits for the device a few times a step, however many microbatches there are.


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a GPU: numbers that it reads, and sizes that the numbers decide."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.count += name in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2")
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            self.count += any(index is not None and index.dtype == torch.bool for index in args[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["kl_in_reward", "kl_in_loss", "stale", "stale_m2po", "lora", "packed", "masked"])
def test_more_microbatches_make_the_host_wait_no_more_often(
    name: str, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import masking_utils

    waits, find, tolist = Waits(), masking_utils.find_packed_sequence_indices, torch.Tensor.tolist
    attend = varlen_attention._sequence_by_sequence

    def found(positions: torch.Tensor) -> Any:
        waits.count -= 1  # Waits once a forward pass, in transformers.
        return find(positions)

    def attended(*arguments: Any, **more: Any) -> torch.Tensor:  # In the place of a GPU's kernel, which waits for none.
        before = waits.count
        answer = attend(*arguments, **more)
        waits.count = before
        return answer

    def listed(tensor: torch.Tensor) -> Any:  # On a CPU it dispatches nothing.
        waits.count += 1
        return tolist(tensor)

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", found)
    monkeypatch.setattr(varlen_attention, "_sequence_by_sequence", attended)
    monkeypatch.setattr(torch.Tensor, "tolist", listed)
    learner = runs.build(models, SCENARIOS[name])
    counts, microbatches = [], []
    for scenario in (SCENARIOS[name], runs.in_small_microbatches(SCENARIOS[name])):
        plan = runs.plan_of(runs.batch_of(scenario, 0), scenario, 0)
        microbatches.append(sum(len(minibatch.microbatches) for minibatch in plan.ranks[0].minibatches))
        waits.count = 0
        with waits:
            runs.update(learner, scenario, 0)
        counts.append(waits.count)

    assert microbatches[1] >= 3 * microbatches[0]
    assert counts[1] == counts[0]


# Heads compute in float32, whatever the layers below them do.


def on_bfloat16_grid(tensor: torch.Tensor) -> bool:
    return torch.equal(tensor, tensor.bfloat16().float())


def states_below_the_head(model: torch.nn.Module, seen: list[torch.Tensor]) -> None:
    """Collect the last hidden states of each forward pass."""
    backbone = getattr(model, model.base_model_prefix)
    backbone.register_forward_hook(lambda _, __, output: seen.append(output.last_hidden_state))


def test_values_and_their_gradient_are_those_of_a_float32_head(make_learner: Callable[..., Learner]) -> None:
    learner = make_learner(runs.IN_BFLOAT16)
    head, seen = learner.critic.model.score, []
    weight, bias = head.weight.full_tensor().detach(), head.bias.full_tensor().detach()
    states_below_the_head(learner.critic.model, seen)

    values = learner._models.values(one_microbatch(runs.make_batch(5, seed=1)))
    values.sum().backward()

    assert seen[0].dtype == torch.bfloat16
    states = seen[0].detach().float().flatten(0, 1)
    assert not on_bfloat16_grid(values)
    torch.testing.assert_close(values, states @ weight[0] + bias, rtol=1e-6, atol=1e-6)
    gradient = head.weight.grad.full_tensor()[0]
    assert not on_bfloat16_grid(gradient)
    torch.testing.assert_close(gradient, states.sum(dim=0), rtol=1e-6, atol=1e-5)


def in_bfloat16(models: Path, folder: Path, *, tied: bool) -> Scenario:
    """Of a policy whose output layer is tied to the embedding, or is another one that bfloat16 would round."""
    from transformers import Qwen2ForCausalLM

    policy = Qwen2ForCausalLM.from_pretrained(models / "policy")
    policy.config.tie_word_embeddings = tied
    if not tied:
        policy.lm_head.weight = torch.nn.Parameter(policy.lm_head.weight.detach().flip(0) * 1.0001)
    policy.save_pretrained(folder)
    return replace(runs.IN_BFLOAT16, spec=runs.IN_BFLOAT16.spec | {"policy_path": str(folder)})


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("adopted", [True, False])
def test_logprobs_are_those_of_a_float32_head(
    tied: bool, adopted: bool, models: Path, tmp_path: Path, make_learner: Callable[..., Learner]
) -> None:
    scenario = in_bfloat16(models, tmp_path, tied=tied)
    learner = make_learner(scenario, kl_in="loss")
    if not adopted:  # As the reference, which is a model of the same class.
        for scorer in (learner._models.score, learner._models.reference):
            object.__setattr__(scorer, "head", None)
    head, seen = learner.policy.model.lm_head, []
    weight = head.weight.full_tensor().detach()
    weight = weight.bfloat16().float() if tied else weight  # The embedding is gathered in bfloat16, for both.
    states_below_the_head(learner.policy.model, seen)
    micro = one_microbatch(runs.make_batch(5, seed=1))

    logprobs, entropies = learner._models.score(micro)
    (logprobs - entropies).sum().backward()

    assert seen[0].dtype == torch.bfloat16
    states = seen[0].detach().float().flatten(0, 1)[micro.value_index]
    tokens = micro.input_ids.flatten()[micro.value_index + 1]
    wanted = torch.log_softmax(states @ weight.T / 0.8, dim=-1).gather(-1, tokens[..., None])[..., 0] * micro.mask
    assert not on_bfloat16_grid(logprobs)
    torch.testing.assert_close(logprobs, wanted, rtol=1e-6, atol=2e-6)
    if not tied:
        assert not on_bfloat16_grid(head.weight.grad.full_tensor())
    # The reference rounds what the policy rounds, and nothing else.
    assert runs.update(learner, replace(scenario, num_minibatches=1), 0)["kl_to_reference"] == 0.0


@pytest.mark.parametrize("tied", [True, False])
def test_a_gpu_gathers_the_output_layer_in_the_type_that_engines_have_it_in(
    tied: bool, models: Path, tmp_path: Path, make_learner: Callable[..., Learner], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf_ray.learner.build.sums_halves_in_float32", lambda device: True)
    scenario = in_bfloat16(models, tmp_path, tied=tied)
    learner, gathered, seen = make_learner(scenario, kl_in="loss"), [], []
    head = learner.policy.model.lm_head
    head.register_forward_hook(lambda layer, *_: gathered.append(layer.weight.dtype))
    weight = head.weight.full_tensor().detach().bfloat16().float()
    states_below_the_head(learner.policy.model, seen)
    micro = one_microbatch(runs.make_batch(5, seed=1))

    logprobs, _ = learner._models.score(micro)
    logprobs.sum().backward()

    assert gathered == [torch.bfloat16]
    states = seen[0].detach().float().flatten(0, 1)[micro.value_index]
    tokens = micro.input_ids.flatten()[micro.value_index + 1]
    wanted = torch.log_softmax(states @ weight.T / 0.8, dim=-1).gather(-1, tokens[..., None])[..., 0] * micro.mask
    torch.testing.assert_close(logprobs, wanted, rtol=1e-6, atol=2e-6)
    assert head.weight.grad.dtype == head.weight.dtype == torch.float32
    assert runs.update(learner, replace(scenario, num_minibatches=1), 0)["kl_to_reference"] == 0.0


def test_two_ranks_learn_in_bfloat16_what_one_rank_does(
    models: Path, two_ranks: tuple[Path, RankResult, RankResult], make_learner: Callable[..., Learner]
) -> None:
    start, mine, theirs = make_learner(), runs.run(runs.IN_BFLOAT16, models), two_ranks[1].outcomes["in_bfloat16"]

    for before, one, other in (
        (runs.full_weights(start.policy), mine.policy, theirs.policy),
        (runs.full_weights(start.critic), mine.critic, theirs.critic),
    ):
        moved = {name: (one[name] - before[name]).norm() for name in one}
        assert all(moved.values())
        # Not by elements: where a gradient is about as large as its rounding, Adam's step is too.
        assert [name for name in one if (other[name] - one[name]).norm() > 0.2 * moved[name]] == []


# The first ratio is exactly 1, and no forward pass is wasted on knowing it.


@pytest.mark.parametrize("name", ["kl_in_reward", "rloo_kl_in_reward", "adapted_kl", "lora"])
def test_first_ratio_is_exactly_one(
    name: str, on_one_rank: Callable[[str], Outcome], two_ranks: tuple[Path, RankResult, RankResult]
) -> None:
    figures = on_one_rank(name).figures + two_ranks[1].outcomes[name].figures

    with_policy = [one for one in figures if "policy_loss" in one]
    assert with_policy
    assert [one["first_ratio_deviation_max"] for one in with_policy] == [0.0] * len(with_policy)


def test_later_steps_do_move_the_ratio(on_one_rank: Callable[[str], Outcome]) -> None:
    assert on_one_rank("kl_in_reward").figures[0]["ratio_max"] > 1.01


@pytest.mark.parametrize(
    ("minibatches", "epochs", "forwards"),
    # One microbatch a minibatch: a proximal pass of each but the first step's, then one pass a step.
    [(1, 1, 0 + 1), (2, 1, 1 + 2), (1, 2, 0 + 2), (2, 2, 1 + 4)],
)
def test_proximal_pass_is_skipped_where_the_first_step_gives_it(
    minibatches: int, epochs: int, forwards: int, policy_forwards: Callable[[Scenario], int]
) -> None:
    assert policy_forwards(Scenario(num_minibatches=minibatches, num_epochs=epochs)) == forwards


@pytest.mark.parametrize(("minibatches", "epochs"), [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_the_skipped_pass_would_have_given_the_same(
    minibatches: int, epochs: int, make_learner: Callable[..., Learner]
) -> None:
    """With a KL in the reward the proximal pass is made of every minibatch; a zero-like coefficient changes nothing."""
    scenario = Scenario(num_minibatches=minibatches, num_epochs=epochs)
    skipped, made = make_learner(scenario), make_learner(scenario, kl_coef=1e-30)

    figures = [runs.update(learner, scenario, 0) for learner in (skipped, made)]

    assert "first_ratio_deviation_max" not in figures[0]
    assert figures[0]["policy_loss"] == pytest.approx(figures[1]["policy_loss"], abs=1e-7)
    assert figures[0]["approx_kl"] == pytest.approx(figures[1]["approx_kl"], abs=1e-7)
    assert_same_weights(runs.full_weights(skipped.policy), runs.full_weights(made.policy), 1e-7)


def test_a_critic_that_warms_up_asks_nothing_of_the_policy(make_learner: Callable[..., Learner]) -> None:
    scenario = Scenario(update_policy=(False,))
    learner = make_learner(scenario, kl_coef=0.1, kl_in="loss")
    calls: list[int] = []
    for scorer in (learner._models.score, learner._models.reference):
        scorer.model.base_model.register_forward_hook(lambda *_: calls.append(1))

    figures = runs.update(learner, scenario, 0)

    assert calls == []
    assert figures["value_loss"] > 0.0


# Stale data.


def sampled_by_the_policy(
    batch: SequenceBatch, plain_logprobs: Callable[[SequenceBatch, float], Iterator[torch.Tensor]]
) -> SequenceBatch:
    return replace(batch, sampling_logprobs=torch.cat(list(plain_logprobs(batch, 0.8))).numpy())


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_fresh_data_has_weights_of_one(
    level: str,
    make_learner: Callable[..., Learner],
    models: Path,
    plain_logprobs: Callable[[SequenceBatch, float], Iterator[torch.Tensor]],
) -> None:
    batch = sampled_by_the_policy(runs.make_batch(9, seed=5), plain_logprobs)
    scenario = Scenario(training={"behavior_weights": level})
    on_policy = Learner(runs.make_spec(models, scenario))
    corrected = Learner(runs.make_spec(models, replace(scenario, spec={"max_staleness": 2})))

    on_policy.update(*runs.share_of(batch, scenario))
    figures = corrected.update(*runs.share_of(batch, scenario))

    assert figures["effective_sample_size"] == pytest.approx(1.0, abs=1e-5)
    assert figures["behavior_weight_mean"] == pytest.approx(1.0, abs=1e-5)
    assert_same_weights(runs.full_weights(corrected.policy), runs.full_weights(on_policy.policy), 1e-6)


def test_stale_tokens_are_weighted_and_their_distance_reported(
    models: Path, plain_logprobs: Callable[[SequenceBatch, float], Iterator[torch.Tensor]]
) -> None:
    """Sampled with half the probability that the policy gives: a weight of 2, whose gradient is twice the other."""
    batch = sampled_by_the_policy(runs.make_batch(9, seed=5), plain_logprobs)
    batch = replace(batch, sampling_logprobs=batch.sampling_logprobs - np.float32(np.log(2)))
    batch = replace(batch, staleness=np.full(len(batch.sampling_logprobs), 3, dtype=np.int32))
    scenario = Scenario(num_minibatches=1, training={"max_grad_norm": None})
    figures = [
        Learner(runs.make_spec(models, replace(scenario, spec={"max_staleness": bound}))).update(
            *runs.share_of(batch, scenario)
        )
        for bound in (0, 3)
    ]

    assert figures[1]["behavior_weight_mean"] == pytest.approx(2.0, abs=1e-4)
    assert figures[1]["grad_norm"] == pytest.approx(2 * figures[0]["grad_norm"], rel=1e-4)
    assert figures[1]["proximal_logprob_diff_by_staleness/3"] == pytest.approx(np.log(2), abs=1e-5)
    assert "behavior_weight_mean" not in figures[0]


def test_what_a_quantized_engine_samples_is_corrected_for(
    models: Path,
    monkeypatch: pytest.MonkeyPatch,
    plain_logprobs: Callable[[SequenceBatch, float], Iterator[torch.Tensor]],
) -> None:
    """The gradient is that of ``-sum(w A log p) / tokens``, ``w = min(p / sampled, cap)``; without a version apart."""
    from transformers import AutoModelForCausalLM

    batch = sampled_by_the_policy(runs.make_batch(9, seed=5), plain_logprobs)
    rounding = np.random.default_rng(0).normal(0.0, 0.7, len(batch.sampling_logprobs)).astype(np.float32)
    batch = replace(batch, sampling_logprobs=batch.sampling_logprobs + rounding)
    training = {"advantage": "grpo", "behavior_cap": 1.5, "max_grad_norm": None}
    scenario = Scenario(num_minibatches=1, training=training, spec={"quantization": "fp8"})
    learner = Learner(runs.make_spec(models, scenario))
    gradients: dict[str, torch.Tensor] = {}

    def keep(trained: TrainedModel, grad_norm: torch.Tensor) -> None:
        gradients.update({name: p.grad.full_tensor().clone() for name, p in trained.model.named_parameters()})

    monkeypatch.setattr(TrainedModel, "step", keep)
    share, plan = runs.share_of(batch, scenario)
    figures = learner.update(share, plan, keep_estimates=True)

    policy = AutoModelForCausalLM.from_pretrained(models / "policy").eval()
    assert learner.token_estimates is not None
    advantages = np.concatenate([one.advantages for one in learner.token_estimates])
    logprobs = torch.cat(list(completion_logprobs(policy, share, 0.8)))
    weights = (logprobs.detach() - torch.tensor(share.sampling_logprobs)).exp()
    assert (weights > 1.5).any()
    loss = -(weights.clamp(max=1.5) * torch.tensor(advantages) * logprobs).sum() / len(logprobs)
    loss.backward()
    wanted = dict(policy.named_parameters())
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name].grad, rtol=1e-4, atol=1e-6)
    assert figures["behavior_weight_mean"] == pytest.approx(float(weights.clamp(max=1.5).mean()), abs=1e-5)
    assert figures["sampling_logprob_diff_max"] == pytest.approx(np.abs(rounding).max(), abs=1e-4)
    assert 0.0 < figures["effective_sample_size"] < 1.0


def test_engine_and_learner_are_compared_on_on_policy_completions_alone(
    models: Path, plain_logprobs: Callable[[SequenceBatch, float], Iterator[torch.Tensor]]
) -> None:
    batch = sampled_by_the_policy(runs.make_batch(5, seed=5), plain_logprobs)
    ends = np.cumsum(batch.completion_lengths)
    sampling, staleness = batch.sampling_logprobs.copy(), np.zeros(ends[-1], dtype=np.int32)
    # One stale token, and another one of the same completion that is far off for its sake.
    staleness[ends[0]] = 1
    on_policy = np.asarray([True, False, True, True, True])
    sampling[ends[0] + 1] -= 4.0
    sampling[ends[2]] -= 0.5
    scenario = Scenario(num_minibatches=1, spec={"max_staleness": 1})
    batch = replace(batch, sampling_logprobs=sampling, staleness=staleness, on_policy=on_policy)

    figures = Learner(runs.make_spec(models, scenario)).update(*runs.share_of(batch, scenario))

    assert figures["sampling_logprob_diff_max"] == pytest.approx(0.5, abs=1e-5)


def test_the_loglinear_policy_takes_no_forward_pass(policy_forwards: Callable[[Scenario], int]) -> None:
    assert policy_forwards(Scenario(num_minibatches=2, num_epochs=2, training={"proximal": "loglinear"})) == 4


# Truncated completions bootstrap from the critic; finished ones do not.


def critic_values(models: Path, batch: SequenceBatch, folder: str = "critic") -> list[torch.Tensor]:
    """``[P + T]`` values of each sequence by plain transformers, one sequence at a time."""
    from transformers import AutoModelForTokenClassification

    critic = AutoModelForTokenClassification.from_pretrained(models / folder).eval()
    ends = np.cumsum(batch.lengths)
    sequences = [batch.token_ids[end - n : end] for end, n in zip(ends, batch.lengths, strict=True)]
    with torch.no_grad():
        return [critic(torch.tensor(s[None, :], dtype=torch.int64)).logits[0, :, 0] for s in sequences]


def test_only_truncated_completions_bootstrap(models: Path, make_learner: Callable[..., Learner]) -> None:
    batch = runs.make_batch(4, seed=1)
    batch = replace(batch, truncated=np.asarray([True, False, True, False]))
    # With lambda = 1 a return is the discounted sum of rewards, whatever the values in between.
    learner = make_learner(gamma=0.9, lambda_=1.0)

    own, estimates = estimates_of(learner, batch)

    assert own.truncated.sum() == 2
    for row, values in enumerate(critic_values(models, own)):
        length = int(own.completion_lengths[row])
        after = float(values[-1]) if own.truncated[row] else 0.0
        left = np.arange(length - 1, -1, -1)
        wanted = 0.9**left * (own.rewards[row] + 0.9 * after)
        np.testing.assert_allclose(estimates.returns[row, :length].numpy(), wanted, atol=2e-5)
        assert not estimates.returns[row, length:].any()


def test_values_are_those_of_the_state_before_each_token(models: Path, make_learner: Callable[..., Learner]) -> None:
    own, estimates = estimates_of(make_learner(), runs.make_batch(5, seed=2))

    for row, values in enumerate(critic_values(models, own)):
        start, length = int(own.prompt_lengths[row]) - 1, int(own.completion_lengths[row])
        torch.testing.assert_close(estimates.values[row, :length], values[start : start + length], rtol=0.0, atol=1e-5)


def test_a_critic_without_a_head_starts_at_zero(make_learner: Callable[..., Learner]) -> None:
    scenario = Scenario(critic="policy", num_minibatches=1)

    figures = runs.update(make_learner(scenario), scenario, 0)

    assert figures["value_mean"] == 0.0
    # So truncation has nothing to bootstrap from: the first return is the reward, at lambda-return of zero values.
    assert figures["explained_variance"] == pytest.approx(0.0, abs=1e-6)


def test_a_new_head_can_start_at_the_mean_reward(make_learner: Callable[..., Learner]) -> None:
    scenario = Scenario(critic="policy", num_minibatches=1, training={"value_init": "reward_mean"})
    learner = make_learner(scenario)
    figures = [runs.update(learner, scenario, number) for number in range(2)]

    # Its weights are zero, so the bias is the value of every state.
    assert figures[0]["value_mean"] == pytest.approx(runs.make_batch(9, seed=100).rewards.mean(), abs=1e-6)
    # Set once: the second update starts where the first one left the critic.
    assert figures[1]["value_mean"] != pytest.approx(runs.make_batch(9, seed=101).rewards.mean(), abs=1e-3)


def test_a_head_that_the_checkpoint_brings_is_kept(make_learner: Callable[..., Learner]) -> None:
    kept, set_to_mean = (
        runs.update(make_learner(scenario), scenario, 0)["value_mean"]
        for scenario in (Scenario(), Scenario(training={"value_init": "reward_mean"}))
    )

    assert kept == set_to_mean


def test_without_a_need_for_values_there_is_no_critic(tmp_path: Path, make_learner: Callable[..., Learner]) -> None:
    scenario = SCENARIOS["grpo"]
    learner = make_learner(scenario)
    figures = runs.update(learner, scenario, 0)
    learner.save(str(tmp_path / "checkpoint")).result()
    learner.export(str(tmp_path / "export"))
    learner.load(str(tmp_path / "checkpoint"))

    assert learner.critic is None
    assert not {"value_loss", "explained_variance", "critic_lr", "critic_grad_norm", "value_mean"} & figures.keys()
    assert not (tmp_path / "export" / "critic").exists()


def test_what_is_left_out_of_the_loss_changes_nothing_but_its_groups_baseline(
    make_learner: Callable[..., Learner],
) -> None:
    scenario = Scenario(training={"advantage": "grpo", "whiten_advantages": False}, num_minibatches=1)
    batch = runs.make_batch(12, seed=5, masked=True)
    # Other tokens where a completion is left out, but the same rewards.
    ends = np.cumsum(batch.lengths)
    tokens = batch.token_ids.copy()
    kept = batch.loss_lengths > 0
    for end, completion, is_kept in zip(ends, batch.completion_lengths, kept, strict=True):
        if not is_kept:
            tokens[end - completion : end] = 3
    assert not kept.all()
    weights = []
    for given in (batch, replace(batch, token_ids=tokens)):
        learner = make_learner(scenario)
        own, plan = runs.share_of(given, scenario)
        learner.update(own, plan)
        weights.append(runs.full_weights(learner.policy))

    assert_same_weights(*weights, tolerance=1e-7)
    # While a reward of one that is left out moves its group's mean.
    other_rewards = np.where(kept, batch.rewards, batch.rewards + 3.0).astype(np.float32)
    learner = make_learner(scenario)
    own, plan = runs.share_of(batch.with_rewards(other_rewards), scenario)
    learner.update(own, plan)
    moved = runs.full_weights(learner.policy)
    assert max(float((moved[name] - weights[0][name]).abs().max()) for name in moved) > 1e-5


@pytest.mark.parametrize(
    "training",
    [
        {"advantage": "gae", "lambda_": 0.9, "gamma": 0.99},
        {"advantage": "grpo", "whiten_advantages": False, "loss_aggregation": "seq_mean_token_mean"},
    ],
    ids=["gae", "grpo"],
)
def test_first_tokens_that_are_left_out_are_as_part_of_the_prompt(
    make_learner: Callable[..., Learner], training: dict[str, Any]
) -> None:
    scenario = Scenario(training=training, num_minibatches=2, num_epochs=2)
    batch = runs.make_batch(12, seed=8)
    starts = np.minimum(np.asarray([3, 0, 1, 2] * 3, dtype=np.int32), batch.completion_lengths - 1)
    in_loss = np.concatenate([np.arange(n) >= first for n, first in zip(batch.completion_lengths, starts, strict=True)])
    batch = replace(batch, loss_mask=in_loss)
    as_prompt = replace(
        batch,
        prompt_lengths=batch.prompt_lengths + starts,
        completion_lengths=batch.completion_lengths - starts,
        **{
            name: getattr(batch, name)[in_loss]
            for name in ("turn_ids", "follower_ids", "loss_mask", "sampling_logprobs", "staleness", "token_rewards")
        },
    )
    outcomes = []
    for given in (batch, as_prompt):
        learner = make_learner(scenario)
        own, plan = runs.share_of(given, scenario)
        figures = runs.without_wall_times([learner.update(own, plan)])[0]
        outcomes.append((figures, runs.full_weights(learner.policy)))
    (left_out, weights), (in_prompt, expected) = outcomes

    assert left_out == pytest.approx(in_prompt, rel=1e-4, abs=1e-6)
    assert_same_weights(weights, expected, tolerance=1e-6)


# Tokens that were observed between turns.


def two_turn_batch() -> SequenceBatch:
    """Four sequences; of completions of three tokens or more the second one was observed, the first turn has 0.5."""
    batch = runs.make_batch(4, seed=11)
    lengths = batch.completion_lengths
    firsts = np.cumsum(lengths) - lengths
    observed = np.zeros(len(batch.sampled), dtype=np.bool_)
    observed[firsts[lengths >= 3] + 1] = True
    rewards = batch.token_rewards.copy()
    rewards[firsts[lengths >= 3]] = 0.5
    sampling = np.where(observed, np.float32(0.0), batch.sampling_logprobs)
    assert 2 <= observed.sum() < 4
    return replace(
        batch,
        turn_ids=np.where(observed, -1, np.cumsum(observed)).astype(np.int32),
        loss_mask=~observed,
        sampling_logprobs=sampling,
        token_rewards=rewards,
        truncated=np.asarray([True, False, True, False]),
    )


def test_observed_tokens_are_no_steps_of_gae(models: Path, make_learner: Callable[..., Learner]) -> None:
    """By the recursion over sampled tokens alone, with a discount that is not 1."""
    learner = make_learner(gamma=0.9, lambda_=0.8, whiten_advantages=False)

    own, estimates = estimates_of(learner, two_turn_batch())

    ends = np.cumsum(own.completion_lengths)
    for row, values in enumerate(critic_values(models, own)):
        places = slice(ends[row] - own.completion_lengths[row], ends[row])
        steps = np.flatnonzero(own.sampled[places])
        states = values[int(own.prompt_lengths[row]) - 1 :].numpy()
        rewards = own.token_rewards[places]
        next_value, advantage = (float(states[-1]) if own.truncated[row] else 0.0), 0.0
        wanted = np.zeros(len(rewards))
        for step in reversed(steps):
            advantage = rewards[step] + 0.9 * next_value - states[step] + 0.9 * 0.8 * advantage
            next_value, wanted[step] = states[step], advantage
        np.testing.assert_allclose(estimates.advantages[row, : len(rewards)].numpy(), wanted, atol=2e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_observed_tokens_have_no_share_in_the_gradient(
    packed: bool, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient is that of ``-sum(A log p) / tokens`` over sampled tokens, ``A`` of whole rewards in groups."""
    scenario = Scenario(
        num_minibatches=1,
        packed=packed,
        training={"advantage": "dr_grpo", "whiten_advantages": False, "max_grad_norm": None},
    )
    learner = runs.build(models, scenario)
    gradients: dict[str, torch.Tensor] = {}

    def keep(trained: TrainedModel, grad_norm: torch.Tensor) -> None:
        gradients.update({name: p.grad.full_tensor().clone() for name, p in trained.model.named_parameters()})

    monkeypatch.setattr(TrainedModel, "step", keep)
    share, plan = runs.share_of(two_turn_batch(), scenario)
    figures = learner.update(share, plan, keep_estimates=True)

    assert learner.token_estimates is not None
    kept = [one.advantages for one in learner.token_estimates]
    advantages = torch.tensor(np.concatenate(kept))
    sampled = torch.tensor(share.sampled)
    assert torch.equal(advantages.isnan(), ~sampled)
    baselines = [share.rewards[share.group_ids == group].mean() for group in share.group_ids]
    for row, own in enumerate(kept):
        np.testing.assert_allclose(own[~np.isnan(own)], share.rewards[row] - baselines[row], atol=1e-5)
    policy = AutoModelForCausalLM.from_pretrained(models / "policy").eval()
    logprobs = torch.cat(list(completion_logprobs(policy, share, 0.8)))
    (-(advantages[sampled] * logprobs[sampled]).sum() / sampled.sum()).backward()
    for name, wanted in policy.named_parameters():
        torch.testing.assert_close(gradients[name], wanted.grad, rtol=1e-4, atol=1e-6)
    exact = (logprobs.detach() - torch.tensor(share.sampling_logprobs)).abs()[sampled]
    assert figures["sampling_logprob_diff_max"] == pytest.approx(float(exact.max()), rel=1e-5)


# The KL to the reference.


def test_the_kl_coefficient_follows_its_target_and_is_saved(
    tmp_path: Path, make_learner: Callable[..., Learner]
) -> None:
    scenario = replace(SCENARIOS["adapted_kl"], update_policy=(True, True, True))
    learner = make_learner(scenario)
    first = runs.update(learner, scenario, 0)
    second = runs.update(learner, scenario, 1)
    learner.save(str(tmp_path)).result()
    third = runs.update(learner, scenario, 2)
    restored = make_learner(scenario)
    restored.load(str(tmp_path))

    # No KL yet: the lowest error, -0.2, over 9 of a horizon of 20 completions.
    assert first["kl_coef"] == 0.3
    assert second["kl_coef"] == pytest.approx(0.3 * (1 - 0.2 * 9 / 20))
    assert third["kl_coef"] not in (first["kl_coef"], second["kl_coef"])
    assert runs.update(restored, scenario, 2)["kl_coef"] == third["kl_coef"]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("place", ["reward", "loss"])
def test_kl_to_the_reference_is_zero_at_first_and_not_later(
    estimator: str, place: str, make_learner: Callable[..., Learner]
) -> None:
    scenario = Scenario()
    learner = make_learner(scenario, kl_coef=0.1, kl_estimator=estimator, kl_in=place)

    first, second = (runs.update(learner, scenario, number) for number in (0, 1))

    assert first["kl_to_reference"] == 0.0
    assert abs(second["kl_to_reference"]) > 1e-5
    if estimator != "k1":
        assert second["kl_to_reference"] > 0.0


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_in_the_reward_is_taken_off_every_token(
    estimator: str, models: Path, make_learner: Callable[..., Learner]
) -> None:
    learner = make_learner(kl_coef=0.5, kl_estimator=estimator, gamma=1.0, lambda_=1.0)
    runs.update(learner, Scenario(), 0)
    batch = runs.make_batch(4, seed=3)
    batch = replace(batch, truncated=np.zeros(4, dtype=np.bool_))

    own, estimates = estimates_of(learner, batch)

    d = estimates.proximal_logprobs - estimates.ref_logprobs
    penalty = {"k1": d, "k2": d**2 / 2, "k3": torch.exp(-d) - 1 + d}[estimator] * estimates.mask
    assert penalty.abs().sum() > 1e-3
    wanted = torch.tensor(own.rewards) - 0.5 * penalty.sum(dim=1)
    torch.testing.assert_close(estimates.returns[:, 0], wanted, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("advantage", ["gae", "dr_grpo"])
@pytest.mark.parametrize(
    ("estimator", "measured", "kl_clip", "penalty"),
    [("k3", 2971.958, None, 2971.958), ("k3", 2971.958, 10.0, 10.0), ("k1", -8.0, 2.0, -2.0)],
)
def test_a_cap_bounds_the_kl_of_a_token_in_the_reward(
    advantage: str,
    estimator: str,
    measured: float,
    kl_clip: float | None,
    penalty: float,
    make_learner: Callable[..., Learner],
) -> None:
    settings = {"kl_coef": 0.5, "kl_estimator": estimator, "gamma": 1.0, "lambda_": 1.0, "whiten_advantages": False}
    learner = make_learner(advantage=advantage, kl_clip=kl_clip, **settings)
    batch = replace(runs.make_batch(4, seed=3), truncated=np.zeros(4, dtype=np.bool_))
    own, estimates = estimates_of(learner, batch)
    estimates = replace(estimates, ref_logprobs=estimates.proximal_logprobs.clone())
    without = learner._credit.assign(own, estimates, MetricSums())[0].advantages[0, 0].item()
    estimates.ref_logprobs[0, 0] += 8.0  # d = -8
    metrics = MetricSums()

    estimates, _ = learner._credit.assign(own, estimates, metrics)

    # Of dr_grpo's group the completion keeps the share that the mean does not take away.
    group = own.group_ids == own.group_ids[0]
    share = 1.0 if advantage == "gae" else 1.0 - 1.0 / group.sum()
    assert estimates.advantages[0, 0].item() - without == pytest.approx(-0.5 * penalty * share, rel=1e-5)
    figures = metrics.merge(num_steps=1)
    tokens = int(estimates.mask.sum())
    assert figures["kl_to_reference"] == pytest.approx(measured / tokens, rel=1e-5)
    assert figures.get("kl_clip_fraction") == (None if kl_clip is None else pytest.approx(1.0 / tokens))


@pytest.mark.parametrize("place", ["reward", "loss"])
def test_without_a_kl_coefficient_there_is_no_reference(place: str, make_learner: Callable[..., Learner]) -> None:
    learner = make_learner(kl_coef=0.0, kl_in=place)

    assert learner._models.reference is None
    assert "kl_to_reference" not in runs.update(learner, Scenario(), 0)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_in_the_loss_keeps_the_policy_near_the_reference(
    estimator: str, make_learner: Callable[..., Learner]
) -> None:
    """The same updates with and without weight on the KL; k2 of the result measures the distance of both alike."""
    scenario = Scenario(update_policy=(True,) * 4)
    batch = runs.make_batch(9, seed=103)
    distances = []
    for coefficient in (1e-12, 5.0):
        learner = make_learner(
            scenario, kl_coef=coefficient, kl_estimator=estimator, kl_in="loss", lr=1e-2, max_grad_norm=None
        )
        for number in range(4):
            runs.update(learner, scenario, number)
        micro = one_microbatch(batch)
        with torch.no_grad():
            d = learner._models.score(micro)[0] - learner._models.reference(micro)[0]
        distances.append(float((d * micro.mask).square().sum() / 2))
    assert distances[1] < 0.7 * distances[0]


def test_entropy_bonus_raises_the_entropy(make_learner: Callable[..., Learner]) -> None:
    scenario = Scenario(update_policy=(True,) * 4)
    entropies = []
    for coefficient in (0.0, 1.0):
        learner = make_learner(scenario, entropy_coef=coefficient, lr=1e-2)
        entropies.append([runs.update(learner, scenario, number)["entropy"] for number in range(4)][-1])
    assert entropies[1] > entropies[0] + 1e-2


# The critic's warm-up.


def test_warmup_leaves_the_policy_bit_identical_and_trains_the_critic(make_learner: Callable[..., Learner]) -> None:
    scenario = Scenario(update_policy=(False,))
    learner = make_learner(scenario)
    policy, critic = runs.full_weights(learner.policy), runs.full_weights(learner.critic)

    figures = runs.update(learner, scenario, 0)

    assert all(torch.equal(policy[name], after) for name, after in runs.full_weights(learner.policy).items())
    assert not torch.equal(critic["score.weight"], runs.full_weights(learner.critic)["score.weight"])
    assert "value_loss" in figures
    assert "policy_loss" not in figures
    assert "grad_norm" not in figures


def test_the_critic_makes_passes_and_steps_of_its_own(make_learner: Callable[..., Learner]) -> None:
    scenario = SCENARIOS["critic_of_its_own"]
    learner = make_learner(scenario)
    metrics = runs.update(learner, scenario, 0)
    assert learner.critic is not None
    assert (learner.policy.steps_taken, learner.critic.steps_taken) == (4, 3)
    assert {"policy_loss", "value_loss", "grad_norm", "critic_grad_norm"} <= metrics.keys()


def test_a_step_of_the_critic_over_several_minibatches_is_one_over_their_union(
    make_learner: Callable[..., Learner],
) -> None:
    """Of one pass: the denominators are those of the union too, in each aggregation."""
    for aggregation in ("token_mean", "seq_mean_token_mean"):
        weights, losses = [], []
        for scenario in (
            Scenario(num_minibatches=4, training={"critic_num_minibatches": 1}),
            Scenario(num_minibatches=1),
        ):
            learner = make_learner(scenario, loss_aggregation=aggregation)
            losses.append(runs.update(learner, scenario, 0)["value_loss"])
            weights.append(runs.full_weights(learner.critic))
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        assert_same_weights(*weights, 1e-6)


def test_a_critic_of_bins_learns_the_distribution_of_returns(
    make_learner: Callable[..., Learner], monkeypatch: pytest.MonkeyPatch
) -> None:
    bins, low, high = 7, -2.0, 2.0
    training = {"value_bins": bins, "value_range": (low, high), "value_clip": None, "whiten_advantages": False}
    scenario = Scenario(num_sequences=5, num_minibatches=1, critic="policy")
    learner = make_learner(scenario, **training)
    gradients: dict[str, torch.Tensor] = {}
    step = TrainedModel.step

    def keep(trained: TrainedModel, grad_norm: torch.Tensor) -> None:
        if trained is learner.critic:
            gradients.update({name: p.grad.full_tensor().clone() for name, p in trained.model.named_parameters()})
        step(trained, grad_norm)

    monkeypatch.setattr(TrainedModel, "step", keep)
    own, plan = runs.share_of(runs.make_batch(5, seed=9), scenario)
    metrics = learner.update(own, plan, keep_estimates=True)

    assert learner.token_estimates is not None
    values = np.concatenate([one.values for one in learner.token_estimates])
    assert np.abs(values).max() < 1e-6, "a new head has a uniform distribution, whose mean is the middle"
    returns = torch.tensor(np.concatenate([one.advantages for one in learner.token_estimates]), dtype=torch.float64)
    width = (high - low) / bins
    normal = torch.distributions.Normal(returns.clamp(low, high)[:, None], 0.75 * width)
    edges = normal.cdf(torch.linspace(low, high, bins + 1, dtype=torch.float64)[None])
    target = edges.diff(dim=1) / (edges[:, -1:] - edges[:, :1])
    assert metrics["value_loss"] == pytest.approx(math.log(bins), rel=1e-5)
    torch.testing.assert_close(gradients["score.bias"].double(), (1 / bins - target).mean(dim=0), rtol=1e-4, atol=1e-6)
    assert learner.update(own, plan)["value_loss"] < metrics["value_loss"]


def test_a_warmup_ends_when_the_critic_explains_enough(make_learner: Callable[..., Learner]) -> None:
    scenario = Scenario(update_policy=(False, False))
    for enough, policy_steps in ((1.0, [0, 0]), (-1e6, [2, 4]), (None, [0, 0])):
        learner = make_learner(scenario, critic_warmup_explained_variance=enough)
        found = []
        for number in range(2):
            metrics = runs.update(learner, scenario, number)
            found.append(learner.policy.steps_taken)
            assert ("policy_loss" in metrics) == (policy_steps[number] > 0)
        assert found == policy_steps
    # It does not begin again, however little the critic explains of a later batch.
    learner = make_learner(scenario, critic_warmup_explained_variance=1.0)
    runs.update(learner, replace(scenario, update_policy=(True,)), 0)
    runs.update(learner, scenario, 1)
    assert learner.policy.steps_taken == 4


def test_returns_of_the_warmup_are_monte_carlo(make_learner: Callable[..., Learner]) -> None:
    learner = make_learner(Scenario(num_minibatches=1), gamma=1.0, lambda_=0.3)
    own, plan = runs.share_of(runs.make_batch(6, seed=5), Scenario(num_minibatches=1))
    microbatches = {rows: lay_out(own, rows, packed=False, device=CPU) for rows in plan.minibatches[0].microbatches}
    estimates, _ = learner._estimate(own, microbatches, plan, update_policy=False)
    assigned, _ = learner._credit.assign(own, estimates, MetricSums(), warms_up=True)
    assert assigned.returns is not None
    assert estimates.bootstrap is not None
    wanted = (torch.tensor(own.rewards) + estimates.bootstrap)[:, None] * estimates.mask
    torch.testing.assert_close(assigned.returns, wanted, rtol=1e-5, atol=1e-5)
    usual, _ = learner._credit.assign(own, estimates, MetricSums())
    assert usual.returns is not None
    assert (usual.returns - wanted).abs().max() > 0.1


@pytest.mark.parametrize("update_policy", [True, False])
def test_every_weight_is_sharded_again_after_an_update(
    update_policy: bool, make_learner: Callable[..., Learner]
) -> None:
    scenario = Scenario(update_policy=(update_policy,))
    learner = make_learner(scenario, kl_coef=0.1)

    runs.update(learner, scenario, 0)

    for model in (learner.policy.model, learner.critic.model, learner._models.reference.model):
        assert model is not None
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())


# Advantages for reports.


@pytest.mark.parametrize("name", ["token_mean", "kl_in_reward", "grpo", "masked", "stale", "idle_rank"])
def test_advantages_of_two_ranks_come_in_the_order_of_the_batch_and_are_those_of_one(
    name: str, on_one_rank: Callable[[str], Outcome], two_ranks: tuple[Path, RankResult, RankResult]
) -> None:
    def in_order(*outcomes: Outcome) -> UpdateResult:
        return merge_results([one.last for one in outcomes], [one.sequences for one in outcomes])

    _, first, second = two_ranks
    alone, together = in_order(on_one_rank(name)), in_order(first.outcomes[name], second.outcomes[name])
    assert alone.estimates is not None
    assert together.estimates is not None

    batch = runs.batch_of(SCENARIOS[name], len(SCENARIOS[name].update_policy) - 1)
    for tables in of_tokens(alone.estimates), of_tokens(together.estimates):
        for table in tables:
            assert [len(one) for one in table] == batch.completion_lengths.tolist()
            assert np.array_equal(~np.isnan(np.concatenate(table)), batch.loss_mask)
    # After a first update that differs by rounding between the two.
    for mine, theirs in zip(of_tokens(together.estimates), of_tokens(alone.estimates), strict=True):
        np.testing.assert_allclose(np.concatenate(mine), np.concatenate(theirs), atol=1e-4)


def of_tokens(estimates: tuple[TokenEstimates, ...]) -> list[list[Float32Array]]:
    """Advantages, and values where there are some, of each sequence."""
    values = [one.values for one in estimates if one.values is not None]
    assert len(values) in (0, len(estimates))
    return [[one.advantages for one in estimates], *([values] if values else [])]


@pytest.mark.parametrize("lora", [False, True])
def test_the_reference_may_be_another_model(models: Path, make_learner: Callable[..., Learner], lora: bool) -> None:
    from transformers import AutoModelForCausalLM

    spec = {"lora": LoraSpec(rank=2, alpha=4.0, targets=(), seed=0)} if lora else {}
    scenario = Scenario(num_sequences=5, num_minibatches=1, reference="transposed", spec=spec)
    learner = make_learner(scenario, kl_coef=0.5, kl_in="reward")
    reference = learner._models.reference
    assert reference is not None
    assert reference.model is not learner.policy.model
    assert not any(parameter.requires_grad for parameter in reference.model.parameters())
    batch = runs.make_batch(5, seed=2)
    own, plan = runs.share_of(batch, scenario)

    metrics = learner.update(own, plan)

    policy, teacher = (
        torch.cat(list(completion_logprobs(AutoModelForCausalLM.from_pretrained(models / name).eval(), batch, 0.8)))
        for name in ("policy", "transposed")
    )
    assert metrics["kl_to_reference"] == pytest.approx((policy - teacher).mean().item(), rel=1e-4)
    learner.offload()
    learner.onload()
    assert learner.update(own, plan)["kl_to_reference"] != metrics["kl_to_reference"], "the policy has moved"


def test_the_likelihood_of_successful_trajectories_is_added(
    models: Path,
    make_learner: Callable[..., Learner],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers import AutoModelForCausalLM

    scenario = Scenario(num_sequences=6, num_minibatches=1)
    batch = replace(runs.make_batch(6, seed=3), successful=np.asarray([1, 0, 0, 1, 0, 1], dtype=np.bool_))
    gradients: list[dict[str, torch.Tensor]] = []

    def keep(trained: TrainedModel, grad_norm: torch.Tensor) -> None:
        gradients.append({name: p.grad.full_tensor().clone() for name, p in trained.model.named_parameters()})

    monkeypatch.setattr(TrainedModel, "step", keep)
    metrics = []
    for coef in (0.0, 0.5):
        learner = make_learner(scenario, advantage="grpo", nll_coef=coef)
        own, plan = runs.share_of(batch, scenario)
        metrics.append(learner.update(own, plan))

    policy = AutoModelForCausalLM.from_pretrained(models / "policy").eval()
    logprobs = list(completion_logprobs(policy, batch, 0.8))
    imitated = torch.cat([one for one, success in zip(logprobs, batch.successful, strict=True) if success])
    nll = -imitated.mean()
    nll.backward()
    assert "nll_loss" not in metrics[0]
    assert metrics[1]["nll_loss"] == pytest.approx(nll.item(), rel=1e-5)
    for name, wanted in policy.named_parameters():
        added = gradients[1][name] - gradients[0][name]
        torch.testing.assert_close(added, 0.5 * wanted.grad, rtol=1e-3, atol=2e-6)


def test_kept_advantages_are_those_of_the_loss(make_learner: Callable[..., Learner]) -> None:
    scenario = Scenario(num_sequences=6, num_minibatches=3, num_epochs=2)
    learner = make_learner(scenario, advantage="dr_grpo", whiten_advantages=False)
    batch = runs.make_batch(6, seed=4).with_rewards(np.asarray([1, 0, 5, 2, 6, 4], dtype=np.float32))
    lengths = batch.completion_lengths
    left_out = [0, 0, 0, 0, lengths[4] - 1, lengths[5]]
    in_loss = [np.arange(n) >= first for n, first in zip(lengths, left_out, strict=True)]
    batch = replace(batch, group_ids=np.asarray([7, 7, 8, 7, 8, 8]), loss_mask=np.concatenate(in_loss))
    own, plan = runs.share_of(batch, scenario)

    learner.update(own, plan, keep_estimates=True)

    assert learner.token_estimates is not None
    kept = {
        index: one.advantages
        for index, one in zip(runs.plan_of(batch, scenario, 0).sequences[0], learner.token_estimates, strict=True)
    }
    assert all(one.values is None for one in learner.token_estimates)
    # Reward minus the mean of its group, at each token; NaN at what is left out of the loss.
    for index, wanted in enumerate([0, -1, 0, 1, 1, -1]):
        np.testing.assert_array_equal(kept[index], np.where(in_loss[index], wanted, np.nan))


def test_advantages_are_not_kept_where_nobody_asks(make_learner: Callable[..., Learner]) -> None:
    learner = make_learner()
    runs.update(learner, Scenario(), 0, keep_estimates=True)
    assert learner.token_estimates is not None

    runs.update(learner, Scenario(), 1)

    assert learner.token_estimates is None


@pytest.mark.parametrize("packed", [False, True])
def test_kept_values_are_the_critics_of_what_was_before_each_token(
    models: Path, make_learner: Callable[..., Learner], packed: bool
) -> None:
    scenario = Scenario(num_sequences=5, packed=packed)
    learner = make_learner(scenario)
    own, plan = runs.share_of(runs.make_batch(5, seed=8), scenario)

    learner.update(own, plan, keep_estimates=True)

    assert learner.token_estimates is not None
    kept = zip(learner.token_estimates, critic_values(models, own), own.prompt_lengths, strict=True)
    for estimates, wanted, prompt in kept:
        assert estimates.values is not None
        np.testing.assert_allclose(estimates.values, wanted[prompt - 1 : -1].numpy(), atol=1e-5)


# Saving and loading.


def weights_after_all_updates(learner: Learner, first: int) -> tuple[list[runs.Figures], Outcome]:
    figures = [runs.update(learner, RESUMED, number) for number in range(first, len(RESUMED.update_policy))]
    return runs.without_wall_times(figures), runs.outcome_of(learner, RESUMED, figures)


@pytest.fixture(scope="module")
def uninterrupted(models: Path) -> Outcome:
    return runs.run(RESUMED, models)


def test_saved_and_loaded_run_goes_on_as_if_nothing_happened(
    models: Path, tmp_path: Path, uninterrupted: Outcome, make_learner: Callable[..., Learner]
) -> None:
    runs.save_after_one_update(models, tmp_path / "checkpoint")
    learner = make_learner(RESUMED)
    learner.load(str(tmp_path / "checkpoint"))

    _, outcome = weights_after_all_updates(learner, first=1)

    assert_same(outcome, replace(uninterrupted, figures=uninterrupted.figures[1:]), tolerance=1e-6)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", runs.IN_TURNS)
def test_a_learner_that_takes_turns_computes_the_same_bits(
    name: str, ranks: int, models: Path, two_ranks: tuple[Path, RankResult, RankResult]
) -> None:
    scenario = runs.in_small_microbatches(SCENARIOS[name])
    pairs = [(rank.outcomes[name], rank.outcomes[f"{name}_in_turns"]) for rank in two_ranks[1:]]
    if ranks == 1:
        pairs = [(runs.run(scenario, models), runs.run_in_turns(scenario, models))]
    for plain, in_turns in pairs:
        assert runs.without_wall_times(plain.figures) == runs.without_wall_times(in_turns.figures)
        for before, after in ((plain.policy, in_turns.policy), (plain.critic, in_turns.critic)):
            assert before.keys() == after.keys()
            assert all(torch.equal(before[key], after[key]) for key in before)


def test_nothing_reads_a_learner_that_is_away(make_learner: Callable[..., Learner], tmp_path: Path) -> None:
    learner = make_learner(kl_coef=0.3)
    reads: list[Callable[[], Any]] = [
        lambda: runs.update(learner, Scenario(), 0),
        lambda: list(learner.weight_buckets()),
        learner.weight_source,
        learner.state,
        lambda: learner.save(str(tmp_path)),
        lambda: learner.export(str(tmp_path)),
    ]
    learner.offload()
    for read in reads:
        with pytest.raises(AssertionError, match="onload"):
            read()


@pytest.mark.parametrize("kept", ["offload_optimizer", "offload_reference"])
def test_what_is_in_host_memory_already_is_left_there(models: Path, kept: str) -> None:
    scenario = Scenario(training={"kl_coef": 0.3}, spec={kept: True})
    learner = runs.build(models, scenario)
    runs.update(learner, scenario, 0)
    learner.offload()
    assert learner._models.reference is not None
    frozen = [runs.storage_bytes(tensor) for tensor in learner._models.reference.model.parameters()]
    trained = [runs.storage_bytes(tensor) for tensor in learner.policy.tensors()]
    stays, goes = (trained, frozen) if kept == "offload_optimizer" else (frozen, trained)
    assert min(stays) > 0
    assert set(goes) == {0}


def test_run_saved_on_two_ranks_goes_on_on_one(
    two_ranks: tuple[Path, RankResult, RankResult], uninterrupted: Outcome, make_learner: Callable[..., Learner]
) -> None:
    learner = make_learner(RESUMED)
    learner.load(str(two_ranks[0] / "checkpoint"))

    _, outcome = weights_after_all_updates(learner, first=1)

    assert_same_weights(outcome.policy, uninterrupted.policy, 1e-6)
    assert_same_weights(outcome.critic, uninterrupted.critic, 1e-6)
    # The schedule too: warm-up and decay would start over otherwise.
    assert [one["lr"] for one in outcome.figures] == [one["lr"] for one in uninterrupted.figures[1:]]


def test_loading_brings_the_weights_back(tmp_path: Path, make_learner: Callable[..., Learner]) -> None:
    learner = make_learner()
    runs.update(learner, Scenario(), 0)
    saved = runs.full_weights(learner.policy)
    learner.save(str(tmp_path)).result()
    runs.update(learner, Scenario(), 1)
    assert not torch.equal(saved["model.norm.weight"], runs.full_weights(learner.policy)["model.norm.weight"])

    learner.load(str(tmp_path))

    assert all(torch.equal(saved[name], now) for name, now in runs.full_weights(learner.policy).items())


def test_a_closed_learner_leaves_nothing_behind(tmp_path: Path, make_learner: Callable[..., Learner]) -> None:
    learner = make_learner(kl_coef=0.1)
    runs.update(learner, Scenario(), 0)
    learner.save(str(tmp_path)).result()
    left = [
        weakref.ref(model) for model in (learner.policy.model, learner.critic.model, learner._models.reference.model)
    ]

    learner.close()
    del learner
    gc.collect()

    assert [model() for model in left] == [None, None, None]


@pytest.mark.parametrize("loaded", [False, True], ids=["saved", "saved and loaded"])
def test_a_save_in_the_critic_warmup_changes_nothing(
    loaded: bool, tmp_path: Path, on_one_rank: Callable[[str], Outcome], make_learner: Callable[..., Learner]
) -> None:
    """The policy's optimizer has taken no step then; to write its state must not count as one."""
    scenario = SCENARIOS["critic_warmup"]
    learner = make_learner(scenario)
    runs.update(learner, scenario, 0)

    learner.save(str(tmp_path)).result()
    if loaded:
        learner = make_learner(scenario)
        learner.load(str(tmp_path))
    runs.update(learner, scenario, 1)

    assert_same_weights(runs.full_weights(learner.policy), on_one_rank("critic_warmup").policy, 1e-7)


# Exports and published weights.


def test_export_is_what_transformers_loads(tmp_path: Path, models: Path, make_learner: Callable[..., Learner]) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

    learner = make_learner()
    runs.update(learner, Scenario(), 0)
    learner.export(str(tmp_path))

    policy = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    critic = AutoModelForTokenClassification.from_pretrained(tmp_path / "critic", dtype="auto")
    for loaded, trained in ((policy, learner.policy), (critic, learner.critic)):
        wanted = dict(under_each_name(runs.full_weights(trained).items()))
        found = dict(loaded.named_parameters(remove_duplicate=False))
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name].detach(), weight) for name, weight in wanted.items())
        assert all(parameter.dtype == torch.float32 for parameter in loaded.parameters())


def test_export_describes_the_models_as_they_are(
    tmp_path: Path, models: Path, make_learner: Callable[..., Learner]
) -> None:
    # A critic made from the policy's folder must not call itself a language model.
    make_learner(Scenario(critic="policy")).export(str(tmp_path))

    original = json.loads((models / "policy" / "config.json").read_text())
    policy = json.loads((tmp_path / "config.json").read_text())
    critic = json.loads((tmp_path / "critic" / "config.json").read_text())
    assert policy == original
    assert critic["architectures"] == ["Qwen2ForTokenClassification"]
    assert len(critic["id2label"]) == 1
    assert (tmp_path / "generation_config.json").exists()


def test_a_generation_config_that_transformers_refuses_costs_no_export(
    tmp_path: Path, models: Path, make_learner: Callable[..., Learner]
) -> None:
    """Some published models have a temperature without do_sample, and a run must not end without its weights."""
    from transformers import AutoModelForCausalLM

    model = tmp_path / "model"
    shutil.copytree(models / "policy", model)
    (model / "generation_config.json").write_text(json.dumps({"temperature": 0.7, "eos_token_id": 2}))

    make_learner(Scenario(spec={"policy_path": str(model)})).export(str(tmp_path / "export"))

    written = json.loads((tmp_path / "export" / "generation_config.json").read_text())
    assert (written["temperature"], written["eos_token_id"]) == (0.7, 2)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "export").generation_config.temperature == 0.7


def test_the_policys_schedule_counts_its_own_steps(make_learner: Callable[..., Learner]) -> None:
    learner = make_learner(Scenario(spec={"critic_steps": 12, "policy_steps": 4}), lr_warmup_steps=0)
    steps = [learner.policy._lr_factor(step) for step in (0, 2, 4)]
    assert steps == pytest.approx([1.0, 0.5, 0.0])
    assert learner.critic is not None
    assert learner.critic._lr_factor(6) == pytest.approx(0.5)


def test_two_ranks_export_whole_tensors(models: Path, two_ranks: tuple[Path, RankResult, RankResult]) -> None:
    from safetensors.torch import load_file

    for name, folder in (("policy", "export"), ("critic", "export/critic")):
        exported = load_file(two_ranks[0] / folder / "model.safetensors")
        original = load_file(models / name / "model.safetensors")
        assert exported.keys() == original.keys()
        assert all(torch.equal(exported[key], original[key]) for key in original)


def named_tensors(layout: BucketLayout, pieces: list[ByteArray] | None) -> dict[str, torch.Tensor]:
    assert pieces is not None
    return {
        tensor.name: torch.from_numpy(piece).view(getattr(torch, tensor.dtype)).view(tensor.shape)
        for tensor, piece in zip(layout.tensors, pieces, strict=True)
    }


def test_weight_buckets_hold_the_policy_once_under_every_name(make_learner: Callable[..., Learner]) -> None:
    learner = make_learner()
    runs.update(learner, Scenario(), 0)
    wanted = runs.full_weights(learner.policy)

    unpacked: dict[str, torch.Tensor] = {}
    for layout, pieces in learner.weight_buckets():
        unpacked |= named_tensors(layout, pieces)

    assert unpacked.keys() == wanted.keys()
    assert all(torch.equal(unpacked[name], weight) for name, weight in wanted.items())
    named = dict(under_each_name(unpacked.items()))
    assert torch.equal(named["lm_head.weight"], named["model.embed_tokens.weight"])
    # A tied weight is sent once, over NCCL too.
    parameters = sum(parameter.numel() for parameter in learner.policy.model.parameters())
    assert sum(layout.size_bytes for layout, _ in learner.weight_buckets()) == 4 * parameters
    assert learner.weight_source().size_bytes() == 4 * parameters
    assert [meta.name for meta in learner.weight_source().metadata()] == list(unpacked)


@pytest.mark.parametrize("kind", ["qwen3_moe", "glm4_moe"])
def test_experts_are_published_and_exported_one_by_one(
    tmp_path: Path, make_learner: Callable[..., Learner], kind: str
) -> None:
    # Memory holds the experts of a layer in one tensor; vLLM knows the names of checkpoints alone.
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "num_experts_per_tok": 2}
    of_kind = {
        "qwen3_moe": {"num_experts": 4},
        # Its router has a bias that is no parameter.
        "glm4_moe": {"n_routed_experts": 4, "first_k_dense_replace": 0, "n_shared_experts": 1},
    }[kind]
    config = AutoConfig.for_model(kind, vocab_size=runs.VOCABULARY, **sizes, **of_kind)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "policy")
    before = load_file(tmp_path / "policy" / "model.safetensors")
    buffers = {name for name in before if name.endswith("e_score_correction_bias")}
    assert len(buffers) == (2 if kind == "glm4_moe" else 0)
    learner = make_learner(Scenario(spec={"policy_path": str(tmp_path / "policy")}))

    runs.update(learner, Scenario(), 0)
    published: dict[str, torch.Tensor] = {}
    for layout, pieces in learner.weight_buckets():
        published |= named_tensors(layout, pieces)
    learner.export(str(tmp_path / "export"))

    assert published.keys() == before.keys()
    experts = [name for name in before if ".experts.0." in name]
    assert len(experts) == 6
    assert any(not torch.equal(published[name], before[name]) for name in experts)
    exported = load_file(tmp_path / "export" / "model.safetensors")
    assert exported.keys() == before.keys()
    assert all(torch.equal(exported[name], weight) for name, weight in published.items())
    assert all(torch.equal(exported[name], before[name]) for name in buffers)
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "export", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_only_rank_zero_holds_the_published_bytes(
    models: Path, two_ranks: tuple[Path, RankResult, RankResult], make_learner: Callable[..., Learner]
) -> None:
    _, first, second = two_ranks
    wanted = runs.full_weights(make_learner().policy)

    unpacked: dict[str, torch.Tensor] = {}
    for layout, pieces in first.buckets:
        unpacked |= named_tensors(layout, pieces)
    assert unpacked.keys() == wanted.keys()
    assert all(torch.equal(unpacked[name], weight) for name, weight in wanted.items())
    assert [layout for layout, _ in second.buckets] == [layout for layout, _ in first.buckets]
    assert all(pieces is None for _, pieces in second.buckets)


@pytest.mark.parametrize("name", runs.PUBLISHED)
def test_what_two_ranks_publish_is_gathered_in_the_wire_type(
    name: str, two_ranks: tuple[Path, RankResult, RankResult]
) -> None:
    _, *ranks = two_ranks
    for rank, wire in enumerate(result.wires[name] for result in ranks):
        for gathered in wire.gathered_bytes:
            assert gathered.pop(torch.bfloat16) == wire.size_bytes
            # Matrices of adapters, in float32: once, though the merged weights are looked at first.
            assert sum(gathered.values()) == wire.adapter_bytes
            assert (wire.adapter_bytes > 0) == ("adapted" in name)
        for published in (wire.source, wire.staged, wire.buckets)[: 3 - rank]:
            assert published.keys() == wire.wanted.keys()
            assert all(torch.equal(published[key], weight) for key, weight in wire.wanted.items())


@pytest.mark.parametrize("name", runs.PUBLISHED)
def test_two_ranks_take_each_weight_to_host_memory_once_for_what_they_send_later(
    name: str, two_ranks: tuple[Path, RankResult, RankResult]
) -> None:
    """Also experts, which are converted as a whole."""
    _, *ranks = two_ranks
    wires = [result.wires[name] for result in ranks]
    assert sum(wire.staged_bytes for wire in wires) == wires[0].size_bytes


def test_published_weights_are_cast_to_the_wire_type(models: Path) -> None:
    learner = Learner(runs.make_spec(models, Scenario()))
    runs.publish_in("bfloat16", learner)

    ((layout, pieces),) = learner.weight_buckets()

    for name, tensor in named_tensors(layout, pieces).items():
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(tensor, runs.full_weights(learner.policy)[name].bfloat16(), rtol=0.0, atol=0.0)


# Log-probabilities.


@pytest.fixture(scope="module")
def plain_logprobs(models: Path) -> Callable[[SequenceBatch, float], Iterator[torch.Tensor]]:
    """``[T]`` log-probabilities of each completion by plain transformers: whole logits, one sequence at a time."""
    from transformers import AutoModelForCausalLM

    policy = AutoModelForCausalLM.from_pretrained(models / "policy").eval()
    return lambda batch, temperature: (one.detach() for one in completion_logprobs(policy, batch, temperature))


def completion_logprobs(policy: Any, batch: SequenceBatch, temperature: float) -> Iterator[torch.Tensor]:
    for index in range(len(batch)):
        row = batch.select([index])
        ids = torch.tensor(row.token_ids, dtype=torch.int64)
        logits = policy(ids[None]).logits[0].double()
        logprobs = torch.log_softmax(logits / temperature, dim=-1)[:-1].gather(-1, ids[1:, None])[:, 0]
        yield logprobs[int(row.prompt_lengths[0]) - 1 :].float()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.6])
def test_logprobs_equal_those_of_plain_transformers(
    packed: bool,
    temperature: float,
    models: Path,
    plain_logprobs: Callable[[SequenceBatch, float], Iterator[torch.Tensor]],
) -> None:
    learner = Learner(runs.make_spec(models, Scenario(spec={"temperature": temperature})))
    batch = runs.make_batch(6, seed=4)
    micro = one_microbatch(batch, packed=packed)

    with torch.no_grad():
        logprobs = learner._models.score(micro)[0]

    for row, wanted in enumerate(plain_logprobs(batch, temperature)):
        torch.testing.assert_close(logprobs[row, : len(wanted)], wanted, rtol=1e-6, atol=1e-6)


def test_sampling_logprob_difference_is_measured_over_the_first_step(
    models: Path, plain_logprobs: Callable[[SequenceBatch, float], Iterator[torch.Tensor]]
) -> None:
    scenario = Scenario(num_minibatches=1)
    batch = runs.make_batch(5, seed=5)
    exact = torch.cat(list(plain_logprobs(batch, 0.8))).numpy()
    offset = np.zeros_like(exact)
    offset[3], offset[-1] = 0.5, -0.25
    batch = replace(batch, sampling_logprobs=exact + offset)
    learner = Learner(runs.make_spec(models, scenario))

    figures = learner.update(*runs.share_of(batch, scenario))

    assert figures["sampling_logprob_diff_max"] == pytest.approx(0.5, abs=1e-5)
    assert figures["sampling_logprob_diff_mean"] == pytest.approx(0.75 / len(exact), abs=1e-5)


def test_arrays_of_the_object_store_are_read_without_a_warning(make_learner: Callable[..., Learner]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The given NumPy array is not writable")
        runs.update(make_learner(), Scenario(), 0)


def test_dropout_of_the_checkpoint_is_off(make_learner: Callable[..., Learner]) -> None:
    """Twice the same estimates, from a model folder that asks for attention dropout."""
    learner = make_learner(kl_coef=0.1)
    batch = runs.make_batch(4, seed=6)

    assert learner.policy.model.config.attention_dropout == 0.5
    (_, first), (_, second) = (estimates_of(learner, batch) for _ in range(2))
    assert torch.equal(first.proximal_logprobs, second.proximal_logprobs)
    assert torch.equal(first.values, second.values)


def test_advantages_are_whitened_over_the_batch_on_demand(make_learner: Callable[..., Learner]) -> None:
    batch = runs.make_batch(6, seed=7)

    _, white = estimates_of(make_learner(whiten_advantages=True), batch)
    _, raw = estimates_of(make_learner(whiten_advantages=False), batch)

    tokens = white.advantages[white.mask]
    assert float(tokens.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(tokens.std()) == pytest.approx(1.0, abs=1e-5)
    torch.testing.assert_close(raw.advantages + raw.values, raw.returns)
    torch.testing.assert_close(white.returns, raw.returns)
