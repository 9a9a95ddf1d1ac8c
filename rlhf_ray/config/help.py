"""What ``help()`` shows of a configuration's methods: the settings that ``settings.py`` declares."""

from __future__ import annotations

import inspect
from typing import Any

from rlhf_ray.config.settings import Settings, declaration, section_types, setting_types

__all__ = ["document_sections"]


def document_sections(config_class: type[Any]) -> None:
    """Give each section's method the signature and the list of its settings."""
    for section in section_types():
        _document(vars(config_class)[section], section)


def _document(method: Any, section: str) -> None:
    parameters = dict(inspect.signature(method).parameters)
    parameters.pop("values")
    defaults, lines = Settings(), []
    for name, annotation in setting_types(section).items():
        field = f"{section}.{name}"
        declared, default = declaration(field).metadata, defaults[field]
        quickstart = f", quickstart {declared['quickstart']!r}" if "quickstart" in declared else ""
        lines.append(f"    {name}: {declared['meaning']}. Default: {default!r}{quickstart}.")
        keyword = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        parameters.setdefault(name, keyword)
    raises = "Raises:\n    ConfigError: A name is unknown, a value has the wrong type, or this config is frozen."
    method.__doc__ = "\n".join([method.__doc__, "", "Args:", *lines, "", raises])
    method.__signature__ = inspect.Signature([*parameters.values()], return_annotation="Self")
