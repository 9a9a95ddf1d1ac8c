from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlhf_ray.reporting import RunDirectory
from rlhf_ray.reporting.tensorboard import TensorBoardReporter
from rlhf_ray.settings import Settings


def test_scalars_and_configuration_can_be_read_back(run_dir: RunDirectory, result: dict[str, Any]) -> None:
    reporter = TensorBoardReporter()
    reporter.start(Settings(), run_dir)
    reporter.report(result)
    reporter.report({**result, "training_iteration": 4, "rollouts": {"reward_mean": 0.625}})
    reporter.stop()
    events = EventAccumulator(str(run_dir.tensorboard)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("rollouts/reward_mean")] == [(3, 0.5), (4, 0.625)]
    assert math.isnan(events.Scalars("learner/value_loss")[0].value)
    assert "training_iteration" not in events.Tags()["scalars"]
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "lr: 0.0002" in text


def test_events_are_on_disk_before_the_run_ends(run_dir: RunDirectory, result: dict[str, Any]) -> None:
    reporter = TensorBoardReporter()
    reporter.start(Settings(), run_dir)
    reporter.report(result)
    assert EventAccumulator(str(run_dir.tensorboard)).Reload().Scalars("rollouts/reward_mean")[0].value == 0.5
    reporter.stop()


def test_text_values_are_left_out(run_dir: RunDirectory) -> None:
    reporter = TensorBoardReporter()
    reporter.start(Settings(), run_dir)
    reporter.report({"training_iteration": 1, "note": "warm", "flag": True})
    reporter.stop()
    assert EventAccumulator(str(run_dir.tensorboard)).Reload().Tags()["scalars"] == ["flag"]


def test_torch_is_not_imported() -> None:
    script = """
import sys, tempfile
from rlhf_ray.reporting import RunDirectory
from rlhf_ray.reporting.tensorboard import TensorBoardReporter
from rlhf_ray.settings import Settings
reporter = TensorBoardReporter()
reporter.start(Settings(), RunDirectory.create(tempfile.mkdtemp(), algorithm="PPO"))
reporter.report({"training_iteration": 1, "a": 1.0})
reporter.stop()
assert not {"torch", "tensorflow", "ray"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
