"""What can be refused before anything heavy is imported, downloaded or loaded: run folder, machine, model source."""

import os
from dataclasses import dataclass

from lora_recipes import console
from lora_recipes.data.content import file_hash
from lora_recipes.data.files import local_files, sources
from lora_recipes.errors import RunError
from lora_recipes.model.machine import Choices, choose
from lora_recipes.model.source import Source, locate
from lora_recipes.recipe import Recipe
from lora_recipes.run_dir import Locked, RunDir
from lora_recipes.trained import require_same_run


@dataclass
class Ready:
    """What this machine makes of the recipe, where its model is, and the lock on the run folder (main process only).

    `opened` turns true when the run has begun: from then on a failure is written to its status.json.
    """

    choices: Choices
    source: Source
    lock: Locked | None
    opened: bool = False


def preflight(recipe: Recipe, *, resume: bool) -> Ready | None:
    """Check that a run can begin; None when it has already ended and nothing is left to do.

    Raises:
        RunError: the run folder is in use, or was begun with other settings.
        MachineError: no GPU, no weights, a folder that cannot be written to.
    """
    run_dir = RunDir.of(recipe.name)
    if resume:
        require_same_run(recipe, run_dir, data_hashes(recipe))
    if _already_complete(run_dir, recipe, resume):
        return None
    choices = choose(recipe)
    source = locate(recipe)
    run_dir.require_writable()
    lock = None
    if os.environ.get("RANK", "0") == "0":
        lock = Locked(run_dir.lock)
        lock.acquire(wait=False)
    return Ready(choices, source, lock)


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


def _already_complete(run_dir: RunDir, recipe: Recipe, resume: bool) -> bool:
    """A finished run trains no more steps; a run folder in use is never overwritten."""
    published = run_dir.adapter if recipe.get("lora") else run_dir.merged  # full fine-tuning leaves a whole model
    if published.is_dir():
        if resume:
            console.say(f"{run_dir.root} is complete: 0 steps to train. Next: lora-recipes generate {recipe.path}")
            return True
        raise RunError(
            f"{published} exists: this recipe is trained. Nothing was changed. To train again, copy the recipe "
            f"(lora-recipes new {recipe.path} NAME) or move {run_dir.root} away"
        )
    if run_dir.checkpoints.is_dir() and any(run_dir.checkpoints.iterdir()) and not resume:
        raise RunError(
            f"{run_dir.checkpoints} holds an unfinished run; add --resume to go on, or move {run_dir.root} away"
        )
    return False
