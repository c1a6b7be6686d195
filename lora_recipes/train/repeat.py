"""What it takes to repeat a run to the bit: how it was launched is written down, and a repetition is held against it first."""

import json
import os
import platform
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lora_recipes.errors import RunError
from lora_recipes.launch import LAUNCH_VARIABLE
from lora_recipes.model.machine import Choices
from lora_recipes.recipe import Recipe
from lora_recipes.redact import SECRET_VARIABLE
from lora_recipes.run_dir import RunDir, read_json, text_sha256, write_json
from lora_recipes.train.changes import of_data, of_rows, of_versions, world_size
from lora_recipes.trained import RUN_KEYS, flat_sections

# Of a run that goes on: keys that neither its weights nor its lines in metrics.jsonl depend on.
UNHEARD = re.compile(
    r"training\.(save_(steps|strategy|total_limit)|report_to|run_name|project|trackio_.*|disable_tqdm|log_.*)"
)
CHANGED = "changed_on_the_way"  # in manifest.json
ACCEPTABLE = re.compile(r"versions\..*|machine")


@dataclass(frozen=True)
class Repeated:
    """The run that this one repeats.

    Attributes:
        run: its id.
        accepted: what is another here, and was accepted: name → line.
    """

    folder: RunDir
    run: str
    accepted: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {"run": self.run, "accepted": self.accepted}


def launch_record(choices: Choices) -> dict[str, Any]:
    """How this process was started, by names that hold no secret."""
    told = {name: value for name, value in sorted(os.environ.items()) if LAUNCH_VARIABLE.fullmatch(name)}
    processes = world_size()
    return {
        "machines": processes // int(os.environ.get("LOCAL_WORLD_SIZE", processes)),
        "threads": torch.get_num_threads() if choices.device == "cpu" else None,
        "environment": {name: value for name, value in told.items() if not SECRET_VARIABLE.search(name)},
    }


def machine_record(choices: Choices) -> dict[str, str]:
    """What of this machine decides how numbers are rounded."""
    return {
        "system": platform.system(),
        "processor": platform.machine(),
        "cpu": f"{_cpu_name()}, {torch.backends.cpu.get_cpu_capability()}",
        "device": choices.device,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def record_changed_on_the_way(recipe: Recipe, run_dir: RunDir, choices: Choices) -> None:
    """Write down what of a run that goes on is not as in its beginning, though it may be: such a run cannot be repeated."""
    manifest, absent = read_json(run_dir.manifest), object()
    old, new = flat_sections(run_dir.recipe, RUN_KEYS), flat_sections(recipe, RUN_KEYS)
    found = {key for key in old.keys() | new.keys() if old.get(key, absent) != new.get(key, absent)}
    found = {key for key in found if not UNHEARD.fullmatch(key)}
    for name, now in (("machine", machine_record(choices)), ("launch", launch_record(choices))):
        if manifest.get(name, now) != now:
            found.add(name)
    known = manifest.get(CHANGED, [])
    if found - set(known):
        write_json(run_dir.manifest, manifest | {CHANGED: sorted({*known, *found})})


def require_repeatable(
    recipe: Recipe, original: RunDir, data: dict[str, str], choices: Choices, accepted: Collection[str]
) -> Repeated:
    """Hold a repetition against the run that it repeats, before anything heavy is imported.

    Args:
        data: sha256 of each local data file now.
        accepted: `versions.LIBRARY` and `machine`, which may be others: the results are then compared within a tolerance.

    Raises:
        RunError: anything else differs, or a difference is not accepted.
    """
    manifest = read_json(original.manifest)
    resolved = text_sha256(json.dumps(recipe.plain(), sort_keys=True))
    found = {}
    if resolved != manifest["recipe"]["sha256"]:
        found["recipe"] = f"recipe: {original.recipe} is not the recipe that the run was begun with"
    found |= of_data(manifest, data) | of_versions(manifest) | _of_machine(manifest, choices)
    if manifest["world_size"] != world_size():
        found["world_size"] = f"world_size: {manifest['world_size']} processes then, {world_size()} now"
    return Repeated(original, manifest["run"], _settled(original, found, accepted))


def require_same_rows(repeated: Repeated, tokens: dict[str, str], template: str | None, base: str) -> None:
    """The second half of `require_repeatable`: what takes the tokenizer and the base to know.

    Args:
        tokens: split → hash of its content, template, tokenizer and settings.
        template: sha256 of the chat template.
        base: sha256 of the base's weights.

    Raises:
        RunError: something differs.
    """
    manifest = read_json(repeated.folder.manifest)
    found = of_rows(manifest, tokens, template)
    before = str(manifest["base"].get("weights_sha256"))
    if before != base:
        found["base"] = f"base: its weights had sha256 {before[:12]} then, {base[:12]} now"
    _settled(repeated.folder, found, ())


def _of_machine(manifest: dict[str, Any], choices: Choices) -> dict[str, str]:
    chosen, machine = manifest["chosen"], manifest["machine"]
    pairs = [(name, machine.get(name), now) for name, now in machine_record(choices).items()]
    pairs += [(what, chosen.get(what), now) for what, now in choices.named().items()]
    lines = [f"{name}: {then} then, {now} now" for name, then, now in pairs if then != now]
    return {"machine": f"machine: {'; '.join(lines)}"} if lines else {}


def _settled(original: RunDir, found: dict[str, str], accepted: Collection[str]) -> dict[str, str]:
    """The differences, all of which were accepted. Raises RunError when one was not, or can not be."""
    refused = {name: line for name, line in found.items() if name not in accepted or not ACCEPTABLE.fullmatch(name)}
    if not refused:
        return found
    if all(ACCEPTABLE.fullmatch(name) for name in refused):
        way = (
            "install those versions, or use that machine. To go on all the same, and compare within a tolerance instead of to "
            f"the bit: --accept-changes {','.join(found)}"
        )
    else:
        way = "put them back; with another recipe, data, template, base or number of processes it is another run"
    lines = "\n".join(f"  {line}" for line in refused.values())
    raise RunError(f"{original.root} cannot be repeated here, nothing was trained:\n{lines}\n{way}")
