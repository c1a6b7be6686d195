"""Which local files a recipe's data lies in; light, since it is asked before `datasets` is imported."""

from pathlib import Path

from lora_recipes.recipe import Recipe

FILE_BUILDERS = ("json", "csv", "parquet", "text", "arrow")


def local_files(recipe: Recipe, split: str) -> list[Path]:
    """The plain local files that `dataset.data_files` names for a split; patterns and URLs are left to `datasets`.

    Empty for a hub data set or a folder, whose `data_files` are relative to it.
    """
    if recipe.get("dataset.path") not in FILE_BUILDERS:
        return []
    named = recipe.get("dataset.data_files")
    if isinstance(named, dict):
        named = named.get(split.split("[")[0])
    paths = [named] if isinstance(named, str) else list(named or [])
    folder = Path(recipe.get("dataset.data_dir") or "")
    return [folder / path for path in paths if not any(mark in path for mark in ("*", "?", "[", "://"))]
