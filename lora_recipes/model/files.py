"""Which files of a model's folder or repository are loaded: beside them often lie the same weights in another form."""

import json
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from lora_recipes.errors import MachineError, RefusedError
from lora_recipes.model.source import Source
from lora_recipes.recipe import Recipe


def titles(variant: str | None, kind: str = "safetensors") -> tuple[str, str]:
    """Names of the only weight file, and of the index of several."""
    middle, stem = f".{variant}" if variant else "", "model" if kind == "safetensors" else "pytorch_model"
    return f"{stem}{middle}.{kind}", f"{stem}.{kind}.index{middle}.json"


def weight_map(index: Path) -> dict[str, str]:
    """Tensor → file, as an index says. Raises RefusedError for one that is broken."""
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise RefusedError(f"{index}: no index of weights: {error!r}") from None
    if not found or not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise RefusedError(f"{index}: no index of weights: `weight_map` names no files")
    return found


def model_folder(recipe: Recipe, source: Source, kind: str = "safetensors") -> Path:
    """The folder with the model's weights of this kind. Those of a hub model are downloaded, or found in the cache.

    Args:
        kind: safetensors or bin.

    Raises:
        MachineError: they are not in the cache, and the hub cannot be asked.
    """
    inner = Path(recipe.get("model.subfolder", ""))
    if source.kind != "hub":
        return Path(source.location) / inner
    keywords = {"revision": recipe.get("model.revision"), "cache_dir": recipe.get("model.cache_dir")}
    local = bool(recipe.get("model.local_files_only"))

    def fetched(patterns: list[str]) -> Path:
        try:
            found = snapshot_download(source.location, allow_patterns=patterns, local_files_only=local, **keywords)
        except LocalEntryNotFoundError as error:
            where = recipe.where("model.pretrained_model_name_or_path")
            message = f"{where}: {source.named} is not in the cache, and the hub is switched off or cannot be reached"
            raise MachineError(message) from error
        return Path(found) / inner

    single, index = titles(recipe.get("model.variant"), kind)
    folder = fetched([str(inner / single), str(inner / index), "*.py"])
    if not (folder / single).is_file() and (folder / index).is_file():
        fetched([str(inner / name) for name in set(weight_map(folder / index).values())])
    return folder


def commit_of(recipe: Recipe, source: Source) -> str:
    """The commit of a hub model that is in the cache: its files lie in `snapshots/COMMIT`.

    Raises:
        MachineError: as `model_folder`.
    """
    inner = Path(recipe.get("model.subfolder", ""))
    return model_folder(recipe, source).parts[-1 - len(inner.parts)]


def weight_files(recipe: Recipe, source: Source) -> list[Path]:
    """The files that from_pretrained loads, by name; [] for a folder without weights.

    Raises:
        MachineError: as `model_folder`.
    """
    for kind in ("safetensors", "bin"):
        folder = model_folder(recipe, source, kind)
        single, index = (folder / title for title in titles(recipe.get("model.variant"), kind))
        if single.is_file():
            return [single]
        if index.is_file():
            return [folder / name for name in sorted(set(weight_map(index).values()))]
    return []
