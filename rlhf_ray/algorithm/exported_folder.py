"""What an exported folder holds besides weights, so that the model is served as it was trained."""

from __future__ import annotations

import json
from pathlib import Path

from rlhf_ray.algorithm.inputs import Inputs
from rlhf_ray.config.settings import Settings
from rlhf_ray.prompts.tokenizer import load_tokenizer, read_chat_template, with_chat_template

__all__ = ["complete_export"]


def complete_export(folder: Path, settings: Settings, inputs: Inputs) -> None:
    """Add the tokenizer with the run's chat template, and all that ends a completion, to a folder of weights."""
    tokenizer = load_tokenizer(inputs.tokenizer_path, trust_remote_code=settings.model.trust_remote_code)
    with_chat_template(tokenizer, read_chat_template(settings.data.chat_template)).save_pretrained(folder)
    file = folder / "generation_config.json"
    written = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    # A stop token of the run, such as the end of a turn, ends a completion when the model is served, too.
    ends = [*dict.fromkeys([*inputs.eos_token_ids, *settings.rollouts.stop_token_ids])]
    if written.get("eos_token_id") not in (ends, ends[0] if len(ends) == 1 else None):
        # transformers replaces a file that says it was made from the model's config by what that config says.
        changed = written | {"eos_token_id": ends, "_from_model_config": False}
        file.write_text(json.dumps(changed, indent=2) + "\n", encoding="utf-8")
