"""`new`: a recipe for another model or data set as a sparse child that extends its source."""

import os
from pathlib import Path

from lora_recipes.errors import RunError
from lora_recipes.recipe.load import load_recipe, name_problems, overrides_tree
from lora_recipes.recipe.nodes import dump_block, dump_inline
from lora_recipes.recipe.problem import InvalidRecipe, Origin, Problem


def new_recipe(source: Path, name: str, overrides: list[str]) -> Path:
    """Write `NAME.yaml` beside `source`, holding `extends` and the overrides, and return its path.

    Raises:
        InvalidRecipe: the source or the overrides are wrong; nothing is written.
        RunError: the file exists; it is left as it is.
    """
    wanted = load_recipe(source, overrides).plain()
    target = source.parent / (name if name.endswith((".yaml", ".yml")) else f"{name}.yaml")
    problems = name_problems(target)
    if Path(name).name != name:
        problems = [
            Problem(Origin("command line"), name, "must be a bare name", f"the file is written beside {source}")
        ]
    if problems:
        raise InvalidRecipe(problems)
    for existing in (target.with_suffix(".yaml"), target.with_suffix(".yml")):
        if os.path.lexists(existing):  # both would write into the run folder of the same name
            raise RunError(f"{existing} exists and is left as it is; choose another name")
    text = _child_text(source, target, overrides)
    with target.open("x", encoding="utf-8") as stream:  # "x": never over an existing file
        stream.write(text)
    if load_recipe(target).plain() != wanted:  # a key was dropped and set again: a child can only add to its parent
        target.unlink()
        message, hint = "drop a mapping and set keys in it", "set the keys only, or edit the new recipe by hand"
        raise InvalidRecipe([Problem(Origin("command line"), " ".join(overrides), message, hint)])
    return target


def _child_text(source: Path, target: Path, overrides: list[str]) -> str:
    lines = [
        f"# {target.stem}: what differs from {source.name}; `lora-recipes show {target}` prints the whole.",
        f"#   accelerate launch run.py {target}",
        f"#   make generate merge RECIPE={target}",
        f"extends: {dump_inline(os.path.relpath(source, target.parent))}",
    ]
    if overrides:
        lines += ["", dump_block(overrides_tree(source, overrides).plain())]
    else:
        lines += ["", "# model:", "#   pretrained_model_name_or_path: OWNER/NAME"]
    return "\n".join(lines) + "\n"
