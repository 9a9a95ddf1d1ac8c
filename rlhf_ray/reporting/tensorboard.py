"""TensorBoard events.

Written with TensorBoard's own event writer: ``torch.utils.tensorboard`` and ``tensorboardX`` wrap the same format and
import torch, which the driver has no other use for.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rlhf_ray.config.settings import Settings
from rlhf_ray.reporting.metrics import Scalar
from rlhf_ray.reporting.reporter import Reporter
from rlhf_ray.reporting.run_directory import RunDirectory

__all__ = ["TensorBoardReporter"]


class TensorBoardReporter(Reporter):
    """Writes every number of a result as a scalar at its iteration, and the configuration as text."""

    def __init__(self, settings: Settings, run_dir: RunDirectory) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        run_dir.tensorboard.mkdir(exist_ok=True)
        self._writer = EventFileWriter(str(run_dir.tensorboard))
        if last := run_dir.last_iteration():
            # TensorBoard leaves out what an earlier process of this run wrote of later iterations.
            self._add(last + 1, session_log=SessionLog(status=SessionLog.START))
        if run_dir.config.exists():
            text = f"```yaml\n{run_dir.config.read_text(encoding='utf-8')}\n```"
            self._add(0, summary=Summary(value=[_text("config", text)]))

    def report(self, row: Mapping[str, Scalar]) -> None:
        """Write the iteration's scalars."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        scalars = [
            Summary.Value(tag=key, simple_value=float(value))
            for key, value in row.items()
            if key != "training_iteration" and not isinstance(value, str)
        ]
        self._add(int(row["training_iteration"]), summary=Summary(value=scalars))

    def stop(self) -> None:
        """Close the event file."""
        self._writer.close()

    def _add(self, step: int, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.add_event(Event(wall_time=time.time(), step=step, **content))
        self._writer.flush()


def _text(tag: str, text: str) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.text.metadata import create_summary_metadata
    from tensorboard.util.tensor_util import make_tensor_proto

    return Summary.Value(
        tag=f"{tag}/text_summary",
        metadata=create_summary_metadata(display_name=tag, description=""),
        tensor=make_tensor_proto([text.encode()], shape=(1,)),
    )
