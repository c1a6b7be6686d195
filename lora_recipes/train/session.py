"""A whole training run: everything cheap is checked first, then weights are loaded, trained and published."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase

from lora_recipes import console
from lora_recipes.data import read_data, tokenize
from lora_recipes.data.read import local_files
from lora_recipes.errors import DataError, MachineError, RefusedError
from lora_recipes.model.build import end_token_ids, load_base, load_tokenizer, model_config, refusals_of
from lora_recipes.model.machine import Choices
from lora_recipes.model.package import file_sha256
from lora_recipes.model.source import Source, materialise
from lora_recipes.model.targets import Targets, find_targets
from lora_recipes.recipe import Recipe
from lora_recipes.run_dir import RunDir, published, staging_of, write_json, write_text
from lora_recipes.train.describe import describe
from lora_recipes.train.preflight import Ready
from lora_recipes.train.record import RecordCallback, write_manifest, write_status
from lora_recipes.train.trainer import RecipeTrainer, build_trainer, training_arguments

# Above this a CPU run takes days; `training.use_cpu: true` says that it is meant.
CPU_PARAMETERS = 1_500_000_000


def train(recipe: Recipe, ready: Ready, *, resume: bool) -> None:
    """Train the recipe's adapter and publish it as `outputs/<name>/adapter`.

    Args:
        ready: what `preflight` found on this machine.

    Raises:
        LoraRecipesError: anything a user can act on; before weights are loaded wherever that is possible.
    """
    run_dir, choices = RunDir.of(recipe.name), ready.choices
    with refusals_of(recipe, "training"):
        args = training_arguments(choices.training, run_dir)  # before the model: DeepSpeed hooks its loading here
    raw = read_data(recipe)
    with PartialState().main_process_first():  # one rank unpacks, the others find it in the cache
        source = materialise(ready.source)
    tokenizer = load_tokenizer(recipe, source)
    config = model_config(recipe, source)
    targets = find_targets(recipe, config)
    _require_small_on_cpu(recipe, choices, targets)
    ends = end_token_ids(recipe, source, tokenizer)
    data = tokenize(raw, tokenizer, set(ends), recipe)

    base = load_base(recipe, source, choices)
    trainer = build_trainer(recipe, args, choices, base, tokenizer, data, [RecordCallback(run_dir)])
    if len(trainer.train_dataset) == 0:
        longest = f"within training.max_length ({trainer.args.max_length} tokens)"
        raise DataError(
            f"{recipe.where('training.max_length')}: no row has a trained token {longest}; nothing to learn"
        )
    if trainer.is_world_process_zero():
        describe(choices, trainer, data, tokenizer)
        _open_run(recipe, run_dir, source, choices, trainer, tokenizer)
    _run(trainer, run_dir, resume)
    _publish(trainer, run_dir, recipe)


def _require_small_on_cpu(recipe: Recipe, choices: Choices, targets: Targets) -> None:
    if choices.device == "cpu" and targets.total > CPU_PARAMETERS and not recipe.get("training.use_cpu"):
        raise MachineError(
            f"{recipe.where('model.pretrained_model_name_or_path')}: no GPU is visible, and {targets.total:,} parameters "
            "would take days on a CPU. Use a machine with a GPU, a smaller model (recipes/smollm2-135m-lora.yaml), or say "
            "that you mean it: training.use_cpu=true"
        )


def _open_run(
    recipe: Recipe,
    run_dir: RunDir,
    source: Source,
    choices: Choices,
    trainer: RecipeTrainer,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    write_text(run_dir.recipe, json.dumps(recipe.plain(), indent=2, ensure_ascii=False) + "\n")
    files = [
        file
        for split in ("split", "eval_split")
        if recipe.get(f"dataset.{split}")
        for file in local_files(recipe, recipe.get(f"dataset.{split}"))
    ]
    hashes = {str(file): file_sha256(file) for file in files}
    write_manifest(run_dir, recipe, source, tokenizer.chat_template, hashes, choices, trainer.args.seed)
    write_status(run_dir, state="running", exit_code=None, reason="training", last_good_checkpoint=None)


def _run(trainer: RecipeTrainer, run_dir: RunDir, resume: bool) -> None:
    checkpoints = run_dir.complete_checkpoints() if resume else []
    if resume and not checkpoints:
        console.say(f"Nothing to resume in {run_dir.checkpoints}: starting at step 0.")
    last = checkpoints[-1] if checkpoints else None
    if last is not None and _finished(last):
        console.say(f"{last} is the last step: nothing left to train.")
        trainer.model.load_adapter(str(last), "default", is_trainable=True)
        return
    if last is not None:
        console.say(f"Resuming from {last}.")
    try:
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    except torch.OutOfMemoryError as error:
        args = trainer.args
        raise MachineError(
            f"out of memory with rows of up to {args.max_length} tokens, {args.per_device_train_batch_size} at a time: {error}\n"
            "What helps, cheapest first: training.per_device_train_batch_size=1 with a larger gradient_accumulation_steps; "
            "training.activation_checkpointing=true; a smaller training.max_length; a 4-bit base (recipes/base/qlora.yaml)"
        ) from None


def _finished(checkpoint: Path) -> bool:
    state: dict[str, Any] = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return state["global_step"] >= state["max_steps"]


def _publish(trainer: RecipeTrainer, run_dir: RunDir, recipe: Recipe) -> None:
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad and not torch.isfinite(parameter).all():
            raise RefusedError(f"{name} holds NaN or infinity after training; no adapter is published")
    main = trainer.is_world_process_zero()
    with published(run_dir.adapter) if main else nullcontext(staging_of(run_dir.adapter)) as staging:
        trainer.save_model(str(staging))
        trainer.accelerator.wait_for_everyone()
        if main:
            _tidy(staging)
    if main:
        step = trainer.state.global_step
        write_status(run_dir, state="complete", exit_code=0, reason="trained", step=step)
        console.say(f"Adapter: {run_dir.adapter}", "bold")
        console.say(f"Next: make generate merge RECIPE={recipe.path}")


def _tidy(folder: Path) -> None:
    """Only what loads an adapter: no pickle, no boilerplate card, and a config whose bytes do not vary between runs."""
    (folder / "training_args.bin").unlink(missing_ok=True)
    (folder / "README.md").unlink(missing_ok=True)
    config = folder / "adapter_config.json"
    values = json.loads(config.read_text(encoding="utf-8"))
    for key in (
        "target_modules",
        "exclude_modules",
        "modules_to_save",
        "target_parameters",
    ):  # PEFT keeps sets
        if isinstance(values.get(key), list):
            values[key] = sorted(values[key])
    write_json(config, values)
