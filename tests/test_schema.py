"""schema.json is what the installed libraries say today, and is a valid JSON schema for editors."""

import json
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from lora_recipes.introspect import SCHEMA_FILE, render_schema
from lora_recipes.recipe.check import section_keys
from lora_recipes.recipe.vocabulary import OWN_KEYS, OWNERS


def test_schema_is_not_stale():
    assert SCHEMA_FILE.read_text(encoding="utf-8") == render_schema(), "run `make schema`"


def test_schema_is_valid_and_has_every_section_with_its_owner():
    schema = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(schema)
    assert set(schema["properties"]) == {"extends", *OWNERS}
    for section, owner in OWNERS.items():
        assert owner in schema["properties"][section]["description"]


def test_most_keys_are_described_for_editors():
    keys = [key for section in OWNERS for key in section_keys(section).values()]
    described = [key for key in keys if key.get("description")]
    assert len(described) > 0.95 * len(keys)


def test_our_own_keys_are_all_described() -> None:
    for section, keys in OWN_KEYS.items():
        assert all(section_keys(section)[key]["description"].endswith(".") for key in keys)


@pytest.mark.parametrize(
    ("dataset", "good"),
    [
        ({"path": "org/data"}, True),
        ([{"path": "org/data"}, {"path": "org/more", "weight": 0.5}], True),
        (None, True),
        ([], False),
        ([None], False),
        ({"pth": "org/data"}, False),
        ([{"pth": "org/data"}], False),
    ],
)
def test_an_editor_takes_one_source_or_a_list_of_them(dataset: Any, good: bool) -> None:
    schema = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    assert Draft202012Validator(schema).is_valid({"dataset": dataset}) is good
