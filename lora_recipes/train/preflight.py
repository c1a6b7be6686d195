"""What can be refused before anything heavy is imported, downloaded or loaded: run folder, machine, model source."""

from dataclasses import dataclass

from lora_recipes import console
from lora_recipes.errors import RunError
from lora_recipes.model.machine import Choices, choose
from lora_recipes.model.source import Source, locate
from lora_recipes.recipe import Recipe
from lora_recipes.run_dir import RunDir


@dataclass(frozen=True)
class Ready:
    """What this machine makes of the recipe, and where its model is."""

    choices: Choices
    source: Source


def preflight(recipe: Recipe, *, resume: bool) -> Ready | None:
    """Check that a run can begin; None when it has already ended and nothing is left to do.

    Raises:
        RunError: the run folder is in use.
        MachineError: no GPU, no weights, a folder that cannot be written to.
    """
    run_dir = RunDir.of(recipe.name)
    if _already_complete(run_dir, recipe, resume):
        return None
    choices = choose(recipe)
    source = locate(recipe)
    run_dir.require_writable()
    return Ready(choices, source)


def _already_complete(run_dir: RunDir, recipe: Recipe, resume: bool) -> bool:
    """A finished run trains no more steps; a run folder in use is never overwritten."""
    if run_dir.adapter.is_dir():
        if resume:
            console.say(f"{run_dir.root} is complete: 0 steps to train. Next: lora-recipes generate {recipe.path}")
            return True
        raise RunError(
            f"{run_dir.adapter} exists: this recipe is trained. Nothing was changed. To train again, copy the recipe "
            f"(lora-recipes new {recipe.path} NAME) or move {run_dir.root} away"
        )
    if run_dir.checkpoints.is_dir() and any(run_dir.checkpoints.iterdir()) and not resume:
        raise RunError(
            f"{run_dir.checkpoints} holds an unfinished run; add --resume to go on, or move {run_dir.root} away"
        )
    return False
