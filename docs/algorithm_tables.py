"""Generates the tables of ``docs/algorithms/*.md`` from the configuration classes and the baseline.

Pages mark the place of a table with ``<!-- defaults -->`` ... ``<!-- /defaults -->`` (settings in which the page's
algorithms differ from PPO), ``<!-- curve -->`` (their results in ``benchmarks/results/baseline.json``),
``<!-- index -->`` (all algorithms) or ``<!-- baseline -->`` (the table of the baseline). The text between markers is
replaced; the rest is written by hand.

Run ``python docs/algorithm_tables.py`` after a change of an algorithm's defaults and after ``benchmarks/baseline.py``;
a test compares the two.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from statistics import mean
from textwrap import fill
from typing import Any

from rlhf_ray import AlgorithmConfig, PPOConfig
from rlhf_ray.algorithms import built_in
from rlhf_ray.config.plugins import advantage_plugin
from rlhf_ray.config.settings import section_types

FOLDER = Path(__file__).parent / "algorithms"
BASELINE = Path(__file__).parents[1] / "benchmarks" / "results" / "baseline.json"
CURVES = "../../benchmarks/results/curves"
ConfigClass = type[AlgorithmConfig]


def config_classes() -> list[ConfigClass]:
    """Return every algorithm's configuration class, PPO's first, the others by name."""
    return sorted(built_in().values(), key=lambda item: (item is not PPOConfig, item.algorithm_name.lower()))


def page_of(config_class: ConfigClass) -> Path:
    """Return the page of an algorithm, named like its module."""
    return FOLDER / f"{config_class.__module__.rpartition('.')[2]}.md"


def refreshed(page: Path) -> str:
    """Return a page's text with its tables as they should be."""
    classes = [item for item in config_classes() if page_of(item) == page]
    text = page.read_text(encoding="utf-8")
    text = _filled(_filled(text, "defaults", defaults_table(classes)), "index", index_table())
    text = _filled(text, "baseline", BASELINE.with_suffix(".md").read_text(encoding="utf-8").strip())
    return _filled(text, "curve", "\n\n".join(map(curve, classes)))


def defaults_table(classes: list[ConfigClass]) -> str:
    """Return the settings in which any of these algorithms differs from PPO, one row each."""
    changed = [row for row in _setting_rows([PPOConfig, *classes]) if len(set(row[1:])) > 1]
    if not changed:
        return "None. The other algorithms are compared with PPO; [settings](../settings.md) lists its defaults."
    head = ["setting", "`PPOConfig`", *(f"`{item.__name__}`" for item in classes)]
    return _table(head, changed)


def curve(config_class: ConfigClass) -> str:
    """Return the plot of an algorithm's runs in the published baseline, and their results in one sentence."""
    name = config_class.algorithm_name
    runs = [run for run in json.loads(BASELINE.read_text(encoding="utf-8"))["runs"] if run["algorithm"] == name]
    if not runs:
        return f"{name} is not in the baseline."
    before = mean(run["accuracy"]["0"] for run in runs)
    after = [list(run["accuracy"].values())[-1] for run in runs]
    seeds = "one seed" if len(runs) == 1 else f"{len(runs)} seeds, {min(after):.1%} to {max(after):.1%}"
    accuracy = f"{before:.1%} to {mean(after):.1%} ({seeds})"
    changed = ", ".join(
        f"`{section}.{setting}={value}`"
        for section, settings in runs[0]["changes"].items()
        for setting, value in settings.items()
    )
    changed = f", with {changed}" if changed else ""
    text = f"{name} raises greedy held-out accuracy from {accuracy} in {runs[0]['budget']:,} completions{changed}."
    picture = f"![Accuracy of {name} by completions sampled]({CURVES}/{name}.svg)"
    return f"{picture}\n\n{fill(text, 120)}"


def index_table() -> str:
    """Return all algorithms, one row each."""
    head = ["algorithm", "config class", "advantage", "loss", "critic", "reference by default", "paper"]
    return _table(head, [_index_row(item) for item in config_classes()])


def _filled(text: str, marker: str, table: str) -> str:
    """Replace the text between markers by a table, if the page has them."""
    pattern = re.compile(rf"(<!-- {marker} -->\n).*?(<!-- /{marker} -->)", re.DOTALL)
    return pattern.sub(lambda match: f"{match[1]}\n{table}\n\n{match[2]}", text)


def _index_row(config_class: ConfigClass) -> list[str]:
    training = config_class().settings.training
    reference = f"`kl_coef` {training.kl_coef:g}, in the {training.kl_in}" if training.kl_coef else "no"
    return [
        f"[{config_class.algorithm_name}]({page_of(config_class).name})",
        f"`{config_class.__name__}`",
        f"`{training.advantage}`",
        f"`{training.loss}`",
        "yes" if advantage_plugin(training.advantage, training.advantage_args).needs_critic else "no",
        reference,
        _paper(config_class),
    ]


def _paper(config_class: ConfigClass) -> str:
    """Return the first paper that the class names: a quoted title and an arXiv id in parentheses."""
    text = " ".join((config_class.__doc__ or "").split())
    found = re.search(r'"([^"]+)" \(arXiv:([\d.]+)\)', text)
    if found is None:
        raise ValueError(f"{config_class.__name__} names no paper")
    return f"[{found[1]}](https://arxiv.org/abs/{found[2]})"


def _setting_rows(classes: list[ConfigClass]) -> Iterator[list[str]]:
    configurations = [item().settings for item in classes]
    for section, declared in section_types().items():
        for item in fields(declared):
            values = (getattr(getattr(settings, section), item.name) for settings in configurations)
            yield [f"`{section}.{item.name}`", *(_yaml(value) for value in values)]


def _yaml(value: Any) -> str:
    """Write a value as YAML reads it."""
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("|" + "|".join(cell if cell == "---" else f" {cell} " for cell in line) + "|" for line in lines)


if __name__ == "__main__":
    for path in sorted(FOLDER.glob("*.md")):
        path.write_text(refreshed(path), encoding="utf-8")
