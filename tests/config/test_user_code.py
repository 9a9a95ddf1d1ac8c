from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config.user_code import load_reference
from rlhf_ray.errors import ConfigError

FILE = """
from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Verdict:
    value: float


def scored(value):
    return Verdict(value).value * 2


def _hidden():
    return 0


limit = 3
"""


@pytest.fixture(autouse=True)
def nothing_stays_imported(tmp_path: Path) -> Iterator[None]:
    yield
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my_code.py"
    path.write_text(FILE)
    return path


def load(reference: str) -> Callable[..., Any]:
    return load_reference(reference, field="training.loss", value=reference)


def error_of(reference: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_reference(reference, field="section.name", value={"name": reference})
    assert (caught.value.field, caught.value.value) == ("section.name", {"name": reference})
    return caught.value


def test_a_function_of_a_module() -> None:
    assert load("json:loads") is json.loads
    assert load("json.decoder:JSONDecoder") is json.JSONDecoder


def test_a_module_beside_the_program(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    monkeypatch.syspath_prepend(str(file.parent))
    function = load("my_code:scored")
    assert function(1.5) == 3.0
    assert function.__module__ == "my_code"


def test_a_function_of_a_file(file: Path) -> None:
    function = load(f"{file}:scored")
    assert function(1.5) == 3.0
    # Under its own name it could be mistaken for another file's, and workers would try to import it.
    assert function.__module__ != "my_code"
    assert function.__module__ not in sys.modules, "no other process could import it"


def test_a_file_is_sought_in_the_working_directory_and_at_home(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    monkeypatch.chdir(file.parent)
    assert load("my_code.py:scored")(1.0) == 2.0
    monkeypatch.chdir("/")
    monkeypatch.setenv("HOME", str(file.parent))
    assert load("~/my_code.py:scored")(2.0) == 4.0


def test_a_path_may_hold_a_colon(file: Path) -> None:
    folder = file.parent / "run:3"
    folder.mkdir()
    moved = file.rename(folder / "my_code.py")
    assert load(f"{moved}:scored")(1.0) == 2.0


def test_files_of_one_name_are_kept_apart(tmp_path: Path) -> None:
    functions = []
    for value in (1, 2):
        path = tmp_path / str(value) / "same.py"
        path.parent.mkdir()
        path.write_text(f"VALUE = {value}\n\n\ndef f():\n    return VALUE\n")
        functions.append(load(f"{path}:f"))
    assert [function() for function in functions] == [1, 2]
    assert len({function.__module__ for function in functions}) == 2


@pytest.mark.parametrize(
    ("reference", "remedy"),
    [
        ("no_such_package_x:f", "no module 'no_such_package_x' on the path"),
        ("no_such_package_x.losses:f", "no module 'no_such_package_x' on the path"),
        ("json.losses:f", "no module 'json.losses' on the path"),
        ("json:lods", "json has no 'lods'; nearest: 'loads'"),
        ("json:decoder", "decoder is no function but module"),
        ("./nowhere/losses.py:f", "/nowhere/losses.py"),
    ],
)
def test_what_is_missing_or_no_function(reference: str, remedy: str) -> None:
    assert remedy in error_of(reference).remedy


def test_a_missing_file_is_named_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert error_of("nowhere.py:f").remedy == f"there is no file {tmp_path / 'nowhere.py'}"
    (tmp_path / "folder.py").mkdir()
    assert error_of("folder.py:f").remedy == f"there is no file {tmp_path / 'folder.py'}"


@pytest.mark.parametrize(
    ("attribute", "remedy"),
    [
        ("scorde", "has no 'scorde'; nearest: 'scored'"),
        ("limit", "limit is no function but int"),
    ],
)
def test_what_is_wrong_in_a_file(file: Path, attribute: str, remedy: str) -> None:
    assert remedy in error_of(f"{file}:{attribute}").remedy


def test_a_private_function_is_not_suggested(file: Path) -> None:
    assert error_of(f"{file}:_hiden").remedy.endswith("has no '_hiden'")


@pytest.mark.parametrize(
    ("text", "raised"),
    [
        ("raise RuntimeError('no GPU here')", "raised RuntimeError: no GPU here"),
        ("import not_installed_x", "raised ModuleNotFoundError: No module named 'not_installed_x'"),
        ("def f(:", "raised SyntaxError:"),
    ],
)
def test_a_module_that_cannot_be_imported_is_not_called_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, raised: str
) -> None:
    path = tmp_path / "broken_code.py"
    path.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert error_of("broken_code:f").remedy.startswith(f"importing broken_code {raised}")
    assert error_of(f"{path}:f").remedy.startswith(f"importing {path} {raised}")
    assert not any("broken_code" in name for name in sys.modules)


def test_a_broken_file_can_be_mended(tmp_path: Path) -> None:
    path = tmp_path / "mended.py"
    path.write_text("raise RuntimeError('not yet')")
    assert "not yet" in error_of(f"{path}:f").remedy
    path.write_text("def f():\n    return 'mended, and longer than before'\n")
    assert load(f"{path}:f")() == "mended, and longer than before"
