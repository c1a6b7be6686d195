"""A finished run trained once more, from what its folder says, and held against it: every loss, every tensor, to the bit."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lora_recipes import console
from lora_recipes.errors import EXIT_DONE, RunError
from lora_recipes.model.folder import require_intact
from lora_recipes.model.identity import base_of
from lora_recipes.model.machine import choose
from lora_recipes.model.source import locate, materialise
from lora_recipes.recipe import Recipe, load_recipe
from lora_recipes.run_dir import RunDir, read_json, read_jsonl, write_json, write_text
from lora_recipes.train import launched
from lora_recipes.train.changes import differences
from lora_recipes.train.preflight import data_hashes

ACCEPTABLE = ("versions.", "dtype", "world_size")  # what another machine may be; anything else is another run
CLOSE = 0.02  # of a loss, where the run is repeated on something else than it was trained on
NAMED = 5  # tensors that a message names


def reproduce(
    folder: Path, *, fresh: bool = False, accepted: Collection[str] = (), config_file: str | None = None
) -> dict[str, Any]:
    """Train the run in `folder` again as `outputs/NAME-reproduced`, and compare. The run itself is only read.

    A repetition that was cut off goes on by the same command.

    Args:
        fresh: train it again although it was repeated before.
        accepted: names of what may be another: `versions.LIBRARY`, `dtype`, `world_size`. Losses are then held within CLOSE.
        config_file: an accelerate config, where the run was trained by several processes.

    Returns:
        {"passed", "to_the_bit", "steps", "first_difference", "tensors", "different_tensors", "largest_difference",
        "accepted", "run", "again"}

    Raises:
        RunError: the folder holds no finished run, or one that was changed on the way; or what is here now differs. Or the
            repetition did not end, with the exit code that it ended with.
        RefusedError: what the run published is no longer what it was.
    """
    old = RunDir(folder)
    _require_repeatable(old)
    recipe = load_recipe(_written_again(old))
    found = _require_same(recipe, old, accepted, config_file)
    outcome = launched(recipe, [], ["--fresh"] if fresh else [], config_file)
    if outcome["exit_code"] != EXIT_DONE:
        error = RunError(f"the repetition did not end: {outcome['message']}")
        error.exit_code = outcome["exit_code"]
        raise error
    new = RunDir.of(recipe.name)
    report = {"run": str(old.root), "again": str(new.root), "accepted": found} | _compared(old, new, exact=not found)
    write_json(new.root / "reproduction.json", report)
    _tell(report)
    return report


def _require_repeatable(run: RunDir) -> None:
    status, manifest = read_json(run.status), read_json(run.manifest)
    if not manifest or not run.recipe.is_file():
        raise RunError(
            f"{run.root}: no run folder (it has no manifest.json with recipe.yaml); give one such as outputs/NAME"
        )
    if status.get("state") != "complete":
        raise RunError(
            f"{run.root}: the run is {status.get('state', 'not started')}; only a complete one can be repeated"
        )
    changed = manifest.get("accepted_changes") or []
    if changed or status.get("fitted"):
        lines = changed or [f"--fit: {status['fitted']}"]
        raise RunError(
            f"{run.root}: settings were changed on the way, so no single run repeats it:\n"
            + "\n".join(f"  {line}" for line in lines)
        )
    require_intact(_published(run))


def _published(run: RunDir) -> Path:
    """What training left: an adapter, or the whole model."""
    return run.adapter if run.adapter.is_dir() else run.merged


def _written_again(run: RunDir) -> Path:
    """The resolved recipe as a file whose name gives the repetition a folder of its own."""
    path = run.root.parent / f"{run.root.name}-reproduced.yaml"
    told = f"# Written by `lora-recipes reproduce {run.root}`: the recipe of that run, with all that it extends.\n"
    write_text(path, told + run.recipe.read_text(encoding="utf-8"))
    return path


def _require_same(recipe: Recipe, run: RunDir, accepted: Collection[str], config_file: str | None) -> dict[str, str]:
    """What differs and was accepted: name → line."""
    manifest = read_json(run.manifest)
    found = differences(recipe, run, data_hashes(recipe), choose(recipe).named(), _ranks(config_file))
    before = manifest.get("base", {}).get("weights_sha256")
    now = base_of(recipe, materialise(locate(recipe))).weights_sha256
    if before and before != now:
        found["base"] = f"base: other weights (sha256 {before[:12]} then, {now[:12]} now)"
    refused = {name: line for name, line in found.items() if name not in accepted or not name.startswith(ACCEPTABLE)}
    if refused:
        acceptable = [name for name in refused if name.startswith(ACCEPTABLE)]
        ways = (
            [f"--accept-changes {','.join(acceptable)} compares all the same, within {CLOSE:.0%}"] if acceptable else []
        )
        ways += ["a run of several processes takes --config_file"] if "world_size" in refused else []
        lines = "\n".join(f"  {line}" for line in refused.values())
        raise RunError(
            f"{run.root} was trained with something else:\n{lines}\nput it back; {'; '.join(ways)}".rstrip("; ")
        )
    return found


def _ranks(config_file: str | None) -> int:
    """Processes that a launch with this config starts."""
    if config_file is None:
        return 1
    from accelerate.commands.config.config_args import load_config_from_file

    return int(load_config_from_file(config_file).num_processes)


def _compared(old: RunDir, new: RunDir, *, exact: bool) -> dict[str, Any]:
    losses = {
        name: {line["step"]: line for line in read_jsonl(run.metrics) if "loss" in line}
        for name, run in (("old", old), ("new", new))
    }
    steps = sorted(losses["old"].keys() | losses["new"].keys())
    values = [(step, *(losses[name].get(step, {}).get("loss") for name in ("old", "new"))) for step in steps]
    other = [{"step": step, "loss": [one, two]} for step, one, two in values if one != two]
    different, largest, count = _different_tensors(_published(old), _published(new))
    close = all(one is not None and two is not None and abs(one - two) <= CLOSE * abs(one) for _, one, two in values)
    to_the_bit = not other and not different and bool(steps)
    return {
        "passed": to_the_bit or (not exact and close),
        "to_the_bit": to_the_bit,
        "steps": len(steps),
        "first_difference": other[0] if other else None,
        "tensors": count,
        "different_tensors": different,
        "largest_difference": largest,
    }


def _different_tensors(old: Path, new: Path) -> tuple[list[str], float, int]:
    """(names of tensors that are not the same to the bit, their largest difference, tensors in all)."""
    kept = [
        {name: file for file in sorted(folder.glob("*.safetensors")) for name in _names(file)} for folder in (old, new)
    ]
    different, largest = [], 0.0
    for name in sorted(kept[0].keys() | kept[1].keys()):
        if name not in kept[0] or name not in kept[1]:
            different.append(name)
            largest = float("inf")
            continue
        one, two = (_tensor(files[name], name) for files in kept)
        if one.shape != two.shape or one.dtype != two.dtype:
            different.append(name)
            largest = float("inf")
        elif not torch.equal(one, two):
            different.append(name)
            largest = max(largest, (one.double() - two.double()).abs().max().item())
    return different, largest, len(kept[0].keys() | kept[1].keys())


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())


def _tensor(file: Path, name: str) -> torch.Tensor:
    with safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor(name)


def _tell(report: dict[str, Any]) -> None:
    if report["to_the_bit"]:
        told = f"Reproduced to the bit: {report['steps']} losses and {report['tensors']} tensors are the same."
        console.say(told, "bold")
        return
    first, different = report["first_difference"], report["different_tensors"]
    lines = [f"{len(different)} of {report['tensors']} tensors differ, by up to {report['largest_difference']:.3g}"]
    lines += [f"such as {', '.join(different[:NAMED])}"] if different else []
    lines += (
        [f"the losses part at step {first['step']}: {first['loss'][0]} then, {first['loss'][1]} now"] if first else []
    )
    if report["passed"]:
        console.say(f"Reproduced within {CLOSE:.0%}, not to the bit: {'; '.join(lines)}.", "bold")
    else:
        console.say(f"NOT reproduced: {'; '.join(lines)}.", "red")
        if torch.cuda.is_available():
            console.say(
                "On a GPU some kernels add in no fixed order: training.full_determinism=true trains to the bit."
            )
