"""What has changed since a run was begun, and what of it may: going on must never mix two runs in silence."""

import os
import re
from collections.abc import Collection
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from lora_recipes.errors import RefusedError, RunError
from lora_recipes.launch import sharding
from lora_recipes.recipe import Recipe
from lora_recipes.run_dir import RunDir, read_json
from lora_recipes.trained import RUN_KEYS, changed_keys

LIBRARIES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate", "safetensors")
# Keys of the recipe that say what is shown, kept and measured, not what is learnt.
FREE = re.compile(
    r"training\.(logging_.*|save_(steps|strategy|total_limit)|eval_.*|per_device_eval_batch_size|report_to|run_name"
    r"|project|trackio_.*|disable_tqdm|log_.*)"
)
DTYPES = {"training.bf16", "training.fp16", "training.use_cpu"}
BOUND = re.compile(r"(model|quantization|lora)\..*|launch")  # what a checkpoint fits, weights and optimizer


def library_versions() -> dict[str, str]:
    """Of the libraries whose code decides what is learnt."""
    found = {name: version(name) for name in LIBRARIES}
    if find_spec("deepspeed"):
        found["deepspeed"] = version("deepspeed")
    return found


def world_size() -> int:
    """Processes of this launch."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def require_same_recipe(recipe: Recipe, run_dir: RunDir, data: dict[str, str]) -> None:
    """Raises RunError, with the differences, when a finished run was trained by another recipe or on other data."""
    found = _of_recipe(recipe, run_dir) | of_data(read_json(run_dir.manifest), data)
    if found:
        raise RunError(
            f"{run_dir.root} is trained, with other settings:\n{_lines(found)}\nput them back, train again with --fresh (what "
            f"is there is moved aside), or under another name (lora-recipes new {recipe.path} NAME)"
        )


def require_same_run(
    recipe: Recipe, run_dir: RunDir, data: dict[str, str], chosen: dict[str, str], accepted: Collection[str] = ()
) -> dict[str, str]:
    """Hold a run that was begun against what is asked now, before anything heavy is imported.

    Args:
        data: sha256 of each local data file now.
        chosen: what this machine makes of the recipe (`Choices.named`).
        accepted: what may be another all the same, by the names in the message.

    Returns:
        What is another and was accepted: name → line.

    Raises:
        RunError: anything else differs.
    """
    manifest = read_json(run_dir.manifest)
    found = _of_recipe(recipe, run_dir) | of_data(manifest, data)
    ranks = manifest.get("world_size", world_size())
    if ranks != world_size():
        found["world_size"] = f"world_size: {ranks} processes then, {world_size()} now"
    before, now = sharding(manifest.get("launch", {}).get("environment", os.environ)), sharding(os.environ)
    if before != now:
        found["launch"] = f"launch: {before} then, {now} now"
    if not DTYPES & found.keys():  # else the recipe says so itself
        found |= _of_types(manifest.get("chosen", {}), chosen)
    return _settled(recipe, run_dir, found | of_versions(manifest), accepted)


def require_same_material(
    recipe: Recipe,
    run_dir: RunDir,
    tokens: dict[str, str],
    template: str | None,
    base: str,
    accepted: Collection[str] = (),
) -> dict[str, str]:
    """The second half of `require_same_run`: what takes the tokenizer and the base to know.

    Args:
        tokens: split → hash of its content, template, tokenizer and settings.
        template: sha256 of the chat template.
        base: sha256 of the base's weights.

    Raises:
        RefusedError: the base has other weights.
    """
    manifest = read_json(run_dir.manifest)
    before = manifest.get("base", {}).get("weights_sha256", base)
    if before != base:
        raise RefusedError(
            f"{run_dir.root} was begun on other weights of the base (sha256 {before[:12]} then, {base[:12]} now); its "
            "checkpoints fit them alone. Put them back, or start over with --fresh"
        )
    found = of_rows(manifest, tokens, template)
    if {"data", "template"} & set(accepted):
        found.pop("tokens", None)  # explained
    return _settled(recipe, run_dir, found, accepted)


def of_rows(manifest: dict[str, Any], tokens: dict[str, str], template: str | None) -> dict[str, str]:
    """What of the chat template and of the rows' tokens is not as a run's manifest has it."""
    found = {}
    if manifest.get("chat_template_sha256", template) != template:
        found["template"] = "template: the chat template has changed"
    old = manifest.get("tokens", tokens)
    changed = [name for name in sorted(old.keys() | tokens.keys()) if old.get(name) != tokens.get(name)]
    if changed:
        found["tokens"] = (
            f"tokens: other tokens in {', '.join(changed)}; data, chat template, tokenizer or the code that reads them "
            "have changed"
        )
    return found


def of_versions(manifest: dict[str, Any]) -> dict[str, str]:
    """Libraries of other versions than a run's manifest has."""
    now = library_versions()
    return {
        f"versions.{name}": f"versions.{name}: {then} then, {now[name]} now"
        for name, then in manifest.get("versions", {}).items()
        if name in now and then != now[name]
    }


def _of_recipe(recipe: Recipe, run_dir: RunDir) -> dict[str, str]:
    changed = changed_keys(recipe, run_dir, RUN_KEYS)
    return {key: line for key, line in changed.items() if not FREE.fullmatch(key)}


def _of_types(before: dict[str, str], now: dict[str, str]) -> dict[str, str]:
    """Another CPU or GPU can mean another type, and with it other numbers from the next step on."""
    lines = [
        f"{what} was {before[what]}, {now[what]} on this machine"
        for what in ("dtype", "4-bit compute dtype")
        if what in before and what in now and before[what].split()[0] != now[what].split()[0]
    ]
    return {"dtype": f"dtype: {'; '.join(lines)}"} if lines else {}


def of_data(manifest: dict[str, Any], data: dict[str, str]) -> dict[str, str]:
    """Data files that are not as a run's manifest has them.

    Args:
        data: sha256 of each local data file now.
    """
    before = manifest.get("data", data)
    said = {None: "is new"}
    lines = [
        f"data: {file}: the file {said.get(before.get(file), 'has changed' if file in data else 'is gone')}"
        for file in sorted(before.keys() | data.keys())
        if before.get(file) != data.get(file)
    ]
    return {"data": "\n  ".join(lines)} if lines else {}


def _settled(recipe: Recipe, run_dir: RunDir, found: dict[str, str], accepted: Collection[str]) -> dict[str, str]:
    refused = {
        name: line
        for name, line in found.items()
        if BOUND.fullmatch(name) or not set(name.split(" x ")) & set(accepted)
    }
    if refused:
        bound = [name for name in refused if BOUND.fullmatch(name)]
        names = ",".join(name.split(" x ")[0] for name in refused)
        raise RunError(
            f"{run_dir.root} was begun with other settings:\n{_lines(refused)}\nput them back to go on, start over with "
            f"--fresh (what is there is moved aside), or train under another name (lora-recipes new {recipe.path} NAME). "
            + (
                f"{bound[0]} can not change within a run: the checkpoints fit what it was"
                if bound
                else f"To go on all the same: --accept-changes {names}"
            )
        )
    return found


def _lines(found: dict[str, str]) -> str:
    return "\n".join(f"  {line}" for line in found.values())
