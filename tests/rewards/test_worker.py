from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_ray.errors import ConfigError
from rlhf_ray.prompts import tokenizer
from rlhf_ray.quickstart import model_path
from rlhf_ray.rewards.shipping import pack
from rlhf_ray.rewards.worker import load_tokenizer


def test_a_path_is_loaded_where_all_tokenizers_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Path(model_path()).parent
    monkeypatch.setenv("HOME", str(home))
    assert load_tokenizer(model_path(), False) is tokenizer.load_tokenizer(model_path(), trust_remote_code=False)
    # The folder as a setting may name it, and one that is not there.
    loaded = load_tokenizer(f"~/{Path(model_path()).name}", False)
    assert loaded.decode(tokenizer.load_tokenizer(model_path())("1+1=")["input_ids"]) == "1+1="
    with pytest.raises(ConfigError, match="there is no such folder"):
        load_tokenizer(str(tmp_path / "nowhere"), False)


def test_a_tokenizer_that_was_sent_is_unpacked() -> None:
    own = tokenizer.load_tokenizer(model_path())
    sent = pack(own, defined_by=own)
    assert load_tokenizer(sent, False).decode([49, 43]) == "1+"
