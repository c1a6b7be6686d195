"""`reproduce`: trains a run again, in a folder of its own, from what its run folder holds, and compares to the last bit."""

import os
import sys
from pathlib import Path
from typing import Any

from lora_recipes import console
from lora_recipes.errors import EXIT_DONE, EXIT_PREEMPTED, LoraRecipesError, MachineError, RefusedError, RunError
from lora_recipes.launch import environment_of, trained
from lora_recipes.metrics import computed, metrics_sha256
from lora_recipes.model.digest import differing, gap, tensor_hashes
from lora_recipes.recipe import InvalidRecipe, load_recipe
from lora_recipes.recipe.load import name_problems
from lora_recipes.run_dir import Locked, RunDir, read_json, write_json, write_text

SUFFIX = ".reproduced"
NEEDED = ("run", "recipe", "base", "chosen", "machine", "world_size", "launch", "published")  # in manifest.json
FOUND = "reproduced.json"  # in the folder of the repetition
SHOWN = 3  # names of tensors in a message
# On another machine, or with other versions, numbers are rounded otherwise: each loss may then be off by this much, and all
# weights together by this share of their length.
LOSS = {"relative": 0.01, "absolute": 0.001}
WEIGHTS = 0.05

Result = dict[str, Any]


class Stopped(RunError):
    """The repetition was stopped by a signal, and saved."""

    exit_code = EXIT_PREEMPTED


def reproduce(named: Path, *, accepted: str | None = None, fresh: bool = False, allow_pickle: bool = False) -> Result:
    """Train a run again in `outputs/<name>.reproduced`, and hold the result against it. The run itself is only read.

    What was cut off goes on by the same call; what is complete is only compared.

    Args:
        named: a run folder, or the recipe whose run it is.
        accepted: names of versions, or `machine`, that may be others; then the results are compared within a tolerance.
        fresh: an earlier repetition is moved aside.
        allow_pickle: load a base that is no safetensors.

    Returns:
        {"reproduced", "exact", "run", "repetition", "steps", "losses", "tensors", "accepted", "differs"}: "exact" is
        whether all recorded losses and all tensors are the same to the last bit; "differs" says what is another: "loss"
        (the first: "step", "name", "then", "now") and "tensors" ("count", "names", "largest", "largest_in", "relative").

    Raises:
        RunError: the run cannot be repeated, here or at all, or the repetition was stopped.
        RefusedError: what is in the run folder is not what the run left.
    """
    original = RunDir.of(named.stem) if named.suffix in (".yaml", ".yml") else RunDir(named)
    manifest = _repeatable(original)
    repetition = RunDir.of(original.root.resolve().name + SUFFIX)
    recipe = _prepared(original, repetition, manifest["run"], fresh)
    command = [sys.executable, *_launcher(manifest), str(recipe), "--repeats", str(original.root)]
    command += ["--accept-changes", accepted] if accepted else []
    command += ["--allow-pickle"] if allow_pickle else []
    console.say(f"Repeating {original.root} in {repetition.root} …")
    ended = trained(command, repetition, environment_of(manifest, original.manifest))
    if ended["exit_code"] != EXIT_DONE:
        raise _failed(ended, named)
    found = compared(original, repetition)
    write_json(repetition.root / FOUND, found)
    _show(found)
    return found


def _repeatable(original: RunDir) -> dict[str, Any]:
    """The manifest of a run that can be repeated. Raises RunError where it can not, RefusedError where it was changed."""
    manifest = read_json(original.manifest)
    if not manifest or not original.recipe.is_file():
        raise RunError(f"{original.root}: no run folder: manifest.json or recipe.yaml is missing; name one in outputs/")
    state = read_json(original.status).get("state")
    if state != "complete":
        raise RunError(f"{original.root}: only a complete run can be repeated, this one is {state or 'not started'}")
    if lacking := [name for name in NEEDED if name not in manifest]:
        raise RunError(
            f"{original.manifest}: lacks {', '.join(lacking)}, by which a repetition would be made and known: an earlier version "
            "of lora-recipes wrote it, or somebody changed it. Train the run again with --fresh, then it can be repeated"
        )
    if manifest["world_size"] > (most := max(os.cpu_count() or 1, len(list(Path("/dev").glob("nvidia[0-9]*"))))):
        raise MachineError(
            f"{original.manifest}: {manifest['world_size']} processes, and this machine has {most} cores"
        )
    reasons = list(manifest.get("accepted_changes", []))
    reasons += [f"{name}: was changed while it ran" for name in manifest.get("changed_on_the_way", [])]
    if reasons:
        lines = "\n".join(f"  {reason}" for reason in reasons)
        raise RunError(
            f"{original.root} cannot be repeated: it went on otherwise than it was begun, and no single run does that:\n"
            f"{lines}\nA run of its present recipe can be: train it with --fresh"
        )
    machines = manifest["launch"]["machines"]
    if machines > 1:
        raise RunError(
            f"{original.root} ran on {machines} machines; `reproduce` starts processes on one. Launch it by hand under another "
            "name, and compare `published` in the two manifest.json"
        )
    _require_untouched(original, manifest["published"])
    return manifest


def _require_untouched(original: RunDir, published: dict[str, Any]) -> None:
    if metrics_sha256(original) != published["metrics_sha256"]:
        raise RefusedError(f"{original.metrics}: its losses are not those that the run wrote; put the file back")
    folder = original.root / published["folder"]
    if folder.is_dir() and (changed := differing(published["tensors"], tensor_hashes(folder))):
        raise RefusedError(
            f"{folder}: {len(changed)} tensors are not what the run published ({', '.join(changed[:SHOWN])}); put them back, "
            "or move the folder away: its hashes are in manifest.json"
        )


def _prepared(original: RunDir, repetition: RunDir, run: str, fresh: bool) -> Path:
    """The recipe of the repetition, in its folder. Raises RunError where that holds something else."""
    recipe = repetition.root / f"{repetition.root.name}.yaml"
    if problems := name_problems(recipe):
        raise InvalidRecipe(problems)
    if fresh and repetition.root.exists():
        lock = Locked(repetition.lock)
        lock.acquire(wait=False)
        console.say(f"--fresh: what was in {repetition.root} is now {repetition.set_aside()}")
        lock.release()
    other = read_json(repetition.manifest)
    if other and other.get("repeats", {}).get("run") != run:
        raise RunError(f"{repetition.root} holds no repetition of this run; move it away, or say --fresh, which does")
    write_text(recipe, original.recipe.read_text(encoding="utf-8"))
    return recipe


def _launcher(manifest: dict[str, Any]) -> list[str]:
    processes = str(manifest["world_size"])
    if processes == "1":
        return ["-m", "lora_recipes.train"]
    return ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes, "-m", "lora_recipes.train"]


def _failed(ended: dict[str, Any], named: Path) -> LoraRecipesError:
    """The error that the training ended with, by its own exit code."""
    kinds = {kind.exit_code: kind for kind in (LoraRecipesError, RunError, MachineError, RefusedError, Stopped)}
    kind = kinds.get(ended["exit_code"], LoraRecipesError)
    return kind(f"{ended['message']}\nThe repetition is not complete; to go on: lora-recipes reproduce {named}")


def compared(original: RunDir, repetition: RunDir) -> Result:
    """What is another in a complete repetition, see `reproduce`."""
    then, now = read_json(original.manifest), read_json(repetition.manifest)
    lines, accepted = computed(original), now["repeats"]["accepted"] | _rounds_anew(original, then)
    loss, near = _losses(lines, computed(repetition))
    tensors = _tensors(original, repetition, then["published"], now["published"])
    if tensors is not None:
        near = near and tensors["relative"] is not None and tensors["relative"] <= WEIGHTS
    exact = loss is None and tensors is None
    return {
        "reproduced": exact or (bool(accepted) and near),
        "exact": exact,
        "run": str(original.root),
        "repetition": str(repetition.root),
        "steps": then["published"]["step"],
        "losses": sum("loss" in line for line in lines),
        "tensors": len(then["published"]["tensors"]),
        "accepted": accepted,
        "differs": {"loss": loss, "tensors": tensors},
    }


def _rounds_anew(original: RunDir, manifest: dict[str, Any]) -> dict[str, str]:
    """On a GPU no run repeats to the bit unless it was asked to: gradients of attention are summed in no fixed order."""
    if manifest["machine"].get("device") != "cuda" or load_recipe(original.recipe).get("training.full_determinism"):
        return {}
    return {"sums on a GPU": "device: cuda, without training.full_determinism"}


def _tensors(original: RunDir, repetition: RunDir, then: Result, now: Result) -> Result | None:
    others = differing(then["tensors"], now["tensors"])
    if not others:
        return None
    folder = original.root / then["folder"]
    apart = gap(folder, repetition.root / now["folder"]) if folder.is_dir() else None
    return {
        "count": len(others),
        "names": others[:SHOWN],
        "largest": apart.largest if apart else None,
        "largest_in": apart.name if apart else None,
        "relative": apart.relative if apart else None,
    }


def _losses(lines: list[Result], others: list[Result]) -> tuple[Result | None, bool]:
    """(the first figure that is another, whether all losses are near)."""
    first: Result | None = None
    near = len(lines) == len(others)
    for line, other in zip(lines, others, strict=False):
        for name in sorted(line.keys() | other.keys()):
            then, now = line.get(name), other.get(name)
            if then == now:
                continue
            first = first or {"step": line["step"], "name": name, "then": then, "now": now}
            near = near and (not name.endswith("loss") or _near(then, now))
    if first is None and len(lines) != len(others):
        longer = max(lines, others, key=len)[min(len(lines), len(others))]
        first = {"step": longer["step"], "name": "number of lines", "then": len(lines), "now": len(others)}
    return first, near


def _near(then: Any, now: Any) -> bool:
    if not isinstance(then, float) or not isinstance(now, float):
        return False
    return abs(then - now) <= LOSS["absolute"] + LOSS["relative"] * abs(then)


def _show(found: Result) -> None:
    count = f"{found['losses']} recorded losses of {found['steps']} steps, {found['tensors']} tensors"
    if found["exact"]:
        console.say(f"REPRODUCED to the bit: {count}, in {found['repetition']}", "bold green")
        return
    loss, tensors = found["differs"]["loss"], found["differs"]["tensors"]
    if loss:
        told = [f"first at step {loss['step']}: {loss['name']} was {loss['then']}, is {loss['now']}"]
    else:
        told = ["all that was recorded of the steps is equal"]
    if tensors:
        told.append(f"{tensors['count']} of {found['tensors']} tensors differ, such as {', '.join(tensors['names'])}")
        if tensors["largest"] is None:
            told.append("by how much cannot be told: the run's own are not there, or of other shapes")
        else:
            told.append(
                f"the largest difference is {tensors['largest']:.3g}, in {tensors['largest_in']}; all together "
                f"{100 * tensors['relative']:.3g} % of the weights"
            )
    said = "; ".join(told)
    if found["reproduced"]:
        console.say(f"REPRODUCED within the tolerance ({', '.join(found['accepted'])} accepted): {said}", "bold yellow")
    else:
        console.say(f"NOT REPRODUCED ({count}): {said}", "bold red")
