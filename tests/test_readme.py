"""README.md and docs/ against the code: what they show must parse, exist and be true."""

from __future__ import annotations

import ast
import html
import importlib
import importlib.util
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from rlhf_ray import PPOConfig, cli, errors
from rlhf_ray.config.settings import section_types, setting_types

ROOT = Path(__file__).parents[1]
# test_extending.py runs the page about extending, which adds what does not exist.
PAGES = (ROOT / "README.md", *sorted({*(ROOT / "docs").glob("*.md")} - {ROOT / "docs" / "extending.md"}))
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


class Block(NamedTuple):
    page: str
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}: {self.text.splitlines()[0]}"


def blocks(*languages: str) -> list[Block]:
    found = []
    for page in PAGES:
        for language, text in re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
            if language in languages:
                found.append(Block(page.name, language, text))
    return found


def test_every_fence_is_closed_and_names_its_language() -> None:
    for page in PAGES:
        fences = re.findall(r"^```(.*)$", page.read_text(), re.MULTILINE)
        assert all(fences[::2]), page
        assert not any(fences[1::2]), page
        assert len(fences) % 2 == 0, page


def test_the_table_of_processes_names_all_that_start_an_actor() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    table = text.partition("The processes of a run:")[2].partition("\n## ")[0]
    # An actor's class is capitalized; a task's function is not.
    starts_an_actor = re.compile(r"ray\.remote(\(\*\*\w+\))?\((spec\.worker_class|[A-Z]\w+)\)")
    modules = [path for path in (ROOT / "rlhf_ray").rglob("*.py") if starts_an_actor.search(path.read_text())]
    assert len(modules) >= 4
    for path in modules:
        assert f"`{path.relative_to(ROOT)}`" in table


# --- code -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_compiles_and_names_what_there_is(block: Block) -> None:
    tree = ast.parse(block.text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.module is not None
            # Not hasattr(): it would import what the package imports only on demand.
            assert {name.name for name in node.names} <= set(importlib.import_module(node.module).__all__)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in section_types():
            given = {keyword.arg for keyword in node.keywords}
            assert given <= set(setting_types(node.func.attr)), node.func.attr


def test_the_configuration_in_python_is_a_valid_one() -> None:
    (block,) = [block for block in blocks("python") if "PPOConfig()\n    .model(" in block.text]
    tree = ast.parse(block.text)
    last = next(i for i, node in enumerate(tree.body) if isinstance(node, ast.Assign))
    names: dict[str, Any] = {}
    exec(compile(ast.Module(body=tree.body[: last + 1], type_ignores=[]), "README.md", "exec"), names)
    config = names["config"].validate()
    assert config.settings.rewards.functions == [names["my_reward"]]
    assert config.settings.learners.num_learners == 4


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_yaml_is_a_configuration(block: Block) -> None:
    assert PPOConfig.from_yaml(block.text) != PPOConfig()


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every ``rlhf-ray`` command line of the pages, without what stands before the program."""
    for block in blocks("bash", "console"):
        for line in re.sub(r"\\\n\s*", " ", block.text).splitlines():
            words = shlex.split(line, comments=True)
            if "rlhf-ray" in words:
                yield block.page, words[words.index("rlhf-ray") + 1 :]


def help_of(*command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        cli.main([*command, "--help"])
    return capsys.readouterr().out


# What a page shows to be wrong.
REFUSED = {"training.learning_rate=1e-6"}


def test_every_command_exists_with_its_options_and_settings(capsys: pytest.CaptureFixture[str]) -> None:
    overview = help_of(capsys=capsys)
    found = list(commands())
    for page, (command, *words) in found:
        assert re.search(rf"^    {command}\b", overview, re.MULTILINE), (page, command)
        options = [word.partition("=")[0] for word in words if word.startswith("-")]
        known = set(re.findall(r"--[\w-]+", help_of(command, capsys=capsys)))
        assert known.issuperset(options), (page, command)
        settings = [word for word in words if re.match(r"\w+\.\w+=", word) and word not in REFUSED]
        PPOConfig().apply_overrides(settings)
    assert {command for _, (command, *_) in found} >= {"train", "evaluate", "config", "doctor"}


def test_the_configurations_that_commands_read_take_their_settings(tmp_path: Path) -> None:
    shown = [words for _, words in commands() if "examples/gsm8k_ppo.yaml" in words]
    assert len(shown) >= 5
    for words in shown:
        overrides = [word for word in words if "=" in word and not word.startswith(("-", "model.path"))]
        cli.load_config(str(ROOT / "examples" / "gsm8k_ppo.yaml"), overrides).validate()


def test_the_wrong_command_says_what_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = blocks("console")
    line, *output = block.text.splitlines()
    assert cli.main(shlex.split(line.removeprefix("$ rlhf-ray "))) == 2
    assert capsys.readouterr().err.splitlines() == output


@every_page
def test_make_targets_exist(page: Path) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    code = [*re.findall(r"`([^`\n]+)`", page.read_text()), *(b.text for b in blocks("bash") if b.page == page.name)]
    for text in code:
        assert set(re.findall(r"^make ([\w-]+)", text, re.MULTILINE)) <= set(targets)


# --- what is referred to ----------------------------------------------------------------------------------------------


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        path, _, section = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        assert not section or section in slugs(linked), target


def slugs(page: Path) -> set[str]:
    """The names under which the headings of a page are linked to."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


@every_page
def test_files_and_tests_that_are_named_exist(page: Path) -> None:
    text = page.read_text()
    for path, _, test in re.findall(r"\b((?:rlhf_ray|tests|docs|examples|benchmarks)/[\w./-]*\w)(::(\w+))?", text):
        assert (ROOT / path).exists(), path
        if test:
            assert re.search(rf"^(async )?def {test}\(", (ROOT / path).read_text(), re.MULTILINE), test


@every_page
def test_settings_that_are_named_exist(page: Path) -> None:
    for section, name in re.findall(rf"\b({'|'.join(section_types())})\.(\w+)\b(?=[=`:])", page.read_text()):
        if name != "py" and f"{section}.{name}=1e-6" not in REFUSED:
            assert name in setting_types(section), f"{section}.{name}"


def test_the_tree_of_errors() -> None:
    (block,) = [block for block in blocks("text") if "RLHFRayError" in block.text]
    assert errors.__doc__ is not None
    for line in block.text.splitlines():
        assert f"    {line}\n" in errors.__doc__
    assert all(name in block.text for name in errors.__all__)


def test_nothing_is_left_to_do() -> None:
    assert [page.name for page in PAGES if "TODO" in page.read_text()] == []


# --- the tables of settings -------------------------------------------------------------------------------------------


def table_rows(text: str) -> list[list[str]]:
    """The cells of a page's table rows, head and rule left out."""
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def sections_of_the_page() -> dict[str, str]:
    _, *parts = re.split(r"^## (\w+)$", (ROOT / "docs" / "settings.md").read_text(), flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_the_page_has_every_section() -> None:
    assert list(sections_of_the_page()) == list(section_types())


@pytest.mark.parametrize("section", section_types())
def test_the_page_has_every_setting_with_its_meaning_and_default(section: str) -> None:
    rows = table_rows(sections_of_the_page()[section])
    declared: Any = section_types()[section]
    assert [row[0] for row in rows] == [f"`{item.name}`" for item in fields(declared)]
    for (name, _, default, meaning, source), item in zip(rows, fields(declared), strict=True):
        assert html.unescape(meaning) == item.metadata["meaning"], name
        assert source == item.metadata.get("source", ""), name
        # Default and preset are read as the library reads a file, and change nothing where they hold.
        default, _, preset = default.partition(" (`")
        named = "" if (section, item.name) == ("model", "path") else "model.path: owner/model\n"
        for text, before in ((default, named), (preset.strip("`)") or default, "")):
            changed = f"{before}{section}:\n  {item.name}: {text.strip('`')}\n"
            assert PPOConfig.from_yaml(changed) == PPOConfig.from_yaml(before or "{}\n"), name


def test_the_page_is_the_one_that_its_script_writes() -> None:
    spec = importlib.util.spec_from_file_location("settings_table", ROOT / "docs" / "settings_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "settings.md").read_text() == module.settings_page(), "run: python docs/settings_table.py"


def test_the_short_table_says_what_the_page_says() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text().partition("## Common settings")[2].partition("\n## ")[0]
    rows = table_rows(text)
    assert len(rows) >= 12
    page = {
        f"`{section}.{name.strip('`')}`": [default, meaning]
        for section, part in sections_of_the_page().items()
        for name, _, default, meaning, _ in table_rows(part)
    }
    for name, *rest in rows:
        assert rest == page[name], name
