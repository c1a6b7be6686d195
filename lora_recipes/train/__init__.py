"""Training: `main` runs in every process that `accelerate launch` starts."""

import argparse
import os
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from lora_recipes import process
from lora_recipes.errors import EXIT_BUG, EXIT_DONE, LoraRecipesError, RunError, machine_fault
from lora_recipes.model.quantizer import leave_out_unless_needed
from lora_recipes.recipe import Recipe, load_recipe
from lora_recipes.run_dir import RunDir, read_json, write_json

if TYPE_CHECKING:
    from lora_recipes.train.preflight import Ready

# Where exit code and message go for a caller behind a launcher, which turns every failure into 1.
OUTCOME_FILE = "LORA_RECIPES_OUTCOME_FILE"


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line of `run.py`, train, and return the exit code.

    Args:
        arguments: None takes those of the process, which then is for this run alone.
    """
    parser = argparse.ArgumentParser(prog="run.py", description="Train a recipe.", allow_abbrev=False)
    parser.add_argument("recipe", help="a file in recipes/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that win over the file's")
    parser.add_argument("--resume", action="store_true", help="go on from the last complete checkpoint")
    parser.add_argument(
        "--fit",
        action="store_true",
        help="when memory runs out, go on with smaller micro-batches and the same rows a step",
    )
    parser.add_argument(
        "--allow-pickle", action="store_true", help="load a base that is no safetensors: pickles can run code"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_intermixed_args(arguments)
    return launch(
        args.recipe,
        args.overrides,
        resume=args.resume,
        fit=args.fit,
        debug=args.debug,
        allow_pickle=args.allow_pickle,
        alone=arguments is None,
    )


def launch(
    recipe_path: str,
    overrides: list[str],
    *,
    resume: bool = False,
    fit: bool = False,
    debug: bool = False,
    allow_pickle: bool = False,
    alone: bool = False,
) -> int:
    """Train a recipe and return the exit code; a failure of a run that had begun is in status.json too.

    Args:
        fit: when memory runs out, try again with smaller micro-batches and the same rows a step.
        alone: this process does nothing else, so libraries that this recipe has no use for stay out of it.
    """
    process.prepare()
    from lora_recipes import console

    recipe, ready = None, None
    try:
        recipe = load_recipe(recipe_path, overrides, allow_pickle=allow_pickle)
        if fit:
            require_one_process()
        if alone:
            leave_out_unless_needed(recipe)
        # Imports in the order of their cost: bad rows are told before torch is imported, and a machine that lacks
        # something before TRL is (6 s).
        if os.environ.get("LOCAL_RANK", "0") == "0":
            from lora_recipes.data.check import check_data

            check_data(recipe)
        with process.importing(alone=alone):
            from lora_recipes.train.preflight import preflight

        ready = preflight(recipe, resume=resume)
        if ready is None:
            return _ended(EXIT_DONE, "")
        with process.importing(alone=alone):
            from lora_recipes.train.session import train

        if fit:
            from lora_recipes.train.memory import fitted

            fitted(recipe, ready, resume, overrides, train)
        else:
            train(recipe, ready, resume)
        return _ended(EXIT_DONE, "")
    except (LoraRecipesError, MemoryError, OSError, RuntimeError) as error:
        known = error if isinstance(error, LoraRecipesError) else machine_fault(error)
        if known is None:
            _record_failure(recipe, ready, EXIT_BUG, repr(error))
            raise
        if debug:
            traceback.print_exc()
        rank = os.environ.get("RANK", "0")
        if rank == "0" or (ready is not None and ready.opened):
            console.error(str(known) if rank == "0" else f"[rank {rank}] {known}")
        _record_failure(recipe, ready, known.exit_code, str(known))
        return _ended(known.exit_code, str(known))
    except BaseException as error:  # a bug, or Ctrl-C: the status must not say "running" for ever
        _record_failure(recipe, ready, EXIT_BUG, repr(error))
        raise
    finally:
        if ready is not None and ready.lock is not None:
            ready.lock.release()


def require_one_process() -> None:
    """Raises RunError where `--fit` cannot work: a rank that ran out of memory has left the others waiting."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RunError("--fit works in one process only; with several set training.per_device_train_batch_size by hand")


def _ended(exit_code: int, message: str) -> int:
    """Tell a caller behind the launcher how it ended."""
    if OUTCOME_FILE in os.environ and os.environ.get("RANK", "0") == "0":
        write_json(Path(os.environ[OUTCOME_FILE]), {"exit_code": exit_code, "message": message})
    return exit_code


def _record_failure(recipe: Recipe | None, ready: "Ready | None", exit_code: int, reason: str) -> None:
    """Only for a run that this process has begun: a refused start leaves what is there as it was."""
    if recipe is not None and ready is not None and ready.opened:
        status = RunDir.of(recipe.name).status
        write_json(status, read_json(status) | {"state": "failed", "exit_code": exit_code, "reason": reason})
