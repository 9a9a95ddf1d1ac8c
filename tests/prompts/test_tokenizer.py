import json
from pathlib import Path

import pytest

from rlhf_ray.errors import ConfigError
from rlhf_ray.prompts.tokenizer import load_tokenizer


def test_a_tokenizer_is_loaded_once_a_process(tokenizer_path: str) -> None:
    tokenizer = load_tokenizer(tokenizer_path)
    assert tokenizer.decode(tokenizer("naïve 1+1=")["input_ids"]) == "naïve 1+1="
    assert load_tokenizer(tokenizer_path) is tokenizer


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.path = '.*/nowhere': there is no such folder .*tokenizer_path"):
        load_tokenizer(str(tmp_path / "nowhere"))


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="it is a file, not a folder"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))


def test_a_folder_with_weights_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(ConfigError, match=r"the folder holds no tokenizer \(tokenizer\.json\).*tokenizer_path"):
        load_tokenizer(str(tmp_path))


def test_a_damaged_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{not json")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    with pytest.raises(ConfigError, match="no tokenizer could be loaded"):
        load_tokenizer(str(tmp_path))


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"no tokenizer could be loaded .*name a tokenizer's folder or hub id"):
        load_tokenizer("rlhf-ray-tests/no-such-model")
