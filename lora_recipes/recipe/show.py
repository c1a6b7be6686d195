"""`show`: the resolved recipe as YAML, with the file and line that set each value."""

from typing import Any

import yaml

from lora_recipes.recipe.load import Recipe


def render(recipe: Recipe) -> str:
    """YAML that loads to the same recipe; behind each value stands what set it."""
    lines: list[tuple[str, str]] = []
    for section, keys in recipe.plain().items():
        lines.append((f"{section}:", ""))
        lines += _entries(keys, section, 1, recipe)
    width = min(max((len(text) for text, origin in lines if origin), default=0), 72)
    return "\n".join(f"{text:<{width}}  # {origin}" if origin else text for text, origin in lines)


def _entries(values: dict[str, Any], key: str, depth: int, recipe: Recipe) -> list[tuple[str, str]]:
    lines = []
    for name, value in values.items():
        path, indent = f"{key}.{name}", "  " * depth
        if isinstance(value, dict) and value:
            lines.append((f"{indent}{name}:", ""))
            lines += _entries(value, path, depth + 1, recipe)
        else:
            text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
            text = text.removesuffix("...\n").strip()  # PyYAML ends a bare scalar with a document mark
            lines.append((f"{indent}{name}: {text}", recipe.where(path)))
    return lines
