from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray import pickling
from rlhf_ray.config.settings import RewardSettings
from rlhf_ray.errors import ConfigError
from rlhf_ray.pickling import deserialize, serialize
from rlhf_ray.rewards import resolve_rewards

ELSEWHERE = """
import sys
from rlhf_ray.pickling import deserialize
reward = deserialize(sys.stdin.buffer.read())
print(reward.name, reward.weight, reward.function(completion_ids=[[1, 2, 3]]))
"""


def call_elsewhere(payload: bytes) -> str:
    """What the reward says in a process that has none of this one's modules."""
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE], input=payload, capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().strip()


def test_a_function_of_a_lone_file_travels_with_what_it_uses(tmp_path: Path) -> None:
    path = tmp_path / "my_rewards.py"
    path.write_text(
        "SCALE = 2.0\n\ndef count(ids):\n    return len(ids)\n\n"
        "def score(*, completion_ids, **columns):\n    return [SCALE * count(ids) for ids in completion_ids]\n"
    )
    rewards = resolve_rewards(RewardSettings(functions=[f"{path}:score"], weights=[0.5]))
    (payload,) = [reward.serialized() for reward in rewards]
    path.unlink()
    assert call_elsewhere(payload) == "score 0.5 [6.0]"


def test_closures_and_built_ins_travel() -> None:
    scale = 3.0
    rewards = resolve_rewards(
        RewardSettings(functions=[lambda *, completion_ids, **columns: [scale * len(completion_ids[0])], "length"])
    )
    payloads = [reward.serialized() for reward in rewards]
    assert call_elsewhere(payloads[0]) == "lambda 1.0 [9.0]"
    assert call_elsewhere(payloads[1]) == "length 1.0 [-0.003]"


def test_packing_leaves_no_module_marked() -> None:
    from ray import cloudpickle

    before = cloudpickle.list_registry_pickle_by_value()
    [reward.serialized() for reward in resolve_rewards(RewardSettings(functions=[lambda **columns: [1.0]]))]
    assert cloudpickle.list_registry_pickle_by_value() == before


def test_threads_may_pack_the_same_lone_file_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "shared_rewards.py"
    path.write_text("def score(*, completion_ids, **columns):\n    return [1.0 for _ in completion_ids]\n")
    rewards = resolve_rewards(RewardSettings(functions=[f"{path}:score"]))
    dumps = pickling.cloudpickle.dumps

    def slow_dumps(value: object) -> bytes:
        time.sleep(0.02)
        return dumps(value)

    monkeypatch.setattr(pickling.cloudpickle, "dumps", slow_dumps)
    with ThreadPoolExecutor(4) as threads:
        packed = list(threads.map(lambda _: [reward.serialized() for reward in rewards], range(8)))
    assert len(packed) == 8
    assert len({len(payload) for (payload,) in packed}) == 1, "one names the file instead of carrying it"


def test_what_cannot_travel_is_refused_by_name() -> None:
    lock = threading.Lock()

    def guarded(**columns: Any) -> list[float]:
        with lock:
            return [1.0]

    with pytest.raises(ConfigError, match=r"guarded.*cannot be sent to a reward worker.*lock"):
        [reward.serialized() for reward in resolve_rewards(RewardSettings(functions=["length", guarded]))]


def test_other_values_come_back() -> None:
    assert deserialize(serialize({"a": [1]}, defined_by=dict)) == {"a": [1]}


def test_rewards_come_back_in_order() -> None:
    rewards = resolve_rewards(RewardSettings(functions=["length", "gsm8k"], weights=[1, 2]))
    assert [(r.name, r.weight) for r in map(deserialize, [reward.serialized() for reward in rewards])] == [
        ("length", 1.0),
        ("gsm8k", 2.0),
    ]


def test_modules_are_found_where_this_process_finds_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "judges").mkdir()
    (tmp_path / "judges" / "__init__.py").write_text("")
    (tmp_path / "judges" / "scale.py").write_text("SCALE = 2.0\n")
    text = "from .scale import SCALE\n\ndef score(*, completion_ids, **_):\n    return [SCALE * len(completion_ids)]\n"
    (tmp_path / "judges" / "best.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    (payload,) = [reward.serialized() for reward in resolve_rewards(RewardSettings(functions=["judges.best:score"]))]
    assert call_elsewhere(payload) == "score 1.0 [2.0]"
