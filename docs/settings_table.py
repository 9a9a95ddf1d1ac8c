"""Around the loop: writes the reference of settings, ``docs/settings.md``, from ``rlhf_ray/config/settings.py``.

Run ``python docs/settings_table.py`` after a change of a setting; a test compares the two.
"""

from __future__ import annotations

import ast
import html
import json
import re
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from rlhf_ray.config.settings import section_types

INTRODUCTION = """\
# Settings

Written by `docs/settings_table.py` from `rlhf_ray/config/settings.py`, where each setting is declared; edit that file,
not this one.

The same sections and names hold in Python (`PPOConfig().training(lr=1e-6)`), in YAML (`training: {lr: 1e-6}`) and on
the command line (`training.lr=1e-6`). Defaults are written as in YAML; `null` is Python's `None`. A name that does not
exist is an error that names the setting that was meant, where one is. `rlhf-ray config` prints every setting of a run.
Values are YAML 1.2: only `true` and `false` are booleans, and a number that YAML 1.1 reads differently, such as `010`,
is an error. `algorithm=GRPO` on the command line takes the place of the file's `algorithm`.

Defaults are those of a language model, with their source where they are published ones. A run that names neither
`model.path` nor `data.path` trains the built-in model on the built-in task, and takes the quickstart's preset: the
values in parentheses, all of them. Naming either of the two ends the preset. What is given always wins, and an
algorithm's own defaults ([algorithms](algorithms/README.md)) win over the preset. A run's `config.yaml` holds every
value, wherever it came from, and so reruns the run.
"""


def settings_page() -> str:
    """Return the whole page."""
    sections = (section_text(name, declared) for name, declared in section_types().items())
    return "\n".join([INTRODUCTION, *sections])


def section_text(name: str, section: Any) -> str:
    """Return a section's heading, its purpose and its table."""
    head = ["| setting | values | default | meaning | source of the default |", "|---|---|---|---|---|"]
    lines = [f"## {name}", "", section.__doc__, "", *head]
    return "\n".join([*lines, *rows(section), ""])


def rows(section: Any) -> Iterator[str]:
    """Yield a table row a setting."""
    for item in fields(section):
        meaning = html.escape(item.metadata["meaning"], quote=False)
        source = item.metadata.get("source", "")
        preset = f" (`{as_yaml(item.metadata['quickstart'])}`)" if "quickstart" in item.metadata else ""
        yield f"| `{item.name}` | {values(str(item.type))} | `{default(item)}`{preset} | {meaning} | {source} |"


def values(annotation: str) -> str:
    """Say what a setting may be: the choices of a literal, else the annotation."""
    choices = re.fullmatch(r"Literal\[(.*)\]", annotation)
    if choices is not None:
        return ", ".join(f"`{choice}`" for choice in ast.literal_eval(f"[{choices[1]}]"))
    return f"`{annotation}`".replace("|", r"\|")


def default(item: Field[Any]) -> str:
    """Write a default as YAML."""
    return as_yaml(item.default if item.default_factory is MISSING else item.default_factory())


def as_yaml(value: Any) -> str:
    """Write a value as YAML reads it."""
    return value if isinstance(value, str) else json.dumps(value)


if __name__ == "__main__":
    (Path(__file__).parent / "settings.md").write_text(settings_page(), encoding="utf-8")
