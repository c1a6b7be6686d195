"""Which files of a model's folder or repository are loaded: beside them often lie the same weights in another form."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from lora_recipes.errors import MachineError, RefusedError
from lora_recipes.model.source import Source
from lora_recipes.model.weights import require_own_files, require_weights, titles, weight_map
from lora_recipes.recipe import Recipe


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


def require_safe_weights(recipe: Recipe, source: Source) -> str:
    """Look at the weights before they are loaded, wherever they are. Returns "safetensors" or "bin".

    Raises:
        RefusedError: pickles that `--allow-pickle` does not let in, torn files, links and names that lead elsewhere.
        MachineError: as `model_folder`.
    """
    variant = recipe.get("model.variant")
    folder = model_folder(recipe, source)
    kind = require_weights(folder, variant, allow_pickle=recipe.allow_pickle)
    if source.kind != "hub":
        return kind
    require_own_files(folder)
    if any((folder / title).is_file() for title in titles(variant)):
        return kind
    if not recipe.allow_pickle:
        where = recipe.where("model.pretrained_model_name_or_path")
        raise RefusedError(
            f"{where}: {source.named} has no {titles(variant)[0]}: its weights are pickles, which can run code when they are "
            "loaded. Name a repository with safetensors; --allow-pickle loads them as they are"
        )
    return require_weights(model_folder(recipe, source, "bin"), variant, allow_pickle=True)


def weight_files(recipe: Recipe, source: Source) -> list[Path]:
    """The files that from_pretrained loads, by name; [] for a folder without weights.

    Raises:
        MachineError: as `model_folder`.
    """
    for kind in ("safetensors", "bin") if recipe.allow_pickle else ("safetensors",):
        folder = model_folder(recipe, source, kind)
        single, index = (folder / title for title in titles(recipe.get("model.variant"), kind))
        if single.is_file():
            return [single]
        if index.is_file():
            return [folder / name for name in sorted(set(weight_map(index).values()))]
    return []
