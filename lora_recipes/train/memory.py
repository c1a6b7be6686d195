"""Memory that ran out: said with the batch that failed and the plan's numbers, or answered with smaller micro-batches."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from lora_recipes import console
from lora_recipes.console import gib
from lora_recipes.errors import LoraRecipesError, MachineError, out_of_memory
from lora_recipes.model.machine import choose, release_memory
from lora_recipes.plan import Estimate, config_of, half_the_rows, target_for, ways_out
from lora_recipes.recipe import Recipe, load_recipe
from lora_recipes.recipe.defaults import DEVICE_BATCH
from lora_recipes.run_dir import RunDir
from lora_recipes.train.checkpoints import numbered
from lora_recipes.train.preflight import Ready
from lora_recipes.train.record import write_status

SUGGESTED = 3  # settings that a message names

Training = Callable[[Recipe, Ready], None]


class BatchTooLarge(MachineError):
    """Memory ran out within a batch."""


def fitted(recipe: Recipe, ready: Ready, overrides: Sequence[str], train: Training) -> None:
    """Train; each time memory runs out, again with smaller micro-batches and the same rows a step.

    Goes on from the newest whole checkpoint, or from the beginning where there is none.

    Raises:
        MachineError: not even a micro-batch of one row fits.
    """
    words = list(overrides)
    while True:
        try:
            return train(recipe, ready)
        except (RuntimeError, MemoryError, MachineError) as error:
            if not _ran_out(error):
                raise
            smaller = smaller_batch(recipe)
            if smaller is None:
                raise
            said = _first_line(error)
        _let_go()
        device, accumulation = smaller
        settings = {
            "training.per_device_train_batch_size": device,
            "training.gradient_accumulation_steps": accumulation,
        }
        words += [f"{key}={value}" for key, value in settings.items()]
        recipe = load_recipe(recipe.path, words, allow_pickle=recipe.allow_pickle)
        run_dir = RunDir.of(recipe.name)
        console.say(
            f"{said}\n--fit: {device} rows at a time x {accumulation} accumulation, {device * accumulation} rows a step as "
            f"before; {'from the last checkpoint' if numbered(run_dir.checkpoints) else 'from the beginning'}.",
            "yellow",
        )
        write_status(run_dir, fitted=settings)
        ready = replace(ready, choices=choose(recipe))


def smaller_batch(recipe: Recipe) -> tuple[int, int] | None:
    """(rows at a time, accumulation) of at most half the micro-batch and exactly the same rows a step; None at one row."""
    rows = recipe.get("training.per_device_train_batch_size", DEVICE_BATCH)
    return half_the_rows(rows, recipe.get("training.gradient_accumulation_steps", 1))


def explained(error: BaseException, recipe: Recipe, shape: tuple[int, ...] | None, step: int) -> BatchTooLarge:
    """One message about memory that ran out: the batch, what the plan says, what to change.

    Args:
        shape: (rows, tokens) of the batch that failed, where it is known.
    """
    where = (
        f"in step {step + 1}, on a batch of {shape[0]} row{'s' * (shape[0] > 1)} x {shape[1]} tokens"
        if shape
        else "before the first step"
    )
    lines = [f"out of memory {where}: {_first_line(error)}"]
    fewer_rows_help = smaller_batch(recipe) is not None
    try:
        estimate = Estimate(recipe, config_of(recipe), target_for(recipe))
        lines += _planned(estimate, shape)
        fewer_rows_help = fewer_rows_help and not estimate.cuts  # pieces are as large with half the rows
    except LoraRecipesError as unplanned:
        lines.append(f"It cannot be planned: {unplanned}")
    if fewer_rows_help:
        lines.append("Or launch again with --fit, which halves the micro-batch and goes on from the last checkpoint.")
    return BatchTooLarge("\n".join(lines))


def _planned(estimate: Estimate, shape: tuple[int, ...] | None) -> Iterator[str]:
    rows, length = shape or (estimate.rows, estimate.length)
    step = estimate.step()
    flat = step.flat if rows == 1 else 0  # several rows that came as such are no piece
    memory = estimate.memory(replace(step, rows=rows, length=length, flat=flat))
    named = ", ".join(f"{name.replace('_', ' ')} {gib(size)}" for name, size in memory.parts.items() if size)
    yield f"Planned for this batch: {gib(memory.expected)} GiB, up to {gib(memory.high)} ({named})."
    found = ways_out(estimate)[:SUGGESTED]
    if found:
        ways = (
            f"{console.settings(way.settings)} ({gib(way.memory.expected)} GiB for the longest rows; costs {way.costs})"
            for way in found
        )
        yield f"What helps, cheapest first: {'; '.join(ways)}."


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _ran_out(error: BaseException) -> bool:
    return isinstance(error, BatchTooLarge) or out_of_memory(error)


def _let_go() -> None:
    """The failed attempt's model and tensors go before the next one begins."""
    if library := sys.modules.get("bitsandbytes"):  # not imported, or None: see `model.quantizer`
        # It keeps the states of every paged optimizer that there was. Their pages the driver moves out when others need the
        # place; bitsandbytes has no call that frees them.
        library.functional.GlobalPageManager.get_instance().paged_tensors.clear()
    release_memory()
