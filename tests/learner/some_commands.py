"""Requests for tests, with values in the fields that a test does not look at."""

from __future__ import annotations

from typing import Any

from rlhf_ray.checkpoints.folder import Folder
from rlhf_ray.learner.remote.commands import (
    Command,
    ExportCommand,
    LayoutCommand,
    LoadCommand,
    OffloadCommand,
    PublishCommand,
    RecallCommand,
    RenewCommand,
    Request,
    SaveCommand,
    SendCommand,
    StageCommand,
    StopCommand,
    UpdateCommand,
)


def update(version: int = 1, **fields: Any) -> UpdateCommand:
    defaults: dict[str, Any] = {
        "batch": None,
        "plan": None,
        "update_policy": True,
        "with_estimates": False,
        "keeps_state": False,
        "spared_version": None,
    }
    return UpdateCommand(version=version, **defaults | fields)


def send(*replica_ids: str) -> SendCommand:
    return SendCommand(app_name="app", deployment_name="deployment", tensor_parallel_size=1, replica_ids=replica_ids)


def command(name: str, version: int = 1) -> Command:
    """One of each kind."""
    nothing: Any = None
    commands = (
        LayoutCommand(),
        update(version),
        PublishCommand(),
        StageCommand(),
        send(),
        SaveCommand(folder=Folder.at("folder")),
        LoadCommand(folder=Folder.at("folder"), version=version),
        RecallCommand(version=version),
        RenewCommand(spec=nothing, begins=True),
        ExportCommand(folder="folder"),
        OffloadCommand(),
        StopCommand(),
    )
    return next(one for one in commands if one.name == name)


def request(*commands: Command | str, group: str) -> Request:
    """For one rank, several, or all."""
    return Request(commands=tuple(command(one) if isinstance(one, str) else one for one in commands), group=group)
