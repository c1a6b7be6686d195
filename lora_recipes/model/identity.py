"""Which base an adapter belongs to: name, revision and a hash of the weights, beside the adapter itself."""

from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from lora_recipes.errors import RefusedError
from lora_recipes.model.files import commit_of, weight_files
from lora_recipes.model.source import Source
from lora_recipes.recipe import Recipe
from lora_recipes.run_dir import read_json, remembered_sha256, write_json

PROVENANCE = "provenance.json"  # in an adapter's folder; PEFT and the engines ignore it


@dataclass(frozen=True)
class Base:
    """A model as an adapter knows it.

    Attributes:
        revision: of a hub model the commit, whatever branch or tag the recipe names.
        name: hub id, `package:NAME`, or the folder as the recipe names it; never an absolute path.
        weights_sha256: of the names and sha256 of all weight files; two models with the same hash have the same weights.
    """

    name: str
    revision: str | None
    weights_sha256: str


def base_of(recipe: Recipe, source: Source) -> Base:
    """The recipe's base, whose weights are on this machine."""
    revision = commit_of(recipe, source) if source.kind == "hub" else recipe.get("model.revision")
    return Base(portable(source.named), revision, weights_sha256(recipe, source))


def portable(named: str) -> str:
    """A file or a model as it may be called elsewhere: of an absolute path only the last part, which says nothing of this
    machine."""
    return Path(named).name if Path(named).is_absolute() else named


def weights_sha256(recipe: Recipe, source: Source) -> str:
    """Hash of the names and contents of the weight files that are loaded.

    Raises:
        MachineError: a hub model that is not in the cache, and the hub cannot be asked.
    """
    lines = [f"{remembered_sha256(file)}  {file.name}\n" for file in weight_files(recipe, source)]
    return sha256("".join(lines).encode()).hexdigest()


def write_provenance(folder: Path, base: Base, **more: Any) -> None:
    """Write down, in an adapter's folder, what it was trained on."""
    write_json(folder / PROVENANCE, {"base": asdict(base), **more})


def require_base(folder: Path, base: Base, *, force: bool) -> str | None:
    """Hold an adapter against a base.

    Returns:
        why the adapter can not be held against it, or has been forced; None where it belongs to the base.

    Raises:
        RefusedError: it was trained on other weights, and `force` is False. It would load without an error wherever the
            shapes are the same.
    """
    recorded = read_json(folder / PROVENANCE).get("base")
    if recorded is None:
        return f"{folder} has no {PROVENANCE}: nobody can tell which base it was trained on"
    if recorded["weights_sha256"] == base.weights_sha256:
        return None
    message = (
        f"{folder} was trained on {recorded['name']} (weights {recorded['weights_sha256'][:12]}), this base is {base.name} "
        f"(weights {base.weights_sha256[:12]})"
    )
    if force:
        return f"{message}; used all the same (--force)"
    raise RefusedError(f"{message}: shapes may fit, answers will not. Use the base it was trained on, or --force")
