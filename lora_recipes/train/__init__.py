"""Training: `main` runs in every process that `accelerate launch` starts."""

import argparse
import os
import traceback
from pathlib import Path

from lora_recipes import process
from lora_recipes.errors import EXIT_BUG, EXIT_DONE, LoraRecipesError
from lora_recipes.recipe import Recipe, load_recipe
from lora_recipes.run_dir import RunDir, read_json, write_json

# Where the exit code goes for a caller behind a launcher, which turns every failure into 1.
EXIT_CODE_FILE = "LORA_RECIPES_EXIT_CODE_FILE"


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line of `run.py`, train, and return the exit code."""
    parser = argparse.ArgumentParser(prog="run.py", description="Train a recipe.", allow_abbrev=False)
    parser.add_argument("recipe", help="a file in recipes/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that win over the file's")
    parser.add_argument("--resume", action="store_true", help="go on from the last complete checkpoint")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_intermixed_args(arguments)
    exit_code = launch(args.recipe, args.overrides, resume=args.resume, debug=args.debug)
    if EXIT_CODE_FILE in os.environ and _main_process():
        Path(os.environ[EXIT_CODE_FILE]).write_text(str(exit_code), encoding="utf-8")
    return exit_code


def launch(recipe_path: str, overrides: list[str], *, resume: bool = False, debug: bool = False) -> int:
    """Train a recipe and return the exit code; a failure of a run that had begun is in status.json too."""
    process.prepare()
    from lora_recipes import console

    recipe: Recipe | None = None
    try:
        recipe = load_recipe(recipe_path, overrides)
        # Imports in the order of their cost: a machine that lacks something is told before TRL is imported (6 s).
        from lora_recipes.train.preflight import preflight

        ready = preflight(recipe, resume=resume)
        if ready is None:
            return EXIT_DONE
        from lora_recipes.train.session import train

        train(recipe, ready, resume=resume)
        return EXIT_DONE
    except LoraRecipesError as error:
        if debug:
            traceback.print_exc()
        if _main_process():
            console.error(str(error))
        _record_failure(recipe, error.exit_code, str(error))
        return error.exit_code
    except Exception as error:
        _record_failure(recipe, EXIT_BUG, repr(error))
        raise


def _main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _record_failure(recipe: Recipe | None, exit_code: int, reason: str) -> None:
    """Only in a run folder that this run has opened: a refused start leaves what is there as it was."""
    if recipe is None or not _main_process():
        return
    status = RunDir.of(recipe.name).status
    if read_json(status).get("state") == "running":
        write_json(status, read_json(status) | {"state": "failed", "exit_code": exit_code, "reason": reason})
