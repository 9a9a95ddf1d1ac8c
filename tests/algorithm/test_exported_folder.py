from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GenerationConfig

from rlhf_ray import PPOConfig
from rlhf_ray.algorithm.exported_folder import complete_export
from rlhf_ray.algorithm.inputs import check_inputs
from rlhf_ray.quickstart import model_path
from rlhf_ray.quickstart.tokenizer import EOS_TOKEN_ID, PAD_TOKEN_ID

CHATML = "{% for m in messages %}<pad>{{ m.role }} {{ m.content }}<pad>{% endfor %}{{ '<pad>assistant ' }}"


@pytest.fixture
def export(tmp_path: Path) -> Callable[..., Path]:
    """Export the quickstart model, its weights left out, with settings and a tokenizer of an EOS of its own."""

    def export(*, tokenizer_path: str | None = None, **sections: dict[str, Any]) -> Path:
        config = PPOConfig.from_dict({"model": {"tokenizer_path": tokenizer_path}, **sections})
        folder = tmp_path / "export"
        folder.mkdir()
        shutil.copy(Path(model_path(), "generation_config.json"), folder)
        complete_export(folder, config.settings, check_inputs(config.settings))
        return folder

    return export


def test_an_export_is_what_the_model_was(export: Callable[..., Path]) -> None:
    folder = export()
    assert (folder / "generation_config.json").read_bytes() == Path(model_path(), "generation_config.json").read_bytes()
    of_export, of_model = (AutoTokenizer.from_pretrained(path) for path in (folder, model_path()))
    assert of_export.chat_template == of_model.chat_template


def test_the_chat_template_and_what_ends_a_completion_go_into_the_export(
    export: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    tokenizer.eos_token = "<pad>"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    folder = export(
        tokenizer_path=str(tmp_path / "tokenizer"),
        data={"chat_template": CHATML, "as_chat": True},
        rollouts={"stop_token_ids": [10]},
    )
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [EOS_TOKEN_ID, PAD_TOKEN_ID, 10]
    written = json.loads((folder / "generation_config.json").read_text())
    assert written["pad_token_id"] == PAD_TOKEN_ID
    assert AutoTokenizer.from_pretrained(folder).chat_template == CHATML
    (message,) = [message for message in caplog.messages if "completions end with" in message]
    assert f"<eos> ({EOS_TOKEN_ID})" in message
    assert f"<pad> ({PAD_TOKEN_ID})" in message
