"""`show`: the resolved recipe as YAML, with the file and line that set each value."""

from typing import Any

from lora_recipes.recipe.load import Recipe
from lora_recipes.recipe.nodes import dump_inline


def render(recipe: Recipe) -> str:
    """YAML that loads to the same recipe; behind each value stands what set it."""
    lines = _entries(recipe.plain(), "", 0, recipe)
    width = min(max((len(text) for text, origin in lines if origin), default=0), 72)
    return "\n".join(f"{text:<{width}}  # {origin}" if origin else text for text, origin in lines)


def _entries(values: dict[str, Any], key: str, depth: int, recipe: Recipe) -> list[tuple[str, str]]:
    lines = []
    for name, value in values.items():
        path, start = f"{key}.{name}".removeprefix("."), f"{'  ' * depth}{dump_inline(name)}:"
        if isinstance(value, dict) and value:
            lines.append((start, ""))
            lines += _entries(value, path, depth + 1, recipe)
        elif isinstance(value, list) and value and all(isinstance(item, dict) and item for item in value):
            lines.append((start, ""))
            for index, item in enumerate(value):
                (first, origin), *more = _entries(item, f"{path}.{index}", depth + 2, recipe)
                lines += [(f"{'  ' * (depth + 1)}- {first.lstrip()}", origin), *more]
        else:
            origin = recipe.where(path).replace("\n", "\\n")  # an override may hold a line break
            lines.append((f"{start} {dump_inline(value)}", origin))
    return lines
