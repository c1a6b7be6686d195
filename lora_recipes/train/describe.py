"""Everything that decides what is learnt, printed with its arithmetic before the first step."""

import math
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from lora_recipes import console
from lora_recipes.data.tokens import IGNORED, TokenizedData
from lora_recipes.model.machine import Choices
from lora_recipes.train.trainer import RecipeTrainer


def describe(choices: Choices, trainer: RecipeTrainer, data: TokenizedData, tokenizer: PreTrainedTokenizerBase) -> None:
    """Print what this machine chose, the sizes of the run, and one example with its trained tokens in colour."""
    made = [(choice.what, f"{choice.value}  ({choice.why})") for choice in choices.made]
    console.facts("What this machine made of the recipe", made)
    console.facts("What will be trained", _sizes(trainer, data))
    limit = trainer.args.max_length
    ids, labels = data.train[0]["input_ids"][:limit], data.train[0]["labels"][:limit]
    runs = groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] != IGNORED)
    pieces = [(tokenizer.decode([token for token, _ in pairs]), trained) for trained, pairs in runs]
    console.trained_tokens(pieces, sum(label != IGNORED for label in labels), len(ids))


def _sizes(trainer: RecipeTrainer, data: TokenizedData) -> list[tuple[str, str]]:
    args, rows = trainer.args, trainer.train_dataset
    trainable, total = trainer.model.get_nb_trainable_parameters()
    device, accumulation, processes = (
        args.per_device_train_batch_size,
        args.gradient_accumulation_steps,
        args.world_size,
    )
    batch = device * accumulation * processes
    tokens = sum(len(ids) for ids in rows["input_ids"])
    trained = sum(label != IGNORED for labels in rows["labels"] for label in labels)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * math.ceil(len(rows) / batch))
    return [
        ("parameters", f"{trainable:,} trainable of {total:,} ({100 * trainable / total:.4f} %)"),
        ("rows", _rows(trainer, data)),
        ("tokens", f"{tokens:,} an epoch, {trained:,} with loss ({100 * trained / tokens:.1f} %)"),
        ("effective batch", f"{batch} rows = {device} a device x {accumulation} accumulation x {processes} processes"),
        ("tokens a step", f"about {batch * tokens / len(rows):,.0f}"),
        ("steps", f"{steps:,}"),
    ]


def _rows(trainer: RecipeTrainer, data: TokenizedData) -> str:
    kept, read, limit = len(trainer.train_dataset), len(data.train), trainer.args.max_length
    if trainer.args.packing:
        return f"{read:,} packed into {kept:,} of up to {limit} tokens"
    cut = sum(len(ids) > limit for ids in data.train["input_ids"]) if limit else 0
    return f"{kept:,} of {read:,} ({read - kept:,} dropped: no trained token left), {cut:,} cut at {limit} tokens"
