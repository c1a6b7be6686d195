"""`new`: a recipe for another model or data set as a sparse child that extends its source."""

import os
from pathlib import Path
from typing import Any

from lora_recipes.errors import RunError
from lora_recipes.recipe.load import load_recipe
from lora_recipes.recipe.nodes import parse_override
from lora_recipes.recipe.problem import InvalidRecipe, Origin, Problem


def new_recipe(source: Path, name: str, overrides: list[str]) -> Path:
    """Write `NAME.yaml` beside `source`, holding `extends` and the overrides, and return its path.

    Raises:
        InvalidRecipe: the source or the overrides are wrong; nothing is written.
        RunError: the file exists; it is left as it is.
    """
    load_recipe(source, overrides)
    target = source.parent / (name if name.endswith((".yaml", ".yml")) else f"{name}.yaml")
    if Path(name).name != name:
        message, hint = "must be a bare name", f"the file is written beside {source}"
        raise InvalidRecipe([Problem(Origin("command line"), name, message, hint)])
    text = _child_text(source, target, overrides)
    try:
        with target.open("x", encoding="utf-8") as stream:  # "x": never over an existing file
            stream.write(text)
    except FileExistsError:
        raise RunError(f"{target} exists and is left as it is; choose another name") from None
    try:
        load_recipe(target)
    except InvalidRecipe:
        target.unlink()
        raise
    return target


def _child_text(source: Path, target: Path, overrides: list[str]) -> str:
    import yaml

    sections: dict[str, Any] = {}
    for override in overrides:
        key, _, text = override.partition("=")
        *path, last = key.split(".")
        place = sections
        for step in path:
            place = place.setdefault(step, {})
        place[last] = parse_override(text, "command line").plain()
    lines = [
        f"# {target.stem}: what differs from {source.name}; `lora-recipes show {target}` prints the whole.",
        f"#   accelerate launch run.py {target}",
        f"#   make generate merge RECIPE={target}",
        f"extends: {os.path.relpath(source, target.parent)}",
    ]
    if sections:
        lines += ["", yaml.safe_dump(sections, sort_keys=False, allow_unicode=True).rstrip()]
    else:
        lines += ["", "# model:", "#   pretrained_model_name_or_path: OWNER/NAME"]
    return "\n".join(lines) + "\n"
