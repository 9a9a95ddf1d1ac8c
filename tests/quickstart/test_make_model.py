from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_ray.quickstart.make_model import make_model, measure, new_model
from rlhf_ray.quickstart.task import eval_rows


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_a_short_run_writes_a_folder_that_loads(tmp_path: Path) -> None:
    accuracy = make_model(tmp_path, seed=1, max_steps=3)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert measure(model, eval_rows()) == accuracy
    assert model.generation_config.eos_token_id == AutoTokenizer.from_pretrained(tmp_path).eos_token_id
    assert f"{model.num_parameters():,}" in (tmp_path / "README.md").read_text()


def test_the_seed_decides_the_weights(tmp_path: Path) -> None:
    weights = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_model(tmp_path / name, seed=seed, max_steps=2)
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


def test_training_lowers_the_loss_on_sums_it_has_not_seen(tmp_path: Path) -> None:
    make_model(tmp_path, seed=1, max_steps=20)
    trained = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert measure(trained, eval_rows()).sampled > 10 * measure(new_model(1), eval_rows()).sampled


def test_a_model_to_which_all_tokens_are_equal_is_right_by_chance() -> None:
    model = new_model(0)
    with torch.no_grad():
        # A zero gain of the last norm makes every logit zero.
        model.model.norm.weight.zero_()
    rows = [{"prompt": "10+10=", "answer": "20"}, {"prompt": "90+10=", "answer": "100"}]
    accuracy = measure(model, rows)
    assert accuracy.sampled == pytest.approx((258**-3 + 258**-4) / 2, rel=1e-4)
    assert accuracy.greedy == 0.0
