"""A critic, and whole learners, of every causal family of transformers that can be built tiny."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import learner_scenarios as runs
import pytest
import torch
from family_iterations import ENVIRONMENT
from model_families import NOT_TRIED, UNKNOWN, WORKING, causal_families, tiny_config
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

import rlhf_ray
from rlhf_ray.errors import ConfigError
from rlhf_ray.learner import models as module
from rlhf_ray.learner.learner import Learner
from rlhf_ray.learner.models import head_is_new, load_critic, load_policy, set_head_bias, shard
from rlhf_ray.rollouts.engine_spec import NOT_ON_CPUS, NOT_SERVED

pytestmark = pytest.mark.usefixtures("one_rank")

# Without a class for token classification all but the first: soft caps, scales, windows, experts, convolutions, states,
# a language model within one that also reads images.
IN_EVERY_RUN = (
    *("qwen2", "olmo2", "gemma3_text", "granite", "olmo3", "cohere2", "glm4_moe", "lfm2", "gemma4_text", "qwen3_5"),
    *("opt", "mamba"),
)
FAMILIES = [
    pytest.param(family, marks=() if family in IN_EVERY_RUN else pytest.mark.slow)
    for family in causal_families()
    if family not in NOT_TRIED
]
ITERATED = [family for family in (*WORKING, *UNKNOWN, *NOT_SERVED, *NOT_ON_CPUS) if family not in NOT_TRIED]
LOADING = {"kernels": ("sdpa", "eager"), "trust_remote_code": False}
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])


def saved(family: str, folder: Path) -> str:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config(family)).save_pretrained(folder / "policy")
    return str(folder / "policy")


def weights_of(learner: Learner) -> dict[str, torch.Tensor]:
    assert learner.critic is not None
    return {name: p.detach().full_tensor().clone() for name, p in learner.critic.model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_critic_of_every_family_is_trained_exported_and_loaded_again(family: str, tmp_path: Path) -> None:
    path = saved(family, tmp_path)
    values = load_critic(path, **LOADING)(input_ids=IDS, position_ids=torch.arange(8)[None], use_cache=False).logits
    assert values.shape == (1, 8, 1)
    assert not values.any()

    # With a head of zeros nothing below it has a gradient in the first step. Without decay only a gradient moves.
    scenario = runs.Scenario(critic="policy", num_minibatches=3, training={"weight_decay": 0.0, "adam_eps": 1e-12})
    learner = Learner(runs.make_spec(tmp_path, scenario))
    before = weights_of(learner)
    runs.update(learner, scenario, 0)
    after = weights_of(learner)

    assert learner.critic is not None
    moments = [one for name, one in learner.critic.state().items() if name.endswith(".exp_avg")]
    assert all(weights.isfinite().all() for weights in after.values())
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(moved) == sum(bool(moment.any()) for moment in moments)
    assert len(moved) > len(before) / 2
    learner.export(str(tmp_path / "export"))
    again = load_critic(str(tmp_path / "export" / "critic"), **LOADING)
    assert {name for name, _ in again.named_parameters()} == after.keys()
    assert all(torch.equal(parameter, after[name]) for name, parameter in again.named_parameters())


def test_a_class_of_the_family_is_used_where_there_is_one(tmp_path: Path) -> None:
    assert type(load_critic(saved("qwen2", tmp_path), **LOADING)).__name__ == "Qwen2ForTokenClassification"
    made = load_critic(saved("olmo2", tmp_path), **LOADING)
    assert type(made).__name__ == "Olmo2ForTokenClassification"
    with pytest.raises(ValueError, match="Unrecognized configuration"):
        AutoModelForTokenClassification.from_config(made.config)


def test_what_a_family_does_to_logits_is_not_done_to_values(tmp_path: Path) -> None:
    # Cohere multiplies logits, Gemma 2 caps them: a value is the head's product alone.
    critic = load_critic(saved("cohere2", tmp_path), **LOADING)
    assert critic.config.logit_scale != 1.0
    torch.nn.init.normal_(critic.score.weight)

    states = critic.base_model(input_ids=IDS, use_cache=False).last_hidden_state
    values = critic(input_ids=IDS, use_cache=False).logits

    torch.testing.assert_close(values, torch.nn.functional.linear(states, critic.score.weight, critic.score.bias))


def test_a_made_critic_is_one_like_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MIN_UNIT_PARAMETERS", 1)
    critic = load_critic(saved("olmo2", tmp_path), **LOADING)
    assert critic.config._attn_implementation == "sdpa"
    assert critic.get_input_embeddings() is critic.model.embed_tokens
    assert head_is_new(critic)
    recomputed: list[int] = []
    critic.model.layers[0].mlp.register_forward_hook(lambda *_: recomputed.append(1))

    critic = shard(critic, init_device_mesh("cpu", (1,)), compute_dtype=torch.float32, gradient_checkpointing=True)
    set_head_bias(critic, 0.25)
    values = critic(input_ids=IDS, use_cache=False).logits
    values.sum().backward()

    units = [name for name, part in critic.named_modules() if isinstance(part, FSDPModule)]
    assert units == ["", "model.layers.0", "model.layers.1"]
    assert values.unique().tolist() == [0.25]
    assert len(recomputed) == 2
    assert not head_is_new(critic)


def test_a_made_critic_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    saved("olmo2", tmp_path)
    scenario = runs.Scenario(critic="policy", update_policy=(True, True))
    learner = Learner(runs.make_spec(tmp_path, scenario))
    runs.update(learner, scenario, 0)
    learner.save(str(tmp_path / "checkpoint")).result()

    restored = Learner(runs.make_spec(tmp_path, scenario))
    restored.load(str(tmp_path / "checkpoint"))

    mine, theirs = weights_of(restored), weights_of(learner)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    figures = [runs.without_wall_times([runs.update(each, scenario, 1)])[0] for each in (learner, restored)]
    assert figures[1] == pytest.approx(figures[0], abs=1e-6)


def test_a_trained_head_is_never_replaced_by_zeros(tmp_path: Path) -> None:
    saved("olmo2", tmp_path)
    learner = Learner(runs.make_spec(tmp_path, runs.Scenario(critic="policy")))
    learner.export(str(tmp_path))
    file = tmp_path / "critic" / "model.safetensors"
    weights = load_file(file)

    save_file({name: tensor for name, tensor in weights.items() if name != "score.weight"}, file, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"hold no head where Olmo2ForTokenClassification has score\.weight"):
        load_critic(str(tmp_path / "critic"), **LOADING)

    save_file(weights | {"v_head.summary.weight": torch.ones(1, 64)}, file, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"hold v_head\.summary\.weight where"):
        load_critic(str(tmp_path / "critic"), **LOADING)


def test_a_value_head_beside_a_language_model_is_not_dropped(tmp_path: Path) -> None:
    path = saved("gemma3_text", tmp_path)
    file = Path(path) / "model.safetensors"
    save_file(load_file(file) | {"v_head.summary.weight": torch.ones(1, 64)}, file, {"format": "pt"})

    with pytest.raises(ConfigError, match=r"v_head\.summary\.weight.*rename those weights") as caught:
        load_critic(path, **LOADING)
    assert caught.value.field == "model.critic_path"


def test_a_reward_model_of_a_family_without_token_classification_is_a_critic(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    config = tiny_config("gemma3_text")
    config.num_labels = 1
    reward_model = AutoModelForSequenceClassification.from_config(config)
    reward_model.save_pretrained(tmp_path)

    critic = load_critic(str(tmp_path), **LOADING)

    assert torch.equal(critic.score.weight, reward_model.score.weight)
    assert critic.score.bias.tolist() == [0.0]
    load_policy(saved("gemma3_text", tmp_path), **LOADING)


@pytest.fixture(scope="module")
def iterations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what became of each family: one process imports vLLM, and each has a fork of it."""
    folder = tmp_path_factory.mktemp("iterations")
    tests = Path(__file__).parents[1]
    paths = (Path(rlhf_ray.__file__).parents[1], tests, tests / "learner")
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    script = str(tests / "learner" / "family_iterations.py")
    subprocess.run([sys.executable, script, str(folder), *ITERATED], env=environment, check=True)
    return folder


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("family", ITERATED)
def test_ppo_iterations_of_every_family_work_or_do_not_as_docs_say(family: str, iterations: Path) -> None:
    found = json.loads((iterations / f"{family}.json").read_text())
    works = "error" not in found and max(found["sampling_logprob_diff_max"]) < 1e-3
    assert works == (family in WORKING) or UNKNOWN.get(family) == "not run", found
    if works:  # The second batch was sampled from what was published after the first update.
        assert min(found["grad_norm"] + found["critic_grad_norm"]) > 0.0
