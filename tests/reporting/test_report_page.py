from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from report_runs import HOSTILE, additions, group, write_run

from rlhf_ray.reporting.report.page import embedded_json, page
from rlhf_ray.reporting.report.run import read_run
from rlhf_ray.reporting.report.writing import report_contents

ASSETS = files("rlhf_ray.reporting.report") / "assets"
OWN_SCRIPTS = sorted(file.name for file in ASSETS.iterdir() if file.name.endswith(".js"))


class Elements(HTMLParser):
    """The tags of a page, and the text of its scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.texts.append("")
        self._open = True

    def handle_endtag(self, tag: str) -> None:
        self._open = False

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts[-1] += data

    def named(self, name: str) -> list[tuple[dict[str, str | None], str]]:
        pairs = zip(self.tags, self.texts, strict=True)
        return [(attributes, text) for (tag, attributes), text in pairs if tag == name]


def sha256(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@pytest.fixture
def hostile_page(tmp_path: Path) -> str:
    groups = [group(number, text, [text, text], [0.0, 1.0]) for number, text in enumerate(HOSTILE, start=10)]
    runs = [read_run(write_run(tmp_path / "run", tables={5: [*additions(), *groups]}))]
    return page(report_contents(runs, tables=6), title="</title><script>1</script>")


@pytest.mark.parametrize("text", HOSTILE)
def test_text_in_the_data_ends_no_block_and_comes_back_whole(text: str) -> None:
    embedded = embedded_json({"text": text, text: [1]})
    assert not re.search("[<>&\u2028\u2029]", embedded)
    assert json.loads(embedded) == {"text": text, text: [1]}


def test_data_without_a_name_in_json_is_an_error() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        embedded_json([float("nan")])


def test_the_page_has_its_own_elements_and_no_others(hostile_page: str) -> None:
    elements = Elements(hostile_page)
    # The text of a page without a run: what completions hold has added nothing.
    assert [tag for tag, _ in elements.tags] == [
        "html", "head", "meta", "meta", "meta", "meta", "meta", "title", "style", "body", "noscript", "p", "div",
        "script", "script",
    ]  # fmt: skip
    assert not [name for _, attributes in elements.tags for name in attributes if name.startswith("on")]


def test_the_policy_allows_the_scripts_and_styles_of_the_page_by_hash_and_nothing_else(hostile_page: str) -> None:
    elements = Elements(hostile_page)
    (policy,) = [a["content"] for a, _ in elements.named("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    (data, _), (_, script) = elements.named("script")
    ((_, style),) = elements.named("style")
    assert data == {"type": "application/json", "id": "data"}
    assert policy is not None
    assert policy.split("; ") == [
        "default-src 'none'",
        f"script-src {sha256(script)}",
        f"style-src {sha256(style)}",
        "base-uri 'none'",
        "form-action 'none'",
    ]


def test_the_policy_comes_before_anything_that_it_governs(hostile_page: str) -> None:
    assert hostile_page.index("Content-Security-Policy") < min(hostile_page.index(tag) for tag in ("<style", "<script"))


def test_the_page_asks_no_one_for_anything(hostile_page: str) -> None:
    named = {"src", "href", "srcset", "action", "data", "poster"}
    assert not [(tag, name) for tag, attributes in Elements(hostile_page).tags for name in attributes if name in named]
    ((_, style),) = Elements(hostile_page).named("style")
    assert not re.search(r"url\(|@import", style)


def test_the_data_of_the_page_is_what_the_run_holds(hostile_page: str) -> None:
    (_, data), _ = Elements(hostile_page).named("script")
    rows = json.loads(data)["runs"][0]["tables"][0]["rows"]
    assert ["".join(row["texts"]) for row in rows[4::2]] == list(HOSTILE)


def test_the_title_is_text(hostile_page: str) -> None:
    assert "<title>&lt;/title&gt;&lt;script&gt;1&lt;/script&gt;</title>" in hostile_page


def test_a_folder_whose_name_is_no_text(tmp_path: Path) -> None:
    text = page({"name": "run-\udcff"}, title="run-\udcff")
    assert "run-?" in text
    text.encode()


def test_the_license_of_the_charts_is_in_the_page(hostile_page: str) -> None:
    assert "Copyright (c) 2022 Leon Sorokin" in hostile_page
    assert (ASSETS / "vendor" / "uplot" / "LICENSE").read_text().strip() in hostile_page


@pytest.mark.parametrize("name", OWN_SCRIPTS)
def test_no_script_makes_markup_or_code_of_text(name: str) -> None:
    text = (ASSETS / name).read_text()
    markup = r"innerHTML|outerHTML|insertAdjacentHTML|createContextualFragment|document\.write|srcdoc"
    assert not re.search(rf"{markup}|\beval\(|new Function|setTimeout|\.href\s*=", text)
    # A line that ends otherwise would be another text to a browser, with another hash.
    assert "\r" not in text


def test_every_asset_is_in_the_page() -> None:
    text = page({}, title="")
    for file in ASSETS.iterdir():
        if file.name.endswith((".js", ".css")):
            assert file.read_text() in text, file.name


def test_the_page_of_no_metrics_is_small() -> None:
    contents: dict[str, Any] = {"runs": [], "charts": [], "missing": [], "differences": []}
    assert len(page(contents, title="")) < 150_000
