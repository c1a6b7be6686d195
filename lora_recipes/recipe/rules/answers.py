"""Rules of answers: how they are generated, and what is asked of them."""

import math
import re
from collections.abc import Iterator
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError
from referencing import Registry
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from lora_recipes.recipe.rules.finding import Finding, Values, sources_of

ASKED = ("contains", "equals", "regex", "json", "stops", "differs_from_base")  # what a prompt of `checks` may ask

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
LONGEST_TRAIL = 100  # schemas that lead to one another at one value


def generation(values: Values) -> Iterator[Finding]:
    generation = values.get("generation")
    if generation is None:
        return
    if not generation.get("max_new_tokens"):
        yield Finding(
            "generation.max_new_tokens",
            "is missing: an answer that never ends needs a limit",
            "write `max_new_tokens: 128`",
        )
    sampling = [key for key in SAMPLING if generation.get(key) is not None]
    if sampling and not generation.get("do_sample"):
        yield Finding(
            f"generation.{sampling[0]}",
            "has no effect without `generation.do_sample: true`",
            "set do_sample, or drop it",
        )
    if (generation.get("min_new_tokens") or 0) > (generation.get("max_new_tokens") or math.inf):
        yield Finding("generation.min_new_tokens", "is more than `generation.max_new_tokens`", "write a smaller number")


def checks(values: Values) -> Iterator[Finding]:
    """What could only fail, or could never fail, is told before anything is trained."""
    checks, generation = values.get("checks", {}), values.get("generation", {})
    held_out = any(source.get("eval_split") for _, source in sources_of(values))
    if checks.get("scores") and (not held_out or generation.get("max_rows") == 0):
        reason = "`generation.max_rows` is 0" if held_out else "no source has a `dataset.eval_split`"
        yield Finding(
            "checks.scores", f"cannot be measured: {reason}, so no row is answered", "hold rows out, or drop it"
        )
    for number, entry in enumerate(checks.get("prompts", [])):
        key = f"checks.prompts.{number}"
        if not any(entry.get(name, name == "stops") is not False for name in ASKED):
            yield Finding(key, "asks nothing of the answer", f"add one of {', '.join(ASKED)}")
        if not (entry.get("max_new_tokens") or generation.get("max_new_tokens")):
            yield Finding(
                key,
                "has no limit: an answer that never ends needs one",
                "write `max_new_tokens: 128` here, or in `generation` for all prompts",
            )
        if "regex" in entry and (why := _regex_fault(entry["regex"])):
            yield Finding(f"{key}.regex", f"is no regular expression: {why}", "see Python's `re` for the syntax")
        if isinstance(entry.get("json"), dict) and (why := _schema_fault(entry["json"])):
            yield Finding(f"{key}.json", f"is no JSON schema: {why}", "write `true` where any JSON will do")


def _regex_fault(pattern: str) -> str | None:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return str(error)
    return None


def _schema_fault(schema: dict[str, Any]) -> str | None:
    """Why a JSON schema cannot be used. What it refers to must be in itself: nothing is fetched."""
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        return f"{error.json_path}: {error.message}"
    whole = Registry().with_resource("", DRAFT202012.create_resource(schema)).resolver()
    references = sorted(set(_references(schema)))
    for reference in references:
        if fault := _reference_fault(whole, reference):
            return fault
    done: set[int] = set()
    for reference in references:
        if _leads_back(whole.lookup(reference).contents, whole, set(), done):
            return f"{reference!r} leads back to itself, for ever"
    return None


def _reference_fault(whole: Any, reference: str) -> str | None:
    try:
        Draft202012Validator.check_schema(whole.lookup(reference).contents)
    except SchemaError:  # it stands where no schema is looked for
        return f"{reference!r} is no schema"
    except (Unresolvable, ValueError, TypeError, LookupError):  # a step into a list or a text raises what it likes
        return f"{reference!r} is not in it"
    return None


def _leads_back(schema: Any, whole: Any, above: set[int], done: set[int]) -> bool:
    """Whether a schema comes to itself again at the same value. A level further down it may: that ends where the value does.

    Args:
        above: ids of the schemas that led here.
        done: of those that are known to end.
    """
    if not isinstance(schema, dict) or id(schema) in done:
        return False
    if id(schema) in above or len(above) > LONGEST_TRAIL:
        return True
    if any(_leads_back(child, whole, above | {id(schema)}, done) for child in _of_the_same_value(schema, whole)):
        return True
    done.add(id(schema))
    return False


def _of_the_same_value(schema: dict[str, Any], whole: Any) -> Iterator[Any]:
    """The schemas that a value must satisfy where it must satisfy this one, or that are asked about it."""
    for name in ("$ref", "$dynamicRef"):
        if isinstance(schema.get(name), str):
            yield whole.lookup(schema[name]).contents
    for name in ("allOf", "anyOf", "oneOf"):
        yield from schema.get(name, [])
    for name in ("not", "if", "then", "else"):
        yield schema.get(name)
    yield from schema.get("dependentSchemas", {}).values()


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from (value[name] for name in ("$ref", "$dynamicRef") if isinstance(value.get(name), str))
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    for child in children:
        yield from _references(child)
