import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM

from rlhf_ray import PPOConfig
from rlhf_ray.algorithm.inputs import check_inputs
from rlhf_ray.environments.environment import Action
from rlhf_ray.environments.registry import resolve_environments
from rlhf_ray.quickstart import CALCULATOR as PRESET
from rlhf_ray.quickstart import model_path
from rlhf_ray.quickstart.calculator import Calculator, eval_rows
from rlhf_ray.quickstart.make_model import CALCULATOR, measure
from rlhf_ray.quickstart.tokenizer import EOS_TOKEN_ID, PAD_TOKEN_ID

MODEL_PATH = PRESET["model.path"]
MAX_TURNS = PRESET["environment.max_turns"]
MAX_TURN_TOKENS = PRESET["environment.max_turn_tokens"]


@pytest.fixture(scope="module")
def model() -> Qwen2ForCausalLM:
    return AutoModelForCausalLM.from_pretrained(MODEL_PATH, dtype=torch.float32)


class Play:
    """An episode of the greedy policy."""

    def __init__(self, row: dict[str, str]) -> None:
        self.environment = Calculator()
        self.environment.reset(row, seed=0)
        self.token_ids = list(row["prompt"].encode())
        self.turn: list[int] = []
        self.num_turns = 0
        self.reward = 0.0
        self.done = False

    def take(self, token_id: int) -> None:
        self.token_ids.append(token_id)
        self.turn.append(token_id)
        if token_id != EOS_TOKEN_ID and len(self.turn) < MAX_TURN_TOKENS:
            return
        text = bytes(token for token in self.turn if token < PAD_TOKEN_ID).decode(errors="replace")
        message = {"role": "assistant", "content": text}
        action = Action(text=text, message=message, token_ids=tuple(self.turn), truncated=self.turn[-1] != EOS_TOKEN_ID)
        step = self.environment.step(action)
        self.turn, self.num_turns, self.reward = [], self.num_turns + 1, self.reward + step.reward
        self.done = step.done or self.num_turns == MAX_TURNS
        if not self.done:
            self.token_ids += step.observation.encode()


def play_greedily(model: Qwen2ForCausalLM, rows: list[dict[str, str]]) -> list[Play]:
    plays = [Play(row) for row in rows]
    while playing := [play for play in plays if not play.done]:
        width = max(len(play.token_ids) for play in playing)
        ids = torch.tensor([play.token_ids + [PAD_TOKEN_ID] * (width - len(play.token_ids)) for play in playing])
        ends = torch.tensor([len(play.token_ids) - 1 for play in playing])
        with torch.no_grad():
            logits = model(ids).logits[torch.arange(len(playing)), ends]
        for play, token_id in zip(playing, logits.argmax(-1).tolist(), strict=True):
            play.take(token_id)
    return plays


def test_a_trajectory_of_the_most_and_longest_turns_fits() -> None:
    assert max(len(row["prompt"]) for row in eval_rows()) <= PRESET["rollouts.max_prompt_tokens"]
    longest_observation = len("1998;")
    longest = MAX_TURNS * MAX_TURN_TOKENS + (MAX_TURNS - 1) * longest_observation
    assert longest <= PRESET["rollouts.max_new_tokens"]


def test_it_differs_from_the_model_for_sums_in_nothing_but_its_weights(model: Qwen2ForCausalLM) -> None:
    here, there = Path(MODEL_PATH), Path(model_path())
    assert {path.name for path in here.iterdir()} == {path.name for path in there.iterdir()}
    differing = {path.name for path in here.iterdir() if path.read_bytes() != (there / path.name).read_bytes()}
    assert differing == {"model.safetensors", "README.md"}
    assert f"{model.num_parameters():,} parameters" in (here / "README.md").read_text()
    assert AutoTokenizer.from_pretrained(here)("37+58;").input_ids == list(b"37+58;")


def test_the_weights_are_stored_in_float32_and_finite() -> None:
    stored = AutoModelForCausalLM.from_pretrained(MODEL_PATH, dtype="auto")
    assert {parameter.dtype for parameter in stored.parameters()} == {torch.float32}
    assert all(parameter.isfinite().all() for parameter in stored.parameters())


def test_greedy_episodes_succeed_at_most_60_percent_of_the_time(model: Qwen2ForCausalLM) -> None:
    rows = eval_rows()[:256]
    plays = play_greedily(model, rows)
    success = sum(play.reward for play in plays) / len(plays)
    assert 0.3 <= success <= 0.6
    # The teacher-forced measurement that training is stopped by says what play shows.
    assert success == pytest.approx(measure(model, rows, CALCULATOR).greedy, abs=0.02)
    assert all(play.num_turns == 3 for play in plays if play.reward)


def test_held_out_accuracy_is_what_the_card_says_and_leaves_room_to_learn(model: Qwen2ForCausalLM) -> None:
    accuracy = measure(model, eval_rows(), CALCULATOR)
    assert accuracy.greedy <= 0.6
    assert accuracy.sampled >= 0.2
    card = (Path(MODEL_PATH) / "README.md").read_text()
    assert [float(number) for number in re.findall(r"\b0\.\d{3}\b", card)] == pytest.approx(
        [accuracy.sampled, accuracy.greedy], abs=0.005
    )


def test_the_preset_is_a_run_of_this_model_and_task() -> None:
    config = PPOConfig.from_dict(dict(PRESET)).validate()
    assert config.settings.model.path == MODEL_PATH
    (environment,) = resolve_environments(config.settings.environment)
    assert environment.make().__class__ is Calculator
    inputs = check_inputs(config.settings)
    assert list(inputs.held_out) == ["calculator"]
    longest = 3 * 8 + 2 * 4  # Three turns and two answers of the calculator.
    assert longest <= config.settings.rollouts.max_new_tokens
