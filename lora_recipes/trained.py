"""Whether a run folder holds the run of this very recipe: what was trained is compared with what is asked now."""

from typing import Any

from lora_recipes.errors import RefusedError, RunError
from lora_recipes.recipe import Recipe, load_recipe
from lora_recipes.run_dir import RunDir, read_json

# What an adapter is bound to. The other sections may change between training and the steps after it.
ADAPTER_KEYS = ("model", "quantization", "lora")
RUN_KEYS = (*ADAPTER_KEYS, "dataset", "training")


def require_same_adapter(recipe: Recipe, run_dir: RunDir) -> None:
    """Raises RefusedError when the adapter was trained on another base, or with another `lora` section.

    An adapter fits every model of the same shape, without any error: only the record of the run can tell.
    """
    changed = _changed(recipe, run_dir, ADAPTER_KEYS)
    if changed:
        raise RefusedError(
            f"{run_dir.adapter} was trained by another recipe:\n{changed}\nuse the recipe it was trained with"
        )


def require_same_run(recipe: Recipe, run_dir: RunDir, data: dict[str, str]) -> None:
    """Raises RunError, with the differences, when going on would mix two runs.

    Args:
        data: sha256 of each local data file now.
    """
    changed = _changed(recipe, run_dir, RUN_KEYS)
    before = read_json(run_dir.manifest).get("data", data)
    said = {None: "is new"}
    files = [
        f"  {file}: the file {said.get(before.get(file), 'has changed' if file in data else 'is gone')}"
        for file in sorted(before.keys() | data.keys())
        if before.get(file) != data.get(file)
    ]
    found = "\n".join([*([changed] if changed else []), *files])
    if found:
        raise RunError(
            f"{run_dir.root} was begun with other settings:\n{found}\nput them back to resume, or train under another name "
            f"(lora-recipes new {recipe.path} NAME)"
        )


def require_same_tokens(recipe: Recipe, run_dir: RunDir, tokens: dict[str, str]) -> None:
    """Raises RunError when rows became other tokens than those the run was begun with.

    Args:
        tokens: split → hash of its content, template, tokenizer and settings, now.
    """
    before = read_json(run_dir.manifest).get("tokens", tokens)
    changed = [name for name in sorted(before.keys() | tokens.keys()) if before.get(name) != tokens.get(name)]
    if changed:
        raise RunError(
            f"{run_dir.root} was begun with other tokens in {', '.join(changed)}: data, chat template, tokenizer or the "
            f"code that reads them have changed; put them back to resume, or train under another name "
            f"(lora-recipes new {recipe.path} NAME)"
        )


def require_same_heldout(recipe: Recipe, run_dir: RunDir, tokens: dict[str, str], seed: int) -> None:
    """Raises RunError when a held-out share is drawn anew: rows would be scored that were trained on."""
    manifest = read_json(run_dir.manifest)
    before = (manifest.get("tokens", tokens), manifest.get("seed", seed))
    shares = [key for key, keys in recipe.datasets() if isinstance(keys.get("eval_split"), float)]
    if shares and before != (tokens, seed):
        raise RunError(
            f"{recipe.where(f'{shares[0]}.eval_split')}: `eval_split` is a share, and data, template or training.seed are not "
            f"those of the training ({run_dir.manifest}), so rows that were trained on would be asked; put them back, or "
            "hold out a split by name"
        )


def _changed(recipe: Recipe, run_dir: RunDir, sections: tuple[str, ...]) -> str:
    """One line a key that differs from the run's own recipe.yaml; "" when none does, or nothing was recorded."""
    if not run_dir.recipe.is_file():
        return ""
    old = _flat({name: load_recipe(run_dir.recipe).section(name) for name in sections})
    new = _flat({name: recipe.section(name) for name in sections})
    for values in (old, new):
        _join_batch(values)
    absent = "unset"
    return "\n".join(
        f"  {key}: {old.get(key, absent)} then, {new.get(key, absent)} now ({recipe.where(key)})"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, absent) != new.get(key, absent)
    )


def _join_batch(values: dict[str, Any]) -> None:
    """Rows of a step are what was asked for; how they are cut into micro-batches follows the memory (`--fit`)."""
    keys = ("training.per_device_train_batch_size", "training.gradient_accumulation_steps")
    if any(key in values for key in keys):
        device, accumulation = (values.pop(key, default) for key, default in zip(keys, (8, 1), strict=True))
        values[" x ".join(keys)] = device * accumulation


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, list) and all(isinstance(item, dict) for item in value):
            value = {str(index): item for index, item in enumerate(value)} or value
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
