"""Everything that decides what is learnt, printed with its arithmetic before the first step."""

import math
from collections.abc import Iterator
from typing import Any

import torch

from lora_recipes import console
from lora_recipes.data.load import LoadedData
from lora_recipes.data.show import first_example
from lora_recipes.model.machine import Choices
from lora_recipes.train.trainer import RecipeTrainer


def describe(choices: Choices, trainer: RecipeTrainer, data: LoadedData, report: dict[str, Any]) -> None:
    """Print what this machine chose, what the data amounts to, and one example with its trained tokens in colour."""
    made = [(choice.what, f"{choice.value}  ({choice.why})") for choice in choices.made]
    console.facts("What this machine made of the recipe", made)
    console.facts("What will be trained", _sizes(trainer, report))
    for note in _notes(trainer):
        console.say(f"note: {note}", "yellow")
    for warning in report["warnings"]:
        console.say(f"note: {warning['text']}", "yellow")
    console.example("One training example", first_example(data))


def _sizes(trainer: RecipeTrainer, report: dict[str, Any]) -> list[tuple[str, str]]:
    args = trainer.args
    trainable, total = _parameters(trainer)
    device, accumulation, processes = (
        args.per_device_train_batch_size,
        args.gradient_accumulation_steps,
        args.world_size,
    )
    batch = device * accumulation * processes
    rows, tokens, trained = report["epoch_rows"], report["epoch_tokens"], report["trained_percent"]
    packed = len(trainer.train_dataset) if args.packing and hasattr(trainer.train_dataset, "__len__") else None
    steps = (
        args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * math.ceil((packed or rows) / batch))
    )
    shown = [
        ("parameters", f"{trainable:,} trainable of {total:,} ({100 * trainable / total:.4f} %)"),
        ("data", "; ".join(f"{source['name']}: {source['format']}" for source in report["sources"])),
        ("rows", _rows(report) + (f", packed into {packed:,} of up to {args.max_length} tokens" if packed else "")),
        ("tokens", f"{tokens:,} an epoch, {trained} % with loss"),
        ("effective batch", f"{batch} rows = {device} a device x {accumulation} accumulation x {processes} processes"),
        ("tokens a step", f"about {batch * tokens / (packed or rows):,.0f}"),
        ("steps", f"{steps:,}"),
    ]
    return shown


def _parameters(trainer: RecipeTrainer) -> tuple[int, int]:
    """(trainable, all); PEFT also counts what lies packed in a 4-bit weight."""
    if hasattr(trainer.model, "get_nb_trainable_parameters"):
        return trainer.model.get_nb_trainable_parameters()
    sizes = [  # of ZeRO-3 a process holds parts, beside the number of the whole
        (getattr(parameter, "ds_numel", parameter.numel()), parameter.requires_grad)
        for parameter in trainer.model.parameters()
    ]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def _notes(trainer: RecipeTrainer) -> Iterator[str]:
    if not hasattr(trainer.model, "peft_config") and trainer.model.dtype != torch.float32:
        kind = str(trainer.model.dtype).removeprefix("torch.")
        yield (
            f"full fine-tuning of {kind} weights: a step smaller than their rounding is lost; model.dtype=float32 keeps it "
            "(twice the memory)"
        )


def _rows(report: dict[str, Any]) -> str:
    parts = [f"{report['epoch_rows']:,} an epoch of {report['rows']:,} read"]
    parts += [
        f"{report[key]:,} {what}"
        for key, what in (("heldout_rows", "held out"), ("bad_rows", "left out"))
        if report[key]
    ]
    if report["rows_truncated"]:
        parts.append(f"{report['rows_truncated']:,} over {report['max_length']} tokens")
    return ", ".join(parts)
