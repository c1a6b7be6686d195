"""Holds a resolved recipe against the schema and the cross-field rules, and says everything that is wrong at once."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator, validators

from lora_recipes.errors import EXIT_REFUSED
from lora_recipes.recipe.nodes import Node
from lora_recipes.recipe.problem import Problem
from lora_recipes.recipe.refused import REFUSED, RENAMED
from lora_recipes.recipe.rules import rule_problems
from lora_recipes.recipe.vocabulary import OWNERS
from lora_recipes.redact import find_secret

SECRET_NAME = re.compile(r"(^|_)(token|secret|password|api_?key)$", re.IGNORECASE)
NO_SECRETS = ("eos_token",)  # a special token of a tokenizer

MOST = 2**63  # the libraries' own integers are smaller


def _is_integer(_: Any, value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < MOST


def _is_number(_: Any, value: Any) -> bool:
    return _is_integer(_, value) or (isinstance(value, float) and math.isfinite(value))


# `1.0` is no integer and `.nan` no number here, although JSON schema says so.
_TYPES = Draft202012Validator.TYPE_CHECKER.redefine_many({"integer": _is_integer, "number": _is_number})
_Validator = validators.extend(Draft202012Validator, type_checker=_TYPES)


@cache
def schema() -> dict[str, Any]:
    """The generated schema; read only by code that needs it, so that importing this room stays cheap."""
    return json.loads(Path(__file__).with_name("schema.json").read_text(encoding="utf-8"))


def section_keys(section: str) -> dict[str, Any]:
    """The keys that a recipe may set in `section`, each with its schema."""
    return schema()["$defs"].get(section, schema()["properties"][section])["properties"]


def problems_in(root: Node, file: str) -> list[Problem]:
    """Everything that is wrong with a resolved recipe, in the order of the file.

    Args:
        root: the tree after `extends` and overrides, without `extends`.
        file: the recipe that the user named, for problems that have no line (a section that is missing).
    """
    problems = list(_secret_problems(root))
    secret = {problem.key for problem in problems}
    for error in _Validator(schema()).iter_errors(root.plain()):
        problems += [problem for problem in _schema_problems(error, root) if problem.key not in secret]
    if not problems:
        problems = rule_problems(root, file)
    return in_place_order(problems)


def in_place_order(problems: list[Problem]) -> list[Problem]:
    """Without repeats, in the order of the files' lines."""
    return sorted(
        dict.fromkeys(problems), key=lambda problem: (problem.origin.file, problem.origin.line, problem.origin.column)
    )


def _schema_problems(error: Any, root: Node) -> list[Problem]:
    path = list(error.absolute_path)
    if error.validator == "additionalProperties":
        parent = root.find(path)
        known = error.schema.get("properties", {})
        return [_unknown_key(path, name, parent.value[name]) for name in error.instance if name not in known]
    if error.validator == "anyOf":
        # The alternative that the value's own kind belongs to knows better what is wrong with it.
        inner = [
            found
            for found in error.context
            if len(found.absolute_path) > len(path) or found.validator in _OF_THE_RIGHT_KIND
        ]
        if inner:
            return [problem for found in inner for problem in _schema_problems(found, root)]
    node = root.find(path)
    return [Problem(node.origin, _dotted(path), *_expectation(error))]


def _unknown_key(path: list[str | int], name: str, node: Node) -> Problem:
    """One message for a key that is not there: refused with the reason, renamed, in the wrong section, or misspelt."""
    key = _dotted([*path, name])
    section = str(path[0]) if path else ""
    if any(isinstance(step, str) for step in path[1:]):  # `dataset.0` is a source, as `dataset` alone is
        return Problem(node.key, key, f"is not a field of `{_dotted(path)}`")
    if not path:
        if name in RENAMED:
            return Problem(node.key, key, "is not a section", f"write {RENAMED[name]}")
        homes = [home for home in OWNERS if name in section_keys(home)]
        if homes:
            return Problem(node.key, key, "is not a section", f"it belongs to `{homes[0]}`: write {homes[0]}.{name}")
        return Problem(node.key, key, "is not a section of a recipe", _nearest(name, ["extends", *OWNERS]))
    if name in REFUSED[section]:
        return Problem(node.key, key, f"cannot be set: it {REFUSED[section][name]}")
    message = f"is not a field of {OWNERS[section]}"
    if name in RENAMED:
        return Problem(node.key, key, message, f"write {RENAMED[name]}")
    if homes := [home for home in OWNERS if name in section_keys(home)]:
        return Problem(node.key, key, message, f"it belongs to `{homes[0]}`")
    if near := get_close_matches(name, section_keys(section), n=1, cutoff=0.7):
        return Problem(node.key, key, message, f"did you mean `{near[0]}`?")
    return Problem(node.key, key, message, _nearest(name, list(section_keys(section))))


def _nearest(name: str, known: list[str]) -> str:
    near = get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(f'`{candidate}`' for candidate in near)}?"
    return f"known: {', '.join(known)}" if len(known) < 12 else ""


_LIMITS = {
    "minimum": "must be at least {}",
    "exclusiveMinimum": "must be more than {}",
    "maximum": "must be at most {}",
    "exclusiveMaximum": "must be less than {}",
}
_NOT_EMPTY = ("minLength", "minItems")
_OF_THE_RIGHT_KIND = (*_LIMITS, *_NOT_EMPTY, "additionalProperties")  # these fail only where the type is right


def _expectation(error: Any) -> tuple[str, str]:
    """(message, hint) for a value that the schema does not allow."""
    found = _found(error.instance)
    if error.validator in _LIMITS:
        return f"{_LIMITS[error.validator].format(error.validator_value)}, found {found}", ""
    if error.validator == "enum":
        choices = [_shown(choice) for choice in error.validator_value]
        near = get_close_matches(str(error.instance), [str(choice) for choice in error.validator_value], n=1)
        return (
            f"must be one of {', '.join(choices)}; found {found}",
            f"did you mean `{near[0]}`?" if near else "",
        )
    if error.validator == "type":
        return f"must be {_type_names(error.schema)}, found {found}", _type_hint(error.instance)
    if error.validator == "anyOf":
        return (
            f"must be {' or '.join(_type_names(member) for member in error.validator_value)}, found {found}",
            "",
        )
    if error.validator in _NOT_EMPTY:
        return "must not be empty", ""
    return f"is not allowed here: {error.message}", ""


def _type_names(member: dict[str, Any]) -> str:
    if "enum" in member:
        return f"one of {', '.join(_shown(choice) for choice in member['enum'])}"
    if "$ref" in member:
        return "a mapping"
    if "$ref" in member.get("items", {}):
        return "a list of mappings"
    if "pattern" in member:
        return f"text like {member['pattern']}"
    kinds = member.get("type", "any value")
    words = {
        "integer": "an integer",
        "number": "a finite number",
        "boolean": "true or false",
        "string": "text",
        "array": "a list",
        "object": "a mapping",
        "null": "null",
    }
    return " or ".join(words.get(kind, kind) for kind in ([kinds] if isinstance(kinds, str) else kinds))


def _found(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return _shown(value)
    if isinstance(value, str):
        return f"the text '{value[:60]}'"
    if isinstance(value, dict):
        return "a mapping"
    return "a list" if isinstance(value, list) else f"{value}"


def _type_hint(value: Any) -> str:
    if isinstance(value, str) and value.lower() in ("yes", "no", "on", "off"):
        return "write true or false"
    if isinstance(value, int) and abs(value) >= MOST:
        return "no setting takes so large a number"
    return ""


def _shown(value: Any) -> str:
    return (
        {True: "true", False: "false", None: "null"}.get(value, str(value))
        if value is None or isinstance(value, bool)
        else str(value)
    )


def _secret_problems(node: Node, path: tuple[str | int, ...] = ()) -> Iterator[Problem]:
    """A secret in a recipe ends up in run folders, cards and logs: refused, and its value is not repeated."""
    message = "looks like a secret, which a recipe must not hold (its value is not shown here)"
    hint = "remove it, revoke it if the file was shared, and run `hf auth login` or set HF_TOKEN"
    name = str(path[-1]) if path else ""
    named_so = SECRET_NAME.search(name) and name not in NO_SECRETS and isinstance(node.value, str)
    if named_so or find_secret(name) or (isinstance(node.value, str) and find_secret(node.value)):
        origin = node.key if node.key.line else replace(node.key, file="command line")
        if isinstance(node.value, str) and "://" in node.value:
            message, hint = "holds a password inside an address (not shown here)", "write the address without it"
        yield Problem(origin, _dotted(list(path)), message, hint, EXIT_REFUSED)
    elif isinstance(node.value, dict):
        for key, child in node.value.items():
            yield from _secret_problems(child, (*path, key))
    elif isinstance(node.value, list):
        for index, child in enumerate(node.value):
            yield from _secret_problems(child, (*path, index))


def _dotted(path: list[str | int]) -> str:
    return ".".join(str(step) for step in path)
