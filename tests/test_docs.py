"""The generated pages and docs/algorithms/ against the code: what they show must compile, run and be declared."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

from rlhf_ray import AlgorithmConfig, ConfigError
from rlhf_ray.algorithms import built_in
from rlhf_ray.config import plugins
from rlhf_ray.config.builder import ALGORITHMS
from rlhf_ray.config.settings import quickstart_preset, section_types, setting_types
from rlhf_ray.reporting.metrics import METRICS, metric_for


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


DOCS = Path(__file__).parents[1] / "docs"
INDEX = DOCS / "algorithms" / "README.md"
PAGES = tuple(sorted((DOCS / "algorithms").glob("*.md")))
TABLES = script("algorithm_tables")
CLASSES: list[type[AlgorithmConfig]] = TABLES.config_classes()

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
every_class = pytest.mark.parametrize("config_class", CLASSES, ids=lambda item: item.algorithm_name)


class Block(NamedTuple):
    page: Path
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}: {self.text.splitlines()[0]}"


def blocks(language: str, *pages: Path) -> list[Block]:
    return [
        Block(page, language, text)
        for page in pages
        for text in re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    ]


# --- what is generated ------------------------------------------------------------------------------------------------


def test_the_page_of_metrics_is_the_one_that_its_script_writes() -> None:
    page = script("metrics_table").metrics_page()
    assert (DOCS / "metrics.md").read_text() == page, "run: python docs/metrics_table.py"
    assert re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE) == [metric.key for metric in METRICS]
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {4}


def test_the_page_of_models_is_the_one_that_its_script_writes() -> None:
    assert (DOCS / "models.md").read_text() == script("models_table").models_page(), "run: python docs/models_table.py"


def test_the_table_of_what_fits_is_the_one_that_its_script_writes() -> None:
    text = (DOCS / "clusters.md").read_text()
    assert text == script("memory_table").page(text), "run: python docs/memory_table.py"


@every_page
def test_tables_of_algorithms_are_those_that_the_script_writes(page: Path) -> None:
    assert page.read_text() == TABLES.refreshed(page), "run: python docs/algorithm_tables.py"


@every_class
def test_every_algorithm_has_a_page_with_its_defaults_and_a_row_of_the_index(
    config_class: type[AlgorithmConfig],
) -> None:
    page = TABLES.page_of(config_class)
    text = page.read_text()
    assert f"algorithm: {config_class.algorithm_name}\n" in text
    assert "<!-- defaults -->" in text
    for section, values in config_class.defaults.items():
        for name, value in values.items():
            if value != getattr(getattr(AlgorithmConfig.from_dict({}).settings, section), name):
                assert f"| `{section}.{name}` |" in text
    assert f"| [{config_class.algorithm_name}]({page.name}) | `{config_class.__name__}` |" in INDEX.read_text()


def test_every_algorithm_is_a_class_here_and_every_page_an_algorithm() -> None:
    assert {item.algorithm_name for item in CLASSES} == set(built_in())
    assert {TABLES.page_of(item) for item in CLASSES} == set(PAGES) - {INDEX}


def test_what_is_said_of_the_baseline_is_what_its_table_says() -> None:
    rows = re.findall(r"^\| (\w+) \| (\d) \| [\d.]+ \| ([\d.]+) \(", INDEX.read_text(), re.MULTILINE)
    of_seeds = [float(after) for _, seeds, after in rows if int(seeds) > 1]
    assert (len(of_seeds), len(rows)) == (7, len(CLASSES))
    said = f"seven algorithms with three seeds take the model from 47 % to between {min(of_seeds) * 100:.0f} % and "
    assert f"{said}{max(of_seeds) * 100:.0f} % on average" in " ".join(INDEX.read_text().split())


# --- code -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", blocks("python", *PAGES, DOCS / "rewards.md"), ids=str)
def test_python_compiles_and_names_what_there_is(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            # Not hasattr(): it would import what the package imports only on demand.
            assert {name.name for name in node.names} <= set(importlib.import_module(node.module).__all__)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in section_types():
            assert {keyword.arg for keyword in node.keywords} <= set(setting_types(node.func.attr))


@pytest.mark.parametrize("block", blocks("python", *(page for page in PAGES if page != INDEX)), ids=str)
def test_the_configuration_of_a_page_is_a_valid_one(block: Block) -> None:
    names: dict[str, Any] = {}
    configured = "\n".join(line for line in block.text.splitlines() if "algo." not in line)
    exec(compile(configured.replace(".build()", ".validate()"), block.page.name, "exec"), names)
    assert isinstance(names["algo"], AlgorithmConfig)
    assert TABLES.page_of(type(names["algo"])) == block.page
    # Who adds a model of their own must not take numbers of the quickstart's along.
    preset = quickstart_preset()
    assert not names["algo"]._given.items() & preset.items()


@pytest.mark.parametrize("block", blocks("yaml", *PAGES), ids=str)
def test_yaml_is_a_configuration(block: Block) -> None:
    read = AlgorithmConfig.from_yaml(block.text).validate()
    assert block.page == INDEX or TABLES.page_of(type(read)) == block.page


@pytest.fixture
def own_names() -> Iterator[dict[str, Any]]:
    """What the examples of "Write your own" define; the names that they register are gone afterward."""
    tables: list[dict[str, Any]] = [plugins.ADVANTAGES.plugins, plugins.LOSSES.plugins, ALGORITHMS]
    before = [set(table) for table in tables]
    names: dict[str, Any] = {"__name__": "examples"}
    try:
        configurations = []
        for block in blocks("python", INDEX):
            exec(compile(block.text, INDEX.name, "exec"), names)
            configurations.append(names["config"])
        yield names | {"configurations": configurations}
    finally:
        for table, kept in zip(tables, before, strict=True):
            for name in set(table) - kept:
                del table[name]


def test_the_examples_run_and_are_valid_configurations(own_names: dict[str, Any]) -> None:
    assert len(own_names["configurations"]) == 4
    for configuration in own_names["configurations"]:
        training = configuration.validate().settings.training
        plugins.advantage_plugin(training.advantage, training.advantage_args)
        plugins.loss_plugin(training.loss, training.loss_args)
    named = AlgorithmConfig.from_yaml("algorithm: Midpoint")
    assert type(named) is own_names["MidpointConfig"]
    assert named.algorithm_class.__name__ == "Midpoint"


def test_an_argument_without_a_value_is_an_error_before_anything_is_started() -> None:
    def scaled(rewards: torch.Tensor, scale: float) -> torch.Tensor:
        return rewards * scale

    assert "An argument that has neither is an error before anything is started." in INDEX.read_text()
    plugins.register_advantage("scaled")(scaled)
    try:
        with pytest.raises(ConfigError, match=r"training\.advantage_args = \{\}: scaled needs scale"):
            AlgorithmConfig.from_dict({"training": {"advantage": "scaled"}}).validate()
    finally:
        del plugins.ADVANTAGES.plugins["scaled"]


def test_the_advantage_of_completions_compares_a_group(own_names: dict[str, Any]) -> None:
    plugin = plugins.advantage_plugin("group_midpoint", {})
    assert plugin.per_completion
    assert plugin.compares_groups
    given = {
        "rewards": torch.tensor([1.0, 5.0, 0.0, 5.0, 0.25]),
        "group_ids": torch.tensor([4, 9, 4, 9, 4]),
        "lengths": torch.ones(5),
    }
    assert plugin.call(given).tolist() == [0.5, 0.0, -0.5, 0.0, -0.25]


def test_the_advantage_of_tokens_is_0_where_masked(own_names: dict[str, Any]) -> None:
    plugin = plugins.advantage_plugin("late_credit", {"half_life": 1.0})
    assert not plugin.per_completion
    mask = torch.tensor([[True, True, True, False]])
    rewards = torch.tensor([[0.0, 0.0, 2.0, 0.0]])
    assert plugin.call({"rewards": rewards, "mask": mask, "gamma": 1.0}).tolist() == [[0.5, 1.0, 2.0, 0.0]]


def test_the_loss_is_the_policy_gradient_at_ratio_1_and_ignores_padding(own_names: dict[str, Any]) -> None:
    logprobs = torch.tensor([[-1.0, -2.0, float("inf")]]).requires_grad_()
    given = {
        "logprobs": logprobs,
        "old_logprobs": torch.tensor([[-1.0, -2.0, 0.0]]),
        "advantages": torch.tensor([[1.0, -3.0, 9.0]]),
        "mask": torch.tensor([[True, True, False]]),
        "aggregation": "token_mean",
        "normalizer": 2.0,
        "clip_low": 0.2,
    }
    loss, metrics = plugins.loss_plugin("ratio_penalty", {"strength": 0.5}).call(given)
    loss.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [[-0.5, 1.5, 0.0]]
    assert {name: value.item() for name, value in metrics.items()} == {"squared_log_ratio": 0.0}


def test_the_parameters_are_those_that_a_function_may_ask_for() -> None:
    text = INDEX.read_text()
    tables = re.findall(r"^\| parameter \| what it is \|\n\|---\|---\|\n((?:\| .*\n)+)", text, re.MULTILINE)
    named = [tuple(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) for table in tables]
    assert named == [plugins.PER_COMPLETION, plugins.PER_TOKEN, plugins.OF_LOSS]


# --- what is referred to ----------------------------------------------------------------------------------------------


@every_page
def test_metrics_that_are_named_are_declared(page: Path) -> None:
    sections = "|".join(sorted({metric.key.partition("/")[0] for metric in METRICS if "/" in metric.key}))
    named = re.findall(rf"`((?:{sections})/[^`]+)`", page.read_text())
    assert [key for key in named if metric_for(key) is None and key != "learner/<name>"] == []
    assert len(named) >= 3


@every_page
def test_settings_that_are_named_exist(page: Path) -> None:
    for section, name in re.findall(rf"`({'|'.join(section_types())})\.(\w+)[`=]", page.read_text()):
        assert name in setting_types(section), f"{section}.{name}"


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for target, _, anchor in re.findall(r"\]\(([^)\s#]*)(#([^)\s]+))?\)", page.read_text()):
        if target.startswith("https://"):
            continue
        linked = page.parent / target if target else page
        assert linked.exists(), target
        titles = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


@every_page
def test_fences_and_formulas_are_closed(page: Path) -> None:
    lines = page.read_text().splitlines()
    fences = [line for line in lines if line.startswith("```")]
    assert all(line[3:] for line in fences[::2])
    assert fences[1::2] == ["```"] * (len(fences) // 2)
    assert sum(line == "$$" for line in lines) % 2 == 0


@every_page
def test_lines_of_text_are_at_most_120_characters(page: Path) -> None:
    assert [line for line in page.read_text().splitlines() if len(line) > 120 and not line.startswith("|")] == []


@every_class
def test_papers_are_those_that_the_code_names(config_class: type[AlgorithmConfig]) -> None:
    package = DOCS.parent / "rlhf_ray"
    code = "".join(
        path.read_text()
        for folder in ("algorithms", "advantages", "losses")
        for path in (package / folder).glob("*.py")
    )
    text = TABLES.page_of(config_class).read_text()
    ids = re.findall(r"arXiv:([\d.]+\d)", text)
    assert ids
    assert set(ids) <= set(re.findall(r"arXiv:([\d.]+\d)", code))
    assert set(ids) == set(re.findall(r"arxiv.org/abs/([\d.]+\d)", text))


# --- how all text is spelled ------------------------------------------------------------------------------------------

BRITISH = re.compile(
    r"(?:optim|normal|initial|token|synchron|general|serial|quant|summar|recogn|organ|minim|maxim|penal|util)is(?:e|ing|ation)"
    r"|behaviour|colour|neighbour|favour|honour|licence|catalogue|artefact|labelled|modelling|centred",
    re.IGNORECASE,
)
TEXTS = [
    path
    for pattern in ("*.md", "docs/**/*.md", "rlhf_ray/**/*.py", "examples/*", "benchmarks/*.py", "tests/**/*.py")
    for path in DOCS.parent.glob(pattern)
    # The old names, which are answered with the new ones, are in the table of names.
    if path.is_file() and path not in (Path(__file__), DOCS.parent / "rlhf_ray/config/names.py")
]


def test_spelling_is_american() -> None:
    known = re.compile(r"[\"`](?:rewards\.normalise|normalise|kl_penalised)(?:_std|_rewards)?[\"`]")
    found = {
        f"{path.relative_to(DOCS.parent)}:{number}: {line.strip()}"
        for path in TEXTS
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if BRITISH.search(known.sub("", line))
    }
    assert not found
