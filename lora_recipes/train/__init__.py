"""Training: `main` runs in every process that `accelerate launch` starts."""

import argparse
import os
import traceback
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_recipes import process
from lora_recipes.errors import (
    EXIT_BUG,
    EXIT_DONE,
    EXIT_MACHINE,
    EXIT_PREEMPTED,
    LoraRecipesError,
    Preempted,
    RankLost,
    RunError,
    machine_fault,
)
from lora_recipes.model.quantizer import leave_out_unless_needed
from lora_recipes.recipe import Recipe, load_recipe
from lora_recipes.run_dir import RunDir, read_json, write_json
from lora_recipes.train.preemption import Stop, end_with_launcher

if TYPE_CHECKING:
    from lora_recipes.train.preflight import Ready


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line of `run.py`, train, and return the exit code.

    Args:
        arguments: None takes those of the process, which then is for this run alone.
    """
    parser = argparse.ArgumentParser(prog="run.py", description="Train a recipe.", allow_abbrev=False)
    parser.add_argument("recipe", help="a file in recipes/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that win over the file's")
    parser.add_argument("--resume", action="store_true", help="what a launch does by itself; scripts may say it")
    parser.add_argument("--fresh", action="store_true", help="start over; what is in the run folder is moved aside")
    parser.add_argument(
        "--accept-changes",
        type=names,
        default=(),
        metavar="A,B",
        help="go on although these are not as when the run was begun",
    )
    parser.add_argument("--repeats", type=Path, metavar="FOLDER", help="hold it against that run first (`reproduce`)")
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
    if arguments is None:
        end_with_launcher()
    return launch(
        args.recipe,
        args.overrides,
        fresh=args.fresh,
        accepted=args.accept_changes,
        repeats=args.repeats,
        fit=args.fit,
        debug=args.debug,
        allow_pickle=args.allow_pickle,
        alone=arguments is None,
    )


def names(text: str) -> tuple[str, ...]:
    """The words of a comma-separated list."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def launch(
    recipe_path: str,
    overrides: list[str],
    *,
    fresh: bool = False,
    accepted: tuple[str, ...] = (),
    repeats: Path | None = None,
    fit: bool = False,
    debug: bool = False,
    allow_pickle: bool = False,
    alone: bool = False,
) -> int:
    """Train a recipe and return the exit code; a failure of a run that had begun is in status.json too.

    Goes on where the run was cut off, if it was.

    Args:
        fresh: start over; what is in the run folder is moved aside.
        accepted: names of what may be another than when the run was begun.
        repeats: the folder of a run that this one repeats; it is held against it before it trains.
        fit: when memory runs out, try again with smaller micro-batches and the same rows a step.
        alone: this process does nothing else, so libraries that this recipe has no use for stay out of it.
    """
    process.prepare()
    stop, begun = Stop(), _Begun()
    with stop.listening(alone=alone):
        try:
            begun.recipe = recipe = load_recipe(recipe_path, overrides, allow_pickle=allow_pickle)
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

            begun.ready = ready = preflight(recipe, fresh=fresh, accepted=accepted, repeats=repeats)
            if ready is None:
                return _ended(EXIT_DONE, "")
            ready.stop, begun.before = stop, _written_at(recipe)
            if ready.lock is not None:
                stop.abandoned = partial(_record_end, recipe, EXIT_PREEMPTED)
            with process.importing(alone=alone):
                from lora_recipes.train.session import train

            if fit:
                from lora_recipes.train.memory import fitted

                fitted(recipe, ready, overrides, train)
            else:
                train(recipe, ready)
            return _ended(EXIT_DONE, "")
        except Preempted as stopped:
            return _preempted(begun, stopped)
        except (LoraRecipesError, MemoryError, OSError, RuntimeError) as error:
            return _failed(begun, error, debug=debug)
        except BaseException as error:  # a bug: the status must not say "running" for ever
            _record_failure(begun, EXIT_BUG, repr(error))
            raise
        finally:
            if begun.ready is not None and begun.ready.lock is not None:
                begun.ready.lock.release()


@dataclass
class _Begun:
    """How far this launch has come.

    Attributes:
        before: when status.json was written last before it.
    """

    recipe: Recipe | None = None
    ready: "Ready | None" = None
    before: int = 0

    @property
    def opened(self) -> bool:
        """Whether a run was begun, or went on."""
        return self.ready is not None and self.ready.opened

    @property
    def met(self) -> bool:
        """Whether all ranks have come together and loading has begun, so the main process was not refused."""
        return self.ready is not None and self.ready.met

    def told_since(self) -> dict[str, Any]:
        """What status.json says, where another process has written it since this launch."""
        if self.recipe is None or self.ready is None or _written_at(self.recipe) == self.before:
            return {}
        return read_json(RunDir.of(self.recipe.name).status)


def _failed(begun: _Begun, error: Exception, *, debug: bool) -> int:
    """Say why, once, and in status.json. What another rank wrote down before it ended is the cause, not that it is gone."""
    from lora_recipes import console

    known = error if isinstance(error, LoraRecipesError) else None
    # Before the first step a rank that is stopped just ends, which the others see as a lost connection.
    if known is None and not begun.opened and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        told = begun.told_since()
        if told.get("state") == "preempted":
            return _preempted(_Begun(), Preempted(told["reason"]))
        if told.get("state") == "failed":
            return _ended(told["exit_code"], told["reason"], left_alone=True)
    known = known or machine_fault(error) or _rank_lost(error)
    if isinstance(known, RankLost) and begun.opened:
        told = begun.told_since()
        if told.get("state") in ("failed", "preempted"):
            return _ended(told["exit_code"], told["reason"], left_alone=True)
    if known is None:
        _record_failure(begun, EXIT_BUG, repr(error))
        raise error
    if debug:
        traceback.print_exc()
    rank = os.environ.get("RANK", "0")
    # Perhaps this rank alone lacks something: memory on its card, the model on its machine.
    own = begun.met and not begun.opened and known.exit_code == EXIT_MACHINE and not isinstance(known, RankLost)
    alone = rank != "0" and own
    if rank == "0" or begun.opened or alone:
        console.error(str(known) if rank == "0" else f"[rank {rank}] {known}")
    _record_failure(begun, known.exit_code, str(known))
    if alone and begun.recipe is not None:  # the main process will only hear that it must end
        _record_end(begun.recipe, known.exit_code, f"[rank {rank}] {known}")
    return _ended(known.exit_code, str(known), left_alone=isinstance(known, RankLost))


def require_one_process() -> None:
    """Raises RunError where `--fit` cannot work: a rank that ran out of memory has left the others waiting."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RunError("--fit works in one process only; with several set training.per_device_train_batch_size by hand")


def _ended(exit_code: int, message: str, *, left_alone: bool = False) -> int:
    """Tell a caller behind the launcher how it ended.

    Args:
        left_alone: the rank that does so otherwise may be the one that is gone.
    """
    if process.OUTCOME_FILE in os.environ and (left_alone or os.environ.get("RANK", "0") == "0"):
        write_json(Path(os.environ[process.OUTCOME_FILE]), {"exit_code": exit_code, "message": message})
    return exit_code


def _preempted(begun: _Begun, stopped: Preempted) -> int:
    """Say that the run was stopped. Before the first step each rank writes it down, since it may be the only one to know;
    unless the main process may still refuse, for instance because another run has the folder."""
    from lora_recipes import console

    main = os.environ.get("RANK", "0") == "0"
    told = begun.told_since() if main and not begun.opened else {}
    if told.get("state") == "failed":  # by another rank, and the launcher ended this one
        return _ended(told["exit_code"], told["reason"])
    if main:
        console.say(str(stopped), "yellow")
    if begun.recipe is not None and begun.ready is not None and (main or (begun.met and not begun.opened)):
        _record_end(begun.recipe, EXIT_PREEMPTED, str(stopped))
    return _ended(EXIT_PREEMPTED, str(stopped))


def _rank_lost(error: BaseException) -> RankLost | None:
    """What an error says of the other processes of this run."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    from lora_recipes.train.ranks import lost_contact

    return lost_contact(error)


def _written_at(recipe: Recipe) -> int:
    status = RunDir.of(recipe.name).status
    return status.stat().st_mtime_ns if status.is_file() else 0


def _record_failure(begun: _Begun, exit_code: int, reason: str) -> None:
    """Only for a run that this process has begun: a refused start leaves what is there as it was."""
    if begun.recipe is not None and begun.opened:
        _record_end(begun.recipe, exit_code, reason)


def _record_end(recipe: Recipe, exit_code: int, reason: str) -> None:
    status = RunDir.of(recipe.name).status
    state = "preempted" if exit_code == EXIT_PREEMPTED else "failed"
    write_json(status, read_json(status) | {"state": state, "exit_code": exit_code, "reason": reason})
