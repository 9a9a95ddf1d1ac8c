"""What holds for trajectories of several turns and sequences, from rewards to the weights after an update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import learner_scenarios as runs
import multi_turn
import numpy as np
import pytest
import torch
import torch.distributed as dist
from learner_scenarios import Outcome, Scenario
from multi_turn import SCENARIOS, cut_groups, groups_of, whole_groups

from rlhf_ray.advantages import normalize_rewards, shape_rewards
from rlhf_ray.config.plugins import advantage_plugin
from rlhf_ray.config.settings import RewardSettings, TrainingSettings
from rlhf_ray.errors import LearnerError
from rlhf_ray.learner.batch import SequenceBatch
from rlhf_ray.learner.credit import CreditAssignment
from rlhf_ray.learner.estimates import Estimates
from rlhf_ray.learner.layout import lay_out
from rlhf_ray.learner.learner import Learner
from rlhf_ray.learner.metrics import MetricSums
from rlhf_ray.learner.packing import plan_update
from rlhf_ray.rewards.shaping import shaped
from rlhf_ray.types import ScoredGroup, Trajectory

pytestmark = pytest.mark.usefixtures("one_rank")

CPU = torch.device("cpu")
PER_COMPLETION = ("grpo", "dr_grpo", "rloo", "opo", "remax")


def batch_of(groups: list[ScoredGroup]) -> SequenceBatch:
    return SequenceBatch.from_groups(groups, version=runs.NEWEST, max_staleness=runs.MAX_STALENESS)


def assert_same(outcome: Outcome, wanted: Outcome, tolerance: float = 1e-5) -> None:
    figures, others = runs.without_wall_times(outcome.figures), runs.without_wall_times(wanted.figures)
    for mine, theirs in zip(figures, others, strict=True):
        assert mine == pytest.approx(theirs, rel=tolerance, abs=tolerance)
    for weights, expected in ((outcome.policy, wanted.policy), (outcome.critic, wanted.critic)):
        assert weights.keys() == expected.keys()
        for name in weights:
            torch.testing.assert_close(weights[name], expected[name], rtol=0.0, atol=tolerance, msg=name)


def credit_of(batch: SequenceBatch, advantage: str, flat: dict[str, torch.Tensor], **training: Any) -> Estimates:
    """Advantages of a batch by estimates that are given for the tokens after the prompts, end to end."""
    settings = TrainingSettings(
        advantage=advantage, whiten_advantages=False, gamma=0.9, lambda_=0.8, kl_coef=0.3, **training
    )
    credit = CreditAssignment(settings, advantage_plugin(advantage, {}).loaded(), dist.group.WORLD)
    estimates = Estimates.of(batch, CPU)
    tables = {name: torch.from_numpy(batch.padded(one.numpy())) for name, one in flat.items() if name != "bootstrap"}
    bootstrap = torch.zeros(len(batch))
    bootstrap[torch.from_numpy(batch.last_sequences)] = flat["bootstrap"]
    bootstrap *= torch.tensor(batch.truncated)
    return credit.assign(batch, replace(estimates, bootstrap=bootstrap, **tables), MetricSums())[0]


def random_estimates(batch: SequenceBatch, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    names, tokens = ("values", "proximal_logprobs", "ref_logprobs"), len(batch.turn_ids)
    flat = {name: torch.randn(tokens, generator=generator) for name in names}
    return flat | {"bootstrap": torch.randn(len(batch.last_sequences), generator=generator)}


def at_tokens(batch: SequenceBatch, table: torch.Tensor | None) -> list[float]:
    """The numbers of a ``[N, T]`` at sampled tokens, in the order of the batch."""
    assert table is not None
    is_token = batch.padded(np.ones(len(batch.turn_ids), dtype=np.bool_))
    return table[torch.from_numpy(is_token)][torch.from_numpy(batch.sampled)].tolist()


@pytest.fixture
def make_learner(models: Path) -> Callable[..., Learner]:
    def make(**training: Any) -> Learner:
        return Learner(runs.make_spec(models, Scenario(training=training)))

    return make


def test_the_random_rollouts_hold_what_they_say() -> None:
    batch = batch_of(groups_of(100))
    sequences = np.bincount(batch.of_trajectory)
    assert set(sequences) == {1, 2, 3}
    assert len(batch.last_sequences) == 9
    turns = [int(batch.select([i]).turn_ids.max()) for i in range(len(batch))]
    assert max(turns) > 3
    assert (~batch.sampled).sum() > 10
    truncated = batch.truncated[batch.last_sequences]
    assert 2 <= truncated.sum() <= 7
    assert (sequences[truncated] > 1).any()
    assert batch_of(groups_of(100, stale=True)).staleness.max() == runs.MAX_STALENESS


# Observed tokens.


@pytest.mark.parametrize(
    "training",
    [
        {"behavior_cap": 1.5, "kl_coef": 0.3},
        {"behavior_weights": "sequence", "advantage": "grpo"},
        {"proximal": "loglinear"},
        {"m2po_threshold": 0.5, "advantage": "turn_gae"},
    ],
    ids=["gae", "sequence", "loglinear", "m2po"],
)
def test_garbled_observations_change_no_bit_of_an_update(training: dict[str, Any], models: Path) -> None:
    scenario = Scenario(training=training, spec={"max_staleness": runs.MAX_STALENESS}, num_epochs=2)
    batch = batch_of(groups_of(5, stale=True))
    observed = ~batch.sampled
    garbled = replace(
        batch,
        sampling_logprobs=np.where(observed, np.float32(-50.0), batch.sampling_logprobs),
        staleness=np.where(observed, np.int32(9), batch.staleness),
    )
    outcomes = []
    for given in (batch, garbled):
        learner = Learner(runs.make_spec(models, scenario))
        figures = learner.update(*runs.share_of(given, scenario))
        outcomes.append((runs.without_wall_times([figures]), runs.full_weights(learner.policy)))
    (figures, weights), (others, expected) = outcomes

    assert figures == others
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize("advantage", ["gae", "turn_gae", "reinforce_plus_plus", "opo"])
@pytest.mark.parametrize("seed", range(3))
def test_credit_is_that_of_the_rows_without_observations(seed: int, advantage: str) -> None:
    batch = batch_of(groups_of(seed))
    kept = batch.sampled
    lengths = batch.sampled_lengths
    in_prompt = np.concatenate([np.arange(n) < p for n, p in zip(batch.lengths, batch.prompt_lengths, strict=True)])
    is_kept = in_prompt.copy()
    is_kept[~in_prompt] = kept
    fields = ("turn_ids", "follower_ids", "loss_mask", "sampling_logprobs", "staleness", "token_rewards")
    without = replace(
        batch,
        token_ids=batch.token_ids[is_kept],
        completion_lengths=lengths,
        **{name: getattr(batch, name)[kept] for name in fields},
    )
    flat = random_estimates(batch, seed)
    of_sampled = {name: one if name == "bootstrap" else one[torch.from_numpy(kept)] for name, one in flat.items()}

    with_observations = credit_of(batch, advantage, flat)
    compact = credit_of(without, advantage, of_sampled)

    found = at_tokens(batch, with_observations.advantages)
    assert np.std(found) > 0.01
    if advantage == "opo":  # The penalty of a row is added up over another width.
        assert found == pytest.approx(at_tokens(without, compact.advantages), abs=1e-5)
        return
    assert found == at_tokens(without, compact.advantages)
    if with_observations.returns is not None:
        assert at_tokens(batch, with_observations.returns) == at_tokens(without, compact.returns)
    assert not with_observations.advantages[~with_observations.mask].any()


# Rewards.


@pytest.mark.parametrize("seed", range(12))
def test_token_rewards_add_up_to_the_shaped_reward(seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups = [
        replace(one, environment_weight=float(rng.normal()), rewards=np.round(one.rewards, 1))
        for one in groups_of(seed)
    ]
    settings = RewardSettings(
        truncated_reward=[None, -0.5][seed % 2],
        bias=float(rng.normal()),
        scale=float(rng.normal()),
        clip=[None, 0.3][seed // 2 % 2],
        normalize=("none", "group", "batch")[seed % 3],
        leave_one_out=bool(seed % 5 == 0),
    )
    batch = batch_of(groups)
    result = shaped(batch, settings, mask_truncated=False)

    trajectories = [each for one in groups for each in one.group.trajectories]
    rewards = np.concatenate([one.rewards for one in groups])
    assert batch.rewards.tolist() == rewards.tolist()
    truncated = [each.truncated for each in trajectories]
    if settings.truncated_reward is not None:
        rewards = np.where(truncated, np.float32(settings.truncated_reward), rewards)
    wanted = shape_rewards(torch.tensor(rewards), bias=settings.bias, scale=settings.scale, clip=settings.clip)
    if settings.normalize != "none":
        group_ids = torch.tensor([one.group.group_id for one in groups for _ in one.group.trajectories])
        wanted = normalize_rewards(
            wanted,
            group_ids,
            level=settings.normalize,
            mean=True,
            std=True,
            leave_one_out=settings.leave_one_out,
        )
    assert result.rewards.tolist() == wanted.tolist()
    of_token = result.of_trajectory[np.repeat(np.arange(len(result)), result.completion_lengths)]
    for number, each in enumerate(trajectories):
        own = result.token_rewards[(of_token == number) & result.sampled]
        assert own.sum() == pytest.approx(wanted[number].item(), abs=1e-6)
        *earlier, last = [turn for part in each.sequences for turn in part.turns]
        weight = groups[number // multi_turn.GROUP_SIZE].environment_weight * settings.scale
        ends = np.cumsum([turn.end - turn.start for turn in (*earlier, last)]) - 1
        np.testing.assert_allclose(own[ends[:-1]], [turn.reward * weight for turn in earlier], rtol=1e-12)
        assert np.count_nonzero(own) <= len(ends)
    assert not result.token_rewards[~result.sampled].any()


def test_a_masked_trajectory_leaves_the_losses_with_all_its_sequences() -> None:
    batch = batch_of(groups_of(100))
    truncated = batch.truncated[batch.last_sequences]

    result = shaped(batch, RewardSettings(), mask_truncated=True)

    assert ((result.loss_lengths == 0) == truncated[batch.of_trajectory]).all()


# What follows the last token.


@pytest.mark.parametrize("packed", [False, True])
def test_a_truncated_trajectory_bootstraps_after_its_last_observation(packed: bool, models: Path) -> None:
    from transformers import AutoModelForTokenClassification

    learner = runs.build(models, Scenario(packed=packed))
    batch = batch_of(groups_of(100))
    own, plan = runs.share_of(batch, Scenario(num_minibatches=1, packed=packed))
    rows = plan.minibatches[0].microbatches
    estimates, _ = learner._estimate(
        own, {r: lay_out(own, r, packed=packed, device=CPU) for r in rows}, plan, update_policy=True
    )

    assert estimates.bootstrap is not None
    critic = AutoModelForTokenClassification.from_pretrained(models / "critic").eval()
    ends = np.cumsum(own.lengths)
    observed = 0
    for row, end in enumerate(ends):
        tokens = torch.tensor(own.token_ids[end - own.lengths[row] : end][None, :], dtype=torch.int64)
        with torch.no_grad():
            after = critic(tokens).logits[0, -1, 0].item()
        is_cut = bool(own.truncated[row])
        assert estimates.bootstrap[row].item() == pytest.approx(after if is_cut else 0.0, abs=1e-5)
        observed += is_cut and not own.select([row]).sampled[-1]
    assert observed >= 2
    assert own.truncated.sum() == sum(each.truncated for one in groups_of(100) for each in one.group.trajectories)


# A trajectory counts once, whatever its sequences.


@pytest.mark.parametrize("advantage", ["gae", "turn_gae", "reinforce_plus_plus", *PER_COMPLETION])
@pytest.mark.parametrize("kl_in", ["reward", "loss"])
@pytest.mark.parametrize("seed", range(3))
def test_credit_over_sequences_is_that_of_their_concatenation(seed: int, kl_in: str, advantage: str) -> None:
    """Values, penalties and bootstraps are random; what the cuts leave out are observations."""
    whole, cut = batch_of(whole_groups(seed)), batch_of(cut_groups(seed))
    assert len(cut) > len(whole) == len(cut.last_sequences)
    flat = random_estimates(cut, seed)
    of_whole = {"bootstrap": flat["bootstrap"]}
    for name in flat.keys() - {"bootstrap"}:
        of_whole[name] = torch.full((len(whole.turn_ids),), 99.0)
        of_whole[name][torch.from_numpy(whole.sampled)] = flat[name][torch.from_numpy(cut.sampled)]

    together = credit_of(whole, advantage, of_whole, kl_in=kl_in)
    apart = credit_of(cut, advantage, flat, kl_in=kl_in)

    found = at_tokens(cut, apart.advantages)
    assert np.std(found) > 0.01
    if advantage in PER_COMPLETION:
        assert found == pytest.approx(at_tokens(whole, together.advantages), abs=1e-5)
    else:
        assert found == at_tokens(whole, together.advantages)
    if together.returns is not None:
        assert at_tokens(cut, apart.returns) == at_tokens(whole, together.returns)


@pytest.mark.parametrize("advantage", ["gae", "turn_gae", "reinforce_plus_plus", *PER_COMPLETION])
def test_credit_is_the_same_where_it_is_said_that_turns_came_one_after_the_other(advantage: str) -> None:
    def told(trajectory: Trajectory) -> Trajectory:
        last = len(trajectory.all_turns) - 1
        numbers = iter(range(last + 1))

        def one(sequence: Trajectory) -> Trajectory:
            turns = [(turn, next(numbers)) for turn in sequence.turns]
            named = (replace(turn, number=2 * n, follower=2 * min(n + 1, last)) for turn, n in turns)
            return replace(sequence, turns=tuple(named))

        first = one(trajectory)
        return replace(first, further=tuple(replace(each, trajectory=one(each.trajectory)) for each in first.further))

    groups = groups_of(100)
    named = [
        replace(one, group=replace(one.group, trajectories=tuple(map(told, one.group.trajectories)))) for one in groups
    ]
    batch, other = batch_of(groups), batch_of(named)
    assert (other.follower_ids[other.sampled] >= 0).all()
    flat = random_estimates(batch, 0)

    expected, found = (credit_of(each, advantage, flat) for each in (batch, other))

    assert torch.equal(found.advantages, expected.advantages)
    assert other.truncated.tolist() == batch.truncated.tolist()


def test_equal_rewards_in_other_parts_are_no_reason_to_prefer_one() -> None:
    """Rewards of turns that add up to the same in different orders: a group without spread has advantage 0."""

    def rewarded(each: Trajectory, rewards: list[float]) -> Trajectory:
        turns = tuple(replace(t, reward=r) for t, r in zip(each.turns, rewards, strict=True))
        return replace(each, turns=turns, further=())

    rng = np.random.default_rng(0)
    three = next(t for g in whole_groups(2) for t in g.group.trajectories if len(t.turns) == 3)
    trajectories = [rewarded(three, rewards) for rewards in ([0.1, 0.2, 0.4], [0.4, 0.2, 0.1], [1e3, 0.3, -1e3])]
    group = multi_turn.scored(0, multi_turn.ids(rng, 3), trajectories, rng)
    batch = batch_of([replace(group, rewards=np.full(3, 0.7, dtype=np.float32))])
    settings = TrainingSettings(advantage="grpo", whiten_advantages=False)
    credit = CreditAssignment(settings, advantage_plugin("grpo", {}).loaded(), dist.group.WORLD)

    estimates, _ = credit.assign(batch, Estimates.of(batch, CPU), MetricSums())

    assert not estimates.advantages.any()


@pytest.mark.parametrize(
    "training",
    [
        {"kl_coef": 0.3, "kl_estimator": "k3", "loss_aggregation": "token_mean"},
        {"loss_aggregation": "seq_mean_token_mean", "entropy_coef": 0.1, "value_init": "reward_mean"},
        {"advantage": "turn_gae", "loss_aggregation": "seq_mean_token_sum"},
        {"advantage": "grpo", "loss_aggregation": "seq_mean_token_mean", "kl_in": "loss", "kl_coef": 0.3},
        {"advantage": "opo", "loss_aggregation": "seq_mean_token_sum_norm", "kl_coef": 0.3, "kl_target": 0.01},
    ],
    ids=["token_mean", "seq_mean_token_mean", "turn_gae", "grpo", "opo"],
)
def test_a_history_that_is_the_same_learns_the_same(training: dict[str, Any], models: Path) -> None:
    """Each turn in a sequence of its own, whose prompt is all that came before, is the same trajectory."""
    critic = "policy" if "value_init" in training else "critic"
    whole, cut = (
        runs.run(Scenario(training=training, critic=critic, groups=groups), models)
        for groups in (whole_groups, cut_groups)
    )

    assert_same(cut, whole)
    assert max(np.nanmax(np.abs(one.advantages)) for one in whole.last.estimates) > 0.1


def test_a_new_head_starts_at_the_mean_of_trajectories(models: Path) -> None:
    scenario = Scenario(
        training={"value_init": "reward_mean"},
        critic="policy",
        groups=groups_of,
        num_minibatches=1,
        update_policy=(True,),
    )

    (figures,) = runs.run(scenario, models).figures

    rewards = np.concatenate([one.rewards for one in groups_of(100)])
    batch = batch_of(groups_of(100))
    assert figures["value_mean"] == pytest.approx(rewards.mean(), abs=1e-6)
    assert abs(rewards.mean() - rewards[batch.of_trajectory].mean()) > 1e-3


def test_the_kl_coefficient_moves_by_the_number_of_trajectories(models: Path) -> None:
    training = {"kl_coef": 0.3, "kl_target": 0.01, "kl_horizon": 20, "kl_estimator": "k3"}

    _, second = runs.run(Scenario(training=training, groups=groups_of), models).figures

    # No KL in the first update: the lowest error, -0.2, over 9 of a horizon of 20 completions.
    assert second["kl_coef"] == pytest.approx(0.3 * (1 - 0.2 * 9 / 20))


def test_a_refusal_names_the_first_sequence_of_the_trajectory(make_learner: Callable[..., Learner]) -> None:
    batch = batch_of(groups_of(100))
    number = int(np.flatnonzero(np.bincount(batch.of_trajectory) == 3)[0])
    rewards = batch.rewards.copy()
    rewards[number] = np.nan
    first = int(np.flatnonzero(batch.of_trajectory == number)[0])

    with pytest.raises(LearnerError, match=rf"rewards not finite, first in sequence {first} of the batch"):
        make_learner().update(*runs.share_of(batch.with_rewards(rewards), Scenario()))


# No split changes the update.


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request: pytest.FixtureRequest, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("ranks")
    for name in ("policy", "critic"):
        (folder / name).symlink_to(models / name)
    runs.run_ranks(multi_turn.__file__, folder, request.param)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(request.param)]


@pytest.fixture(scope="module")
def on_one(models: Path, one_rank: None) -> dict[str, Outcome]:
    return {name: runs.run(each, models) for name, each in SCENARIOS.items()}


@pytest.mark.parametrize("name", SCENARIOS)
def test_several_ranks_with_small_microbatches_do_what_one_does(
    name: str, ranks: list[dict[str, Outcome]], on_one: dict[str, Outcome]
) -> None:
    for outcomes in ranks:
        assert_same(outcomes[name], on_one[name])
    shares = [outcomes[name].sequences for outcomes in ranks]
    held = np.sort(np.concatenate(shares))
    assert held.tolist() == list(range(len(held)))


@pytest.mark.parametrize("name", ["gae", "grpo"])
def test_small_microbatches_change_nothing_on_one_rank(name: str, on_one: dict[str, Outcome], models: Path) -> None:
    assert_same(runs.run(runs.in_small_microbatches(SCENARIOS[name]), models), on_one[name])


def test_packed_rows_learn_the_same_as_padded_ones(on_one: dict[str, Outcome], models: Path) -> None:
    assert_same(runs.run(replace(SCENARIOS["gae_packed"], packed=False), models), on_one["gae_packed"])


def test_microbatches_of_the_scenarios_do_split_trajectories() -> None:
    batch = batch_of(groups_of(100))
    plan = plan_update(
        batch.lengths.tolist(),
        batch.loss_lengths.tolist(),
        num_minibatches=2,
        num_epochs=1,
        num_ranks=2,
        max_tokens=16,
        attention_length=1536.0,
        packed=False,
        seed=0,
        of_trajectory=batch.of_trajectory.tolist(),
    )
    split = 0
    for rank in plan.ranks:
        of_rank = batch.select(rank.sequences)
        for minibatch in rank.minibatches:
            parts = [{of_rank.of_trajectory[i] for i in micro} for micro in minibatch.microbatches]
            split += sum(map(len, parts)) > len(set.union(*parts))
    assert split
