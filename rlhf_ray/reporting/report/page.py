"""The page: its own script, styles and data in one HTML file that asks no one for anything.

What a model wrote is the reader's least trusted input, so the page is closed in three ways. The data is JSON in a
block that no browser runs and no text in it can end. The script puts it into the document as text, never as markup.
And the policy of the page lets run the one script whose hash it names: no inline handler, no other address.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

__all__ = ["embedded_json", "page", "rounded"]

_SCRIPTS = (
    "vendor/uplot/uPlot.iife.min.js",
    "elements.js",
    "numbers.js",
    "state.js",
    "series.js",
    "charts.js",
    "runs.js",
    "tokens.js",
    "conversation.js",
    "browser.js",
    "main.js",
)
_STYLES = ("vendor/uplot/uPlot.min.css", "page.css")
_PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")

# A browser's HTML parser looks for "</script" and "<!--" in the block, old JavaScript parsers for the line separators.
_ESCAPES = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}


def page(contents: Mapping[str, Any], *, title: str) -> str:
    """Write the page.

    Args:
        contents: What ``report_contents`` gathered.
        title: Name of the page in the browser.
    """
    script = "\n".join(_asset(name) for name in _SCRIPTS)
    style = "\n".join(_asset(name) for name in _STYLES)
    sources = f"script-src '{_hash(script)}'; style-src '{_hash(style)}'"
    parts = {
        "policy": f"default-src 'none'; {sources}; base-uri 'none'; form-action 'none'",
        "title": html.escape(title),
        "license": _asset("vendor/uplot/LICENSE").strip(),
        "style": style,
        "script": script,
        "data": embedded_json(contents),
    }
    # In one pass: a placeholder in a completion is text.
    text = _PLACEHOLDER.sub(lambda match: parts[match[1]], _asset("page.html"))
    # A folder's name may hold bytes that are no text in any encoding.
    return text.encode("utf-8", "replace").decode("utf-8")


def embedded_json(value: object) -> str:
    """JSON that is safe between ``<script>`` tags, whatever the strings in it hold."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).translate(_ESCAPES)


def rounded(value: float | None, digits: int = 6) -> float | None:
    """A number with the significant digits that the page can show; NaN and infinities have no name in JSON."""
    return float(f"{value:.{digits}g}") if value is not None and math.isfinite(value) else None


def _asset(name: str) -> str:
    return files(__package__).joinpath("assets", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
