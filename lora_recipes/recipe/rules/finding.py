"""What a rule gives, and what rules look at: the plain values of a recipe."""

from typing import Any, NamedTuple

from lora_recipes.errors import EXIT_USER

Values = dict[str, Any]


class Finding(NamedTuple):
    """What is wrong with a dotted key, the way out, and the exit code it leads to."""

    key: str
    message: str
    hint: str = ""
    exit_code: int = EXIT_USER


def sources_of(values: Values) -> list[tuple[str, dict[str, Any]]]:
    """(dotted key, keys) of each source, whether `dataset` is one mapping or a list of them."""
    dataset = values.get("dataset", {})
    if isinstance(dataset, list):
        return [(f"dataset.{index}", source) for index, source in enumerate(dataset)]
    return [("dataset", dataset)]
