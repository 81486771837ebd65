"""Reading YAML, and the one line that says what is wrong with params.yaml."""

from __future__ import annotations

import re
import reprlib
from typing import Any

import yaml
from pydantic import (
    ValidationError,
)

from flatmin.common.errors import InputError


class InconsistentError(ValueError):
    """What a section's fields, each good in itself, are together: the key is relative to the section's."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


def refuse_duplicate_keys(document: yaml.Node | None, where: str) -> None:
    """A key that is there twice is an error, which YAML says and PyYAML does not."""
    pending: list[tuple[str, yaml.Node | None]] = [("", document)]
    seen: set[int] = set()
    while pending:
        prefix, node = pending.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            pending += [(f"{prefix}{index}.", item) for index, item in enumerate(node.value)]
        elif isinstance(node, yaml.MappingNode):
            keys: set[str] = set()
            for key, value in node.value:
                name = str(key.value)
                if name in keys:
                    line = key.start_mark.line + 1
                    raise InputError(f"{where}: {prefix}{_one_line(name)}: expected once, received twice (line {line})")
                keys.add(name)
                pending.append((f"{prefix}{_one_line(name)}.", value))


def explain_yaml(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
    return " ".join(f"{error.context or ''} {error.problem or ''}".split()) + place


def explain(findings: ValidationError, values: Any) -> str:
    """The first finding, as 'key: expected ..., received ...'."""
    finding = findings.errors(include_url=False)[0]
    kind, context = finding["type"], finding.get("ctx", {})
    key = _key(finding["loc"], values, kind == "missing")
    received = _shorten(finding["input"])
    match kind:
        case "missing":
            return f"{key}: expected a value, found none"
        case "union_tag_not_found":
            return f"{key}.name: expected a value, found none"
        case "union_tag_invalid":
            name = _shorten(finding["input"]["name"])
            return f"{key}.name: expected {context['expected_tags'].replace(', ', ' or ')}, received {name}"
        case "value_error":
            error = context["error"]
            if isinstance(error, InconsistentError):
                key = f"{key}.{error.key}" if finding["loc"] else error.key
            return f"{key}: expected {error}" + ("" if "received" in str(error) else f", received {received}")
        case "extra_forbidden":
            expected = "no such key"
        case "invalid_key":
            expected = "a key that is text"
        case "model_type" | "model_attributes_type" | "dict_type":
            expected = "a mapping"
        case "too_short":
            expected = f"a list of at least {context['min_length']}"
        case "string_too_short":
            expected = "text that isn't empty"
        case "string_unicode":
            expected = "text"
        case _:
            expected = re.sub(r"^.*?should be ", "", finding["msg"])
            expected = expected[:1].lower() + expected[1:]
    return f"{key}: expected {expected}, received {received}"


def _key(location: tuple[int | str, ...], values: Any, missing: bool) -> str:
    """`('finetune', 'schedule', 'plateau', 'factor')` without the parts that name a branch of a union.

    Those are the parts that lead nowhere in `values`, as does the last part where a value is missing.
    """
    names = []
    for index, part in enumerate(location):
        children = dict(enumerate(values)) if isinstance(values, list) else values if isinstance(values, dict) else {}
        found = [child for child in children if child == part or str(child) == part]
        if found:
            values = children[found[0]]
        if found or (missing and index == len(location) - 1):
            names.append(_one_line(str(part)))
    return ".".join(names) or "the file"


def _one_line(key: str) -> str:
    return key if key.isprintable() and len(key) <= 60 else _shorten(key)


def _shorten(value: Any) -> str:
    """At most 60 characters, however large, deep or odd the value."""
    try:
        text = _repr.repr(value)
    except ValueError:  # an integer of thousands of digits
        text = f"a very large {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 60
