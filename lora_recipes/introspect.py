"""Reads fields, types and choices of the pinned libraries and writes them to `recipe/schema.json` (`make schema`)."""

import argparse
import dataclasses
import enum
import inspect
import json
import re
import sys
import types
import typing
from pathlib import Path
from typing import Any

from lora_recipes.recipe.refused import REFUSED
from lora_recipes.recipe.vocabulary import (
    BOUNDS,
    HUB_KEYWORDS,
    MODEL_KEYWORDS,
    OWN_KEYS,
    OWNERS,
    SAVE_KEYWORDS,
    TYPES,
)

SCHEMA_FILE = Path(__file__).parent / "recipe" / "schema.json"

_JSON_TYPES: dict[Any, str] = {
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    dict: "object",
    list: "array",
}
_JSON_TYPES[type(None)] = "null"


def build_schema() -> dict[str, Any]:
    """The JSON schema (2020-12) of a recipe file. Every section's keys are its owner's fields plus our own."""
    import datasets
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig, GenerationConfig
    from trl import SFTConfig

    owned = {
        "model": MODEL_KEYWORDS,
        "quantization": signature_properties(BitsAndBytesConfig.__init__, docstring_properties(BitsAndBytesConfig)),
        "lora": dataclass_properties(LoraConfig),
        "dataset": signature_properties(datasets.load_dataset, docstring_properties(datasets.load_dataset)),
        "training": dataclass_properties(SFTConfig),
        "generation": generation_properties(GenerationConfig),
        "checks": {},
        "merge": SAVE_KEYWORDS,
        "export": {},
        "hub": HUB_KEYWORDS,
    }
    sections = {name: _section(name, properties) for name, properties in owned.items()}
    source = sections["dataset"] | {"type": "object"}
    sections["dataset"] = {
        "description": f"{source['description']} A list of mappings is a mixture of sources.",
        "anyOf": [
            {"$ref": "#/$defs/dataset"},
            {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/dataset"}},
            {"type": "null"},
        ],
    }
    extends = {
        "type": "string",
        "description": "The parent recipe, relative to this file. Mappings merge; lists and scalars replace; `null` drops a section.",
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "lora-recipes recipe",
        "description": "Written by `make schema` from the installed libraries; do not edit.",
        "type": "object",
        "additionalProperties": False,
        "properties": {"extends": extends, **sections},
        "$defs": {"dataset": source},
    }


def _section(name: str, properties: dict[str, dict[str, Any]]) -> dict[str, Any]:
    kept = {key: dict(value) for key, value in properties.items() if key not in REFUSED[name]}
    for key, looser in TYPES.get(name, {}).items():
        kept[key] = {k: v for k, v in kept[key].items() if k == "description"} | looser
    for key, bounds in BOUNDS.get(name, {}).items():
        kept[key].update(bounds)
    for key, value in OWN_KEYS.get(name, {}).items():
        assert key not in kept, f"{name}.{key} is now a field of {OWNERS[name]}"
        kept[key] = {**value, "x-own": True}
    return {
        "type": ["object", "null"],
        "description": f"The fields of {OWNERS[name]}.",
        "additionalProperties": False,
        "properties": dict(sorted(kept.items())),
    }


def dataclass_properties(cls: type) -> dict[str, dict[str, Any]]:
    """A property for each init field of a dataclass: type from its annotation, choices and help from its metadata."""
    hints = typing.get_type_hints(cls)
    documented = docstring_properties(cls)
    properties = {}
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        schema = type_schema(hints[field.name])
        if choices := field.metadata.get("choices"):
            schema = {"enum": list(choices)}
        description = field.metadata.get("help") or documented.get(field.name, {}).get("description", "")
        properties[field.name] = schema | _description(description)
    return properties


def signature_properties(function: Any, documented: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """A property for each named parameter; an annotation wins over the docstring."""
    properties = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if name == "self" or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        schema = dict(documented.get(name, {}))
        if parameter.annotation is not parameter.empty:
            schema = type_schema(parameter.annotation) | {k: v for k, v in schema.items() if k == "description"}
        elif parameter.default is not None and isinstance(schema.get("type"), list):
            schema["type"] = next(kind for kind in schema["type"] if kind != "null")
        properties[name] = schema
    return properties


def generation_properties(cls: type) -> dict[str, dict[str, Any]]:
    """GenerationConfig has no annotations: names come from an instance, types from the docstring."""
    documented = docstring_properties(cls)
    names = [name for name in vars(cls()) if not name.startswith("_")]
    return {name: documented[name] for name in names if documented.get(name, {}).keys() & {"type", "enum"}}


def type_schema(annotation: Any) -> dict[str, Any]:
    """The JSON schema of a type annotation. Enum and Literal become choices, dataclasses become objects."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return {}
    if origin in (typing.Union, types.UnionType):
        return _union([type_schema(argument) for argument in arguments])
    if origin is typing.Literal:
        return {"enum": list(arguments)}
    if origin in (list, tuple) or _is_sequence(origin):
        return {"type": "array"} if not arguments else {"type": "array", "items": type_schema(arguments[0])}
    if origin is dict or _is_mapping(origin):
        values = type_schema(arguments[1]) if len(arguments) == 2 else {}
        return {"type": "object"} | ({"additionalProperties": values} if values else {})
    if inspect.isclass(annotation) and issubclass(annotation, enum.Enum):
        return {"enum": [member.value for member in annotation]}
    if dataclasses.is_dataclass(annotation):
        properties = {
            name: _without_description(schema)
            for name, schema in dataclass_properties(typing.cast(type, annotation)).items()
        }
        return {"type": "object", "additionalProperties": False, "properties": properties}
    return {"type": _JSON_TYPES[annotation]} if annotation in _JSON_TYPES else {"type": "string"}


def _is_sequence(origin: Any) -> bool:
    return inspect.isclass(origin) and issubclass(origin, typing.Sequence)


def _is_mapping(origin: Any) -> bool:
    return inspect.isclass(origin) and issubclass(origin, typing.Mapping)


def _union(members: list[dict[str, Any]]) -> dict[str, Any]:
    """One schema for several. Text beside choices or beside a mapping is the command-line spelling of them: dropped."""
    if any("enum" in member or member.get("type") == "object" for member in members):
        members = [member for member in members if member != {"type": "string"}]
    unique = [member for index, member in enumerate(members) if member not in members[:index]]
    unique.sort(key=lambda member: json.dumps(member))  # typing's cache may hand out either order of a union
    if len(unique) == 1:
        return unique[0]
    if all("enum" in member or member == {"type": "null"} for member in unique):
        return {"enum": [choice for member in unique for choice in member.get("enum", [None])]}
    if all(set(member) == {"type"} for member in unique):
        return {"type": [member["type"] for member in unique]}
    nullable = [member for member in unique if member != {"type": "null"}]
    if len(nullable) == 1 and "type" in nullable[0]:
        return nullable[0] | {"type": [nullable[0]["type"], "null"]}
    return {"anyOf": unique}


_DOCUMENTED = re.compile(r"^ {0,8}(?:-\s+\*\*)?(\w+)(?:\*\*)?\s+\((.+?)\)(?:\s+--|:)\s*(.*)$")
_DOC_TYPES = {
    "int": "integer",
    "float": "number",
    "bool": "boolean",
    "str": "string",
    "list": "array",
    "tuple": "array",
    "dict": "object",
}


def docstring_properties(documented: Any) -> dict[str, dict[str, Any]]:
    """Types and first sentences out of a Hugging Face docstring: lines such as "name (`int`, *optional*): text"."""
    properties: dict[str, dict[str, Any]] = {}
    lines = (inspect.getdoc(documented) or "").splitlines()
    for index, line in enumerate(lines):
        match = _DOCUMENTED.match(line)
        if not match:
            continue
        name, kind, text = match.groups()
        following = [text]
        for more in lines[index + 1 :]:
            if not more.strip() or _DOCUMENTED.match(more):
                break
            following.append(more.strip())
        properties[name] = _documented_type(kind) | _description(" ".join(following))
    return properties


def _documented_type(kind: str) -> dict[str, Any]:
    """ "`int` or `list[int]`, *optional*" → {"type": ["integer", "array", "null"]}. Types of other libraries: {}."""
    kind = kind.split(", defaults to")[0]
    names = re.findall(
        r"\w+", re.sub(r"(?i)\b(list|dict|tuple)\[[^`]*", r"\1", kind).replace("torch.dtype", "str").lower()
    )
    json_types = [_DOC_TYPES[name] for name in names if name in _DOC_TYPES]
    if not json_types:
        return {}
    if "optional" in kind:
        json_types.append("null")
    unique = list(dict.fromkeys(json_types))
    return {"type": unique[0] if len(unique) == 1 else unique}


def _description(text: str) -> dict[str, str]:
    """The first sentence, on one line, without reST or Markdown links and HTML."""
    text = re.sub(r"<[^>]+>", "", " ".join(text.split()))
    text = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", text).replace("[`~", "`").replace("`]", "`")
    sentence = re.split(r"(?<=[a-z`)])\. ", text)[0].strip().rstrip(".")
    return {"description": sentence + "."} if sentence else {}


def _without_description(schema: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in schema.items() if key != "description"}


def render_schema() -> str:
    """The text of `schema.json`, stable for the pinned libraries."""
    return json.dumps(build_schema(), indent=1, ensure_ascii=False) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--check", action="store_true", help="exit 1 when schema.json is stale, write nothing")
    args = parser.parse_args()
    text = render_schema()
    if args.check:
        return int(SCHEMA_FILE.read_text(encoding="utf-8") != text)
    SCHEMA_FILE.write_text(text, encoding="utf-8")
    sys.stderr.write(f"wrote {SCHEMA_FILE} ({len(text):,} bytes)\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
