from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.models import hub
from rlhf_ray.quickstart import model_path

LOOK_UPS = """
import json, os, socket, sys, time
import torch
import datasets, transformers
from rlhf_ray import ConfigError, DataError
from rlhf_ray.config.settings import DataSettings
from rlhf_ray.learner.models import load_critic, load_policy
from rlhf_ray.models.config import load_model_config
from rlhf_ray.prompts.sources import hub_source
from rlhf_ray.prompts.tokenizer import load_tokenizer
from rlhf_ray.rewards.reward_model.check import check_reward_model
from rlhf_ray.rewards.reward_model.reward import RewardModelReward

transformers.AutoTokenizer, transformers.AutoModelForCausalLM  # Imports take seconds of their own.
TRUST = {"trust_remote_code": False}
KERNEL = {"kernels": ("eager",)} | TRUST
LOOK_UPS = {
    "tokenizer": lambda: load_tokenizer("owner/missing"),
    "policy": lambda: load_model_config("model.path", "owner/missing", **TRUST),
    "critic": lambda: load_model_config("model.critic_path", "owner/missing", **TRUST),
    "weights of the policy": lambda: load_policy("owner/missing", **KERNEL),
    "weights of the critic": lambda: load_critic("owner/missing", **KERNEL),
    "reward model": lambda: check_reward_model(RewardModelReward("owner/missing"), "rewards.functions[0]"),
    "dataset": lambda: hub_source(DataSettings(path="owner/missing"), field="data.path").sample(1),
}

def phase():
    found = {}
    for name, look_up in LOOK_UPS.items():
        started = time.monotonic()
        try:
            look_up()
        except (ConfigError, DataError) as error:
            found[name] = [time.monotonic() - started, str(error)]
    return found

result = {"closed": phase()}
listener = socket.socket()
listener.bind(("127.0.0.1", int(os.environ["HF_ENDPOINT"].rpartition(":")[2])))
listener.listen(64)  # The system accepts; nobody answers.
if hub := sys.modules.get("rlhf_ray.models.hub"):
    hub._STATE.asked_at = None
result["silent"] = phase()
started = time.monotonic()
cached = load_model_config("model.path", "owner/cached", **TRUST)
result["cached"] = [len(load_tokenizer("owner/cached")), cached.hidden_size]
result["cached_s"] = time.monotonic() - started
print(json.dumps(result))
"""


def unused_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each look-up took and said, in a process of its own: the libraries read the endpoint when imported."""
    home = tmp_path_factory.mktemp("hf")
    cached = home / "hub" / "models--owner--cached"
    shutil.copytree(model_path(), cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    variables |= {"HF_HOME": str(home), "HF_ENDPOINT": f"http://127.0.0.1:{unused_port()}", "HF_HUB_ETAG_TIMEOUT": "2"}
    variables |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    script = home / "look_ups.py"
    script.write_text(textwrap.dedent(LOOK_UPS))
    done = subprocess.run([sys.executable, script], env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("hub_is", ["closed", "silent"])
def test_look_ups_without_a_hub_end_in_seconds_and_say_what_to_do(hub_is: str, outcome: dict[str, Any]) -> None:
    found = outcome[hub_is]
    assert set(found) == {
        "tokenizer",
        "policy",
        "critic",
        "weights of the policy",
        "weights of the critic",
        "reward model",
        "dataset",
    }
    # Retries take minutes.
    assert sum(seconds for seconds, _ in found.values()) < 30
    for _, text in found.values():
        assert "owner/missing" in text
        assert "the hub (http://127.0.0.1:" in text
        assert ("did not answer within 2 s" if hub_is == "silent" else "cannot be reached") in text
        assert "name a local folder, or check the network, HF_ENDPOINT and HF_HUB_OFFLINE" in text


def test_what_is_in_the_cache_is_used_without_a_hub(outcome: dict[str, Any]) -> None:
    assert outcome["cached"] == [258, 128]
    assert outcome["cached_s"] < 30


# --- in this process --------------------------------------------------------------------------------------------------


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A hub that never answers, and the times it was asked."""
    from huggingface_hub import constants

    asked: list[str] = []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_STATE", hub._State())
    monkeypatch.setattr(hub, "_probe", lambda endpoint: asked.append(endpoint) or "the hub is away")
    return asked


def test_threads_ask_once_and_leave_the_flag_as_it_was(unreachable: list[str]) -> None:
    from huggingface_hub import constants

    seen: list[bool] = []
    barrier = threading.Barrier(4)

    def look_up() -> None:
        barrier.wait()
        with hub.hub_lookup("owner/model"):
            seen.append(constants.HF_HUB_OFFLINE)
            barrier.wait()

    threads = [threading.Thread(target=look_up) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert (seen, constants.HF_HUB_OFFLINE, len(unreachable)) == ([True] * 4, False, 1)


def test_only_what_cannot_be_found_is_said_in_other_words(unreachable: list[str]) -> None:
    said = "there is no folder 'owner/model' here, the hub is away, and the cache"
    with pytest.raises(OSError, match=said), hub.hub_lookup("owner/model"):
        raise FileNotFoundError("not cached")
    with pytest.raises(ValueError, match="a broken file"), hub.hub_lookup("owner/model"):
        raise ValueError("a broken file")


def test_a_local_folder_asks_nobody(unreachable: list[str], tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"^damaged$"), hub.hub_lookup(str(tmp_path)):
        raise OSError("damaged")
    assert hub.hub_environment(str(tmp_path)) == {}
    assert unreachable == []


def test_processes_that_look_up_by_themselves_are_told(unreachable: list[str], tmp_path: Path) -> None:
    assert hub.hub_environment(str(tmp_path), "owner/model") == {"HF_HUB_OFFLINE": "1"}


def test_what_the_user_has_set_is_left_alone(unreachable: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="HF_HUB_OFFLINE is set, and the cache"), hub.hub_lookup("owner/model"):
        raise OSError("not cached")
    assert constants.HF_HUB_OFFLINE is True
    assert unreachable == []
