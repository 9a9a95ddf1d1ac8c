"""The YAML of configuration files and of overrides on the command line.

Values are those of YAML 1.2: ``true`` and ``false`` are the only booleans (``off`` is text), and 1e-6 is a number.
Numbers that YAML 1.1 and 1.2 read differently, such as 010, are refused.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from rlhf_ray.errors import ConfigError

__all__ = ["parsed_override", "parsed_sections", "yaml_text"]


class _Loader(yaml.SafeLoader):
    """YAML 1.2 in which a name given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode) and keys.count(key.value) > 1]
        if twice:
            # PyYAML would keep the last one silently.
            raise yaml.constructor.ConstructorError(
                None, None, f"{twice[-1].value} is given twice", twice[-1].start_mark
            )
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """YAML in which the text 1e-6 is quoted, as it must be for :class:`_Loader`."""


_BOOL, _INT, _FLOAT = (f"tag:yaml.org,2002:{name}" for name in ("bool", "int", "float"))
_DIGITS = list("-+.0123456789")
# YAML 1.1, PyYAML's version, reads a number with an exponent and no point as text; YAML 1.2 does not.
_EXPONENT_FORM = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")
# Octal in one of the two versions, or text, or a number with a zero too many.
_LEADING_ZERO = re.compile(r"[-+]?0(o[0-7]+|[0-9_]+)$")
_PLAIN_NUMBER = re.compile(r"[-+]?((0|[1-9]\d*)(\.\d*)?|\.\d+)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(_FLOAT, _EXPONENT_FORM, _DIGITS)
    _class.add_implicit_resolver(_INT, _LEADING_ZERO, _DIGITS)
# Not of the dumper: other programs read what it writes, and "off" in quotes is text for all of them.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in forms if tag != _BOOL]
    for first, forms in _Loader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


def yaml_text(values: Mapping[str, Any]) -> str:
    """Sections of plain values as YAML."""
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    return text


def parsed_sections(source: str | os.PathLike[str]) -> Mapping[str, Any]:
    """The sections in a YAML file, or in YAML text: a string with a line break, or a colon and a space.

    Raises:
        ConfigError: The file is missing or is not text, or what it holds is not YAML or no sections.
    """
    text, origin = _text_and_origin(source)
    values = _load(text, "", origin)
    if not isinstance(values, Mapping | None):
        raise ConfigError("config", origin, "write sections and their settings, such as training: {lr: 2e-6}")
    return values or {}


def _text_and_origin(source: str | os.PathLike[str]) -> tuple[str, str]:
    if isinstance(source, str) and ("\n" in source or ": " in source):
        return source, "the text"
    try:
        return Path(source).expanduser().read_text(encoding="utf-8"), os.fspath(source)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError("config", os.fspath(source), f"cannot read this file: {reason}") from error


def parsed_override(override: str) -> tuple[str, Any]:
    """``section.name=value``, or ``algorithm=NAME``, as the setting and its value.

    Raises:
        ConfigError: It is written otherwise, or its value is not YAML or would be cut at a comment.
    """
    field, equals, text = override.partition("=")
    if not equals or not text.strip() or not re.fullmatch(r"\w+\.\w+|algorithm", field):
        remedy = "write section.name=value, such as training.lr=2e-6 (null for none)"
        raise ConfigError(field or "override", override, remedy)
    if (comment := _comment(text)) is not None:
        raise ConfigError(
            field, text, f"YAML takes {comment!r} for a comment; put text with a # in {_quoted(override)}"
        )
    return field, _load(text, field, text)


def _comment(text: str) -> str | None:
    """The first comment of a YAML text, which would be cut off without a word; ``None`` where it has none."""
    try:
        tokens = list(yaml.scan(text, Loader=_Loader))
    except yaml.YAMLError:
        return None  # What is wrong is told where it is parsed.
    # Between tokens lie spaces, line breaks and comments, and nothing else.
    between = (text[one.end_mark.index : next_one.start_mark.index] for one, next_one in itertools.pairwise(tokens))
    return next((gap.strip() for gap in between if "#" in gap), None)


def _quoted(override: str) -> str:
    """How to write an override whose text has a #, for a shell; a list or mapping cannot be quoted as a whole."""
    field, _, text = override.partition("=")
    if text.lstrip().startswith(("[", "{", "'", '"')):
        return "quotes of its own"
    return f"quotes of its own: {shlex.quote(f'{field}={json.dumps(text, ensure_ascii=False)}')}"


def _load(text: str, field: str, shown: str) -> Any:
    """Parse a text; ``field`` is the setting whose value it is, empty where it holds sections."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        ambiguous = next(_ambiguous_numbers(node, field), None)
        value = None if node is None or ambiguous else loader.construct_document(node)
    except (yaml.YAMLError, ValueError) as error:
        # ValueError: a date that does not exist.
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        raise ConfigError(field or "config", shown, f"not valid YAML: {where}{problem or error}") from error
    finally:
        loader.dispose()
    if ambiguous:
        remedy = (
            "YAML readers disagree about this number; write plain decimal digits (no leading zero, underscore, colon, "
            "0x, 0o or 0b), or put text in quotes"
        )
        raise ConfigError(*ambiguous, remedy)
    return value


def _ambiguous_numbers(node: yaml.Node | None, path: str) -> Iterator[tuple[str, str]]:
    """Yield the numbers of a document that are not written plainly, each with the path to it."""
    found: list[tuple[str, yaml.Node | None]] = [(path, node)]
    seen: set[int] = set()  # An alias may lie in what it names.
    while found:
        path, node = found.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            found += [(f"{path}.{key.value}".lstrip("."), value) for key, value in node.value]
            found += [(path, key) for key, _ in node.value]
        elif isinstance(node, yaml.SequenceNode):
            found += [(f"{path}[{index}]", item) for index, item in enumerate(node.value)]
        elif node.tag in (_INT, _FLOAT) and not _PLAIN_NUMBER.fullmatch(node.value):
            yield path, node.value
