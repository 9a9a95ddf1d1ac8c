from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.errors import ConfigError
from rlhf_ray.prompts.shared_tokenizer import SharedTokenizer
from rlhf_ray.prompts.tokenizer import load_tokenizer

CHAT = [{"role": "user", "content": "naïve?"}]


def in_worker(shared: SharedTokenizer) -> tuple[Any, Any, bool, bool]:
    import sys

    tokenizer = shared.get()
    return (
        tokenizer("naïve 1+1=")["input_ids"],
        tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False),
        shared.get() is tokenizer,
        "torch" in sys.modules,
    )


@pytest.mark.usefixtures("local_ray")
def test_a_worker_gets_the_same_tokenizer_and_imports_no_torch_for_it(make_tokenizer: Any) -> None:
    import ray

    path = make_tokenizer(begin=True)
    shared = SharedTokenizer(path, trust_remote_code=False)
    tokenizer = load_tokenizer(path)
    # A runtime environment of its own: a worker process in which no other task ran.
    run = ray.remote(num_cpus=0, runtime_env={"env_vars": {"FRESH": "1"}})(in_worker)
    ids, chat_ids, kept, torch_imported = ray.get(run.remote(shared), timeout=120)
    assert ids == tokenizer("naïve 1+1=")["input_ids"]
    assert chat_ids == tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert kept
    assert not torch_imported


@pytest.mark.usefixtures("local_ray")
def test_a_tokenizer_that_cannot_be_loaded_fails_in_the_driver(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such folder"):
        SharedTokenizer(str(tmp_path / "gone"), trust_remote_code=False)


CODE = """
from transformers import PreTrainedTokenizerFast


class OwnTokenizer(PreTrainedTokenizerFast):
    own = "yes"
"""


@pytest.mark.usefixtures("local_ray")
def test_a_tokenizer_with_code_of_its_own_is_loaded_where_it_is_used(
    make_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import json

    import ray

    folder = Path(make_tokenizer())
    (folder / "own.py").write_text(CODE)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    shared = SharedTokenizer(str(folder), trust_remote_code=True)
    assert shared.get().own == "yes"
    name, _, _ = ray.get(ray.remote(num_cpus=0)(describe).remote(shared), timeout=120)
    assert name == "OwnTokenizer"


def describe(shared: SharedTokenizer) -> tuple[str, str, int]:
    tokenizer = shared.get()
    return type(tokenizer).__name__, tokenizer.own, len(tokenizer("ab")["input_ids"])
