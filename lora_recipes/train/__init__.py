"""Training: `launch` is what `run.py` calls in every process that `accelerate launch` starts."""

import os
import traceback
from pathlib import Path

from lora_recipes import console, process
from lora_recipes.errors import EXIT_BUG, EXIT_DONE, LoraRecipesError
from lora_recipes.recipe import Recipe, load_recipe
from lora_recipes.run_dir import RunDir, read_json, write_json


def launch(recipe_path: str, overrides: list[str], *, resume: bool = False, debug: bool = False) -> int:
    """Train a recipe and return the exit code, which is also in status.json, since launchers turn every failure into 1."""
    process.prepare()
    recipe: Recipe | None = None
    try:
        recipe = load_recipe(recipe_path, overrides)
        from lora_recipes.train.session import train  # imports torch: only for a recipe that can be run

        train(recipe, resume=resume)
        return EXIT_DONE
    except LoraRecipesError as error:
        if debug:
            traceback.print_exc()
        console.error(str(error))
        _record_failure(recipe, error.exit_code, str(error))
        return error.exit_code
    except Exception as error:
        _record_failure(recipe, EXIT_BUG, repr(error))
        raise


def _record_failure(recipe: Recipe | None, exit_code: int, reason: str) -> None:
    """Only in a run folder that this run has opened: a refused start leaves what is there as it was."""
    if recipe is None or os.environ.get("RANK", "0") != "0":
        return
    status: Path = RunDir.of(recipe.name).status
    if read_json(status).get("state") == "running":
        write_json(status, read_json(status) | {"state": "failed", "exit_code": exit_code, "reason": reason})
