"""Memory that ran out: said with the batch that failed and the plan's numbers, or answered with smaller micro-batches."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from lora_recipes import console
from lora_recipes.errors import LoraRecipesError, MachineError, out_of_memory
from lora_recipes.model.machine import choose
from lora_recipes.plan import plan
from lora_recipes.recipe import Recipe, load_recipe
from lora_recipes.run_dir import RunDir
from lora_recipes.train.preflight import Ready
from lora_recipes.train.record import write_status

GIB = 2**30
DEVICE_BATCH = 8  # TrainingArguments' own default
SUGGESTED = 3  # settings that a message names

Training = Callable[[Recipe, Ready, bool], None]


class BatchTooLarge(MachineError):
    """Memory ran out within a batch."""


def fitted(recipe: Recipe, ready: Ready, resume: bool, overrides: Sequence[str], train: Training) -> None:
    """Train; each time memory runs out, again with smaller micro-batches and the same rows a step.

    Goes on from the last complete checkpoint, or from the beginning where there is none.

    Args:
        train: trains a recipe: (recipe, ready, resume).

    Raises:
        MachineError: not even a micro-batch of one row fits.
    """
    words = list(overrides)
    while True:
        try:
            return train(recipe, ready, resume)
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
        recipe = load_recipe(recipe.path, words)
        run_dir = RunDir.of(recipe.name)
        resume = bool(run_dir.complete_checkpoints())
        console.say(
            f"{said}\n--fit: {device} rows at a time x {accumulation} accumulation, {device * accumulation} rows a step as "
            f"before; {'from the last checkpoint' if resume else 'from the beginning'}.",
            "yellow",
        )
        write_status(run_dir, fitted=settings)
        ready = replace(ready, choices=choose(recipe))


def smaller_batch(recipe: Recipe) -> tuple[int, int] | None:
    """(rows at a time, accumulation) of at most half the micro-batch and exactly the same rows a step; None at one row."""
    device = recipe.get("training.per_device_train_batch_size", DEVICE_BATCH)
    rows = device * recipe.get("training.gradient_accumulation_steps", 1)
    fitting = [size for size in range(1, device // 2 + 1) if rows % size == 0]
    return (fitting[-1], rows // fitting[-1]) if fitting else None


def explained(error: BaseException, recipe: Recipe, shape: tuple[int, ...] | None, step: int) -> BatchTooLarge:
    """One message about memory that ran out: the batch, what the plan says, what to change.

    Args:
        shape: (rows, tokens) of the batch that failed, where it is known.
    """
    where = (
        f"in step {step + 1}, on a batch of {shape[0]} rows x {shape[1]} tokens" if shape else "before the first step"
    )
    lines = [f"out of memory {where}: {_first_line(error)}"]
    try:
        planned = plan(recipe)
    except LoraRecipesError:
        planned = {}
    if planned:
        parts = planned["memory"]["parts"].items()
        named = ", ".join(f"{name.replace('_', ' ')} {size / GIB:.2f}" for name, size in parts)
        lines.append(
            f"Certain are {planned['memory']['low'] / GIB:.2f} GiB ({named}); activations of the batch come on top."
        )
    lines.append(f"What helps, cheapest first: {'; '.join(ways_out(recipe))}.")
    if smaller_batch(recipe):
        lines.append("Or launch again with --fit, which does the first by itself and goes on from the last checkpoint.")
    return BatchTooLarge("\n".join(lines))


def ways_out(recipe: Recipe) -> list[str]:
    """Up to three settings that take less memory, cheapest first."""
    ways = []
    if smaller := smaller_batch(recipe):
        ways.append(
            f"training.per_device_train_batch_size={smaller[0]} training.gradient_accumulation_steps={smaller[1]} "
            "(the same rows a step)"
        )
    if not recipe.get("training.activation_checkpointing"):
        ways.append("training.activation_checkpointing=true")
    length = recipe.get("training.max_length", 1024)
    ways.append(f"training.max_length={length // 2}")
    if not recipe.get("quantization"):
        ways.append("a 4-bit base (extends: base/qlora.yaml)")
    return ways[:SUGGESTED]


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _ran_out(error: BaseException) -> bool:
    return isinstance(error, BatchTooLarge) or out_of_memory(error)


def _let_go() -> None:
    """The failed attempt's model and tensors go before the next one begins."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
