"""schema.json is what the installed libraries say today, and is a valid JSON schema for editors."""

import json

from jsonschema import Draft202012Validator

from lora_recipes.introspect import SCHEMA_FILE, render_schema
from lora_recipes.recipe.vocabulary import OWNERS


def test_schema_is_not_stale():
    assert SCHEMA_FILE.read_text(encoding="utf-8") == render_schema(), "run `make schema`"


def test_schema_is_valid_and_has_every_section_with_its_owner():
    schema = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(schema)
    assert set(schema["properties"]) == {"extends", *OWNERS}
    for section, owner in OWNERS.items():
        assert owner in schema["properties"][section]["description"]


def test_most_keys_are_described_for_editors():
    schema = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    keys = [key for section in OWNERS for key in schema["properties"][section]["properties"].values()]
    described = [key for key in keys if key.get("description")]
    assert len(described) > 0.95 * len(keys)
