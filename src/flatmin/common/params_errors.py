"""Reads YAML, and words the one-line messages that say what is wrong with params.yaml."""

from __future__ import annotations

import re
import reprlib
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError

from flatmin.common.errors import InputError


class InconsistentError(ValueError):
    """Values of a section that are valid separately but not together.

    `key` names one of them, relative to the section. The message continues "expected ...".
    """

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


def read_yaml(path: Path | str) -> Any:
    """Read a YAML file with the library and the version of YAML, 1.2, with which DVC reads and writes params.yaml.

    In YAML 1.1, `NO` is false and `1:30` is 90. DVC leaves out the quotes of such names when it sets another key.

    Raises:
        InputError: The file cannot be read, is not YAML, or repeats a key.
    """
    try:
        return YAML(typ="safe", pure=True).load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: expected a file, found none") from None
    except OSError as error:
        raise InputError(f"{path}: expected a readable file, received: {error.strerror}") from None
    except DuplicateKeyError as error:
        name = re.sub(r'^found duplicate key "(.*?)" with value .*', r"\1", str(error.problem), flags=re.DOTALL)
        line = error.problem_mark.line + 1
        raise InputError(f"{path}: {_one_line(name)}: expected once, received twice (line {line})") from None
    except MarkedYAMLError as error:
        raise InputError(f"{path}: expected YAML, received {_explain_yaml(error)}") from None
    except Exception as error:  # ruamel.yaml does not catch what the constructors of integers and dates raise
        raise InputError(f"{path}: expected YAML, received {' '.join(str(error).split())}") from None


def _explain_yaml(error: MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
    return " ".join(f"{error.context or ''} {error.problem or ''}".split()) + place


def explain(findings: ValidationError, values: Any) -> str:
    """Word the first of pydantic's findings about `values` as 'key: expected ..., received ...'."""
    finding = findings.errors(include_url=False)[0]
    kind, context = finding["type"], finding.get("ctx", {})
    key = _key(finding["loc"], values, kind == "missing")
    received = shorten(finding["input"])
    match kind:
        case "missing":
            return f"{key}: expected a value, found none"
        case "union_tag_not_found":
            return f"{key}.name: expected a value, found none"
        case "union_tag_invalid":
            name = shorten(finding["input"]["name"])
            return f"{key}.name: expected {context['expected_tags'].replace(', ', ' or ')}, received {name}"
        case "value_error":
            error = context["error"]
            if isinstance(error, InconsistentError):
                key = f"{key}.{error.key}" if finding["loc"] else error.key
            return f"{key}: expected {error}" + ("" if "received" in str(error) else f", received {received}")
        case "extra_forbidden":
            expected = "no such key"
        case "invalid_key":
            expected = "a text key"
        case "model_type" | "model_attributes_type" | "dict_type":
            expected = "a mapping"
        case "list_type":
            example = f", such as [{received}]" if isinstance(finding["input"], str | int | float) else ""
            expected = f"a list{example}"
        case "too_short":
            expected = f"a list of at least {context['min_length']}"
        case "string_too_short":
            expected = "non-empty text"
        case "string_unicode":
            expected = "text"
        case "string_type":  # YAML and `dvc exp run -S` take 1e3, 2024-01-01 and null for something else
            expected = "text" if isinstance(finding["input"], list | dict) else "text in quotes"
        case _:
            expected = re.sub(r"^.*?should be ", "", finding["msg"])
            expected = expected[:1].lower() + expected[1:]
    return f"{key}: expected {expected}, received {received}"


def _key(location: tuple[int | str, ...], values: Any, missing: bool) -> str:
    """Write pydantic's location of a finding as a key, such as `finetune.schedule.factor`.

    Pydantic's location, here ('finetune', 'schedule', 'plateau', 'factor'), also names branches of unions. These are
    recognised by not being keys in `values`; nor is the last part if a value is missing.
    """
    names = []
    for index, part in enumerate(location):
        children = dict(enumerate(values)) if isinstance(values, list) else values if isinstance(values, dict) else {}
        matches = [child for child in children if child == part or str(child) == part]
        if matches:
            values = children[matches[0]]
        if matches or (missing and index == len(location) - 1):
            names.append(_one_line(str(part)))
    return ".".join(names) or "the file"


def _one_line(key: str) -> str:
    return key if key.isprintable() and len(key) <= 60 else shorten(key)


def shorten(value: Any) -> str:
    """Describe any value, however large or deeply nested, in at most 60 characters."""
    try:
        text = _repr.repr(value)
    except ValueError:  # an integer of thousands of digits
        text = f"a very large {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 60
