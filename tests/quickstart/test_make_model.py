from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_ray.environments.environment import Action
from rlhf_ray.quickstart import calculator
from rlhf_ray.quickstart.make_model import CALCULATOR, SUM, Task, _tensors, make_model, measure, new_model
from rlhf_ray.quickstart.task import eval_rows


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("task", [SUM, CALCULATOR], ids=["sum", "calculator"])
def test_a_short_run_writes_a_folder_that_loads(tmp_path: Path, task: Task) -> None:
    accuracy = make_model(tmp_path, task, seed=1, max_steps=3)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert measure(model, task.eval_rows(), task) == accuracy
    assert model.generation_config.eos_token_id == AutoTokenizer.from_pretrained(tmp_path).eos_token_id
    card = (tmp_path / "README.md").read_text()
    assert f"{model.num_parameters():,}" in card
    assert task.description in card


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


def test_the_calculator_rewards_what_is_demonstrated_and_answers_what_the_demonstration_reads() -> None:
    for row in (*calculator.eval_rows(), *calculator.train_rows()[:512]):
        turns = CALCULATOR.demonstrate(row)
        environment = calculator.Calculator()
        environment.reset(row, seed=0)
        assert turns[0][0] == row["prompt"]
        for (_, written), (observed, _) in pairwise(turns):
            step = environment.step(action(written))
            assert (step.observation, step.done) == (observed, False)
        last = environment.step(action(turns[-1][1]))
        assert (last.reward, last.done) == (1.0, True)


def test_only_what_the_policy_writes_is_learned() -> None:
    ids, labels = _tensors(calculator.eval_rows()[:1], CALCULATOR)
    assert bytes(ids[0][ids[0] < 256].tolist()) == b"85+78+47=85+78163;163+47210;210"
    learned = [chr(label) if label < 256 else "|" for label in labels[0].tolist() if label >= 0]
    assert "".join(learned) == "85+78|163+47|210|"
    assert ((labels == ids) | (labels == -100)).all()


def test_a_model_to_which_all_tokens_are_equal_makes_all_calls_by_chance() -> None:
    model = new_model(0)
    with torch.no_grad():
        model.model.norm.weight.zero_()
    # Ends of turns included, 6 + 6 + 3 tokens.
    accuracy = measure(model, [{"prompt": "10+10+10=", "answer": "30"}], CALCULATOR)
    assert accuracy.sampled == pytest.approx(258.0**-15, rel=1e-3)


def action(text: str) -> Action:
    return Action(text=text, message={"role": "assistant", "content": text}, token_ids=(), truncated=False)
