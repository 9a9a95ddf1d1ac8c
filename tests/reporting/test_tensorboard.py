from __future__ import annotations

import math
import subprocess
import sys
import time
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlhf_ray.config.settings import Settings
from rlhf_ray.reporting import RunDirectory, flatten
from rlhf_ray.reporting.tensorboard import TensorBoardReporter


def test_scalars_and_configuration_can_be_read_back(run_dir: RunDirectory, result: dict[str, Any]) -> None:
    reporter = TensorBoardReporter(Settings(), run_dir)
    reporter.report(flatten(result))
    reporter.report(flatten({**result, "training_iteration": 4, "rollouts": {"reward_mean": 0.625}}))
    reporter.stop()
    events = EventAccumulator(str(run_dir.tensorboard)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("rollouts/reward_mean")] == [(3, 0.5), (4, 0.625)]
    assert math.isnan(events.Scalars("learner/value_loss")[0].value)
    assert "training_iteration" not in events.Tags()["scalars"]
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "lr: 0.0002" in text


def test_a_resumed_run_replaces_the_iterations_that_run_again(run_dir: RunDirectory) -> None:
    def report(*values: tuple[int, float]) -> None:
        reporter = TensorBoardReporter(Settings(), run_dir)
        for iteration, value in values:
            reporter.report({"training_iteration": iteration, "x": value})
            time.sleep(0.01)  # Event files are read in the order of their time.
        reporter.stop()

    report((1, 0.1), (2, 0.2), (3, 0.3))
    run_dir.metrics.write_text('{"training_iteration": 1}\n{"training_iteration": 2}\n')
    time.sleep(1.1)  # They are named by the second.
    report((3, 3.0), (4, 4.0))

    events = EventAccumulator(str(run_dir.tensorboard)).Reload().Scalars("x")
    assert [(event.step, event.value) for event in events] == [
        (1, pytest.approx(0.1)),
        (2, pytest.approx(0.2)),
        (3, 3.0),
        (4, 4.0),
    ]


def test_events_are_on_disk_before_the_run_ends(run_dir: RunDirectory, result: dict[str, Any]) -> None:
    reporter = TensorBoardReporter(Settings(), run_dir)
    reporter.report(flatten(result))
    assert EventAccumulator(str(run_dir.tensorboard)).Reload().Scalars("rollouts/reward_mean")[0].value == 0.5
    reporter.stop()


def test_text_values_are_left_out(run_dir: RunDirectory) -> None:
    reporter = TensorBoardReporter(Settings(), run_dir)
    reporter.report({"training_iteration": 1, "note": "warm", "flag": True})
    reporter.stop()
    assert EventAccumulator(str(run_dir.tensorboard)).Reload().Tags()["scalars"] == ["flag"]


def test_torch_is_not_imported() -> None:
    script = """
import sys, tempfile
from rlhf_ray.reporting import RunDirectory
from rlhf_ray.reporting.tensorboard import TensorBoardReporter
from rlhf_ray.config.settings import Settings
reporter = TensorBoardReporter(Settings(), RunDirectory.create(tempfile.mkdtemp(), algorithm="PPO"))
reporter.report({"training_iteration": 1, "a": 1.0})
reporter.stop()
assert not {"torch", "tensorflow", "ray"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
