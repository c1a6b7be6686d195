"""What can be refused before anything heavy is imported, downloaded or loaded: run folder, machine, model source."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from lora_recipes import console
from lora_recipes.data.content import file_hash
from lora_recipes.data.files import local_files, sources
from lora_recipes.model.machine import Choices, choose
from lora_recipes.model.source import Source, locate
from lora_recipes.recipe import Recipe
from lora_recipes.run_dir import Locked, RunDir
from lora_recipes.train.changes import require_same_recipe, require_same_run
from lora_recipes.train.checkpoints import numbered
from lora_recipes.train.preemption import Stop
from lora_recipes.train.repeat import Repeated, require_repeatable


@dataclass
class Ready:
    """What this machine makes of the recipe, where its model is, and the lock on the run folder (main process only).

    `opened` turns true when the run has begun: from then on a failure is written to its status.json. `met` turns true before
    weights are loaded: all ranks have come together, and what all of them would refuse is behind them.

    Attributes:
        accepted: names of what may be another than when the run was begun.
        changed: what is another, and was accepted: name → line.
        repeats: the run that this one repeats.
        stop: whether this process was asked to end.
    """

    choices: Choices
    source: Source
    lock: Locked | None
    opened: bool = False
    met: bool = False
    accepted: tuple[str, ...] = ()
    changed: dict[str, str] = field(default_factory=dict)
    repeats: Repeated | None = None
    stop: Stop = field(default_factory=Stop)


def preflight(
    recipe: Recipe, *, fresh: bool = False, accepted: tuple[str, ...] = (), repeats: Path | None = None
) -> Ready | None:
    """Check that a run can begin, or go on; None when it has already ended and nothing is left to do.

    Args:
        fresh: whatever is in the run folder is moved aside.
        accepted: names of what may be another than when the run was begun.
        repeats: the folder of a run that this one repeats.

    Raises:
        RunError: the run folder is in use, or was begun with other settings.
        MachineError: no GPU, no weights, a folder that cannot be written to.
    """
    run_dir = RunDir.of(recipe.name)
    changed: dict[str, str] = {}
    if not fresh and _already_complete(run_dir, recipe):
        return None
    choices = choose(recipe)
    repeated = None
    if repeats is not None:
        repeated = require_repeatable(recipe, RunDir(repeats), data_hashes(recipe), choices, accepted)
    if not fresh and numbered(run_dir.checkpoints):  # without any the run starts at step 0: there is nothing to mix
        changed = require_same_run(recipe, run_dir, data_hashes(recipe), choices.named(), accepted)
    source = locate(recipe)
    lock = None
    if os.environ.get("RANK", "0") == "0":
        run_dir.require_writable()
        lock = Locked(run_dir.lock)
        lock.acquire(wait=False)
        if fresh:
            lock = _moved_aside(run_dir, lock)
    elif not fresh:  # where the folder is being moved nobody else writes
        run_dir.require_writable()
    return Ready(choices, source, lock, accepted=accepted, changed=changed, repeats=repeated)


def _moved_aside(run_dir: RunDir, lock: Locked) -> Locked:
    """The lock on an empty run folder, in place of the one that was there."""
    if all(path == run_dir.lock for path in run_dir.root.iterdir()):
        return lock
    console.say(f"--fresh: what was in {run_dir.root} is now {run_dir.set_aside()}")
    new = Locked(run_dir.lock)
    new.acquire(wait=False)
    lock.release()
    return new


def data_hashes(recipe: Recipe) -> dict[str, str]:
    """sha256 of each local data file of the recipe that exists."""
    files = {
        file.path
        for source in sources(recipe)
        for split in (source.split, source.eval_split)
        if isinstance(split, str)
        for file in local_files(source, split)
    }
    return {str(file): file_hash(file) for file in sorted(files)}


def _already_complete(run_dir: RunDir, recipe: Recipe) -> bool:
    """Whether this very run has been trained to its end. Raises RunError when another has."""
    published = run_dir.adapter if recipe.get("lora") else run_dir.merged  # full fine-tuning leaves a whole model
    if not published.is_dir():
        return False
    require_same_recipe(recipe, run_dir, data_hashes(recipe))
    console.say(
        f"{run_dir.root} is complete: 0 steps to train. Next: lora-recipes generate {recipe.path}; or train again with "
        "--fresh, which moves this run aside"
    )
    return True
