"""A whole training run: everything cheap is checked first, then weights are loaded, trained and published."""

import json
import math
import pickle
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, TrainerState
from trl import SFTConfig

from lora_recipes import console
from lora_recipes.data.audit import audit, require_sound, write_evidence
from lora_recipes.data.load import LoadedData, load_data
from lora_recipes.errors import MachineError, RecipeError, RefusedError, RunError, out_of_memory
from lora_recipes.model.adapted import check_adapter, check_model
from lora_recipes.model.build import end_token_ids, load_base, load_tokenizer, model_config, refusals_of
from lora_recipes.model.identity import base_of
from lora_recipes.model.initialise import INITIAL, changes_base, keep_initial
from lora_recipes.model.machine import Choices, why_cpu
from lora_recipes.model.sound import require_positions, require_vocabulary
from lora_recipes.model.source import Source, materialise
from lora_recipes.model.targets import Targets, find_targets
from lora_recipes.model.trial import tried_generation
from lora_recipes.recipe import Recipe
from lora_recipes.run_dir import RunDir, published, read_json, text_sha256, write_text
from lora_recipes.train.changes import require_same_material
from lora_recipes.train.checkpoints import newest_whole
from lora_recipes.train.describe import describe
from lora_recipes.train.diagnosis import Diagnosis
from lora_recipes.train.memory import explained
from lora_recipes.train.preflight import Ready, data_hashes
from lora_recipes.train.probe import LongestFirst
from lora_recipes.train.publish import publish
from lora_recipes.train.ranks import introduce, meet
from lora_recipes.train.record import RecordCallback, keep_metrics_until, write_manifest, write_status
from lora_recipes.train.repeat import record_changed_on_the_way, require_same_rows
from lora_recipes.train.room import require_disk
from lora_recipes.train.sharding import refuse_sharded
from lora_recipes.train.trainer import RecipeTrainer, build_trainer, training_arguments

# Layers that read position ids; what else a config names as a layer type carries a state.
ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
RECURRENT_FIELDS = (
    "mamba_d_state",
    "mamba_d_conv",
    "ssm_state_size",
    "state_size",
    "conv_L_cache",
    "attn_layer_indices",
)
# Above this a CPU run takes days; `training.use_cpu: true` says that it is meant.
CPU_PARAMETERS = 1_500_000_000


def train(recipe: Recipe, ready: Ready) -> None:
    """Train the recipe's adapter and publish it as `outputs/<name>/adapter`; without a `lora` section the whole model.

    Goes on from the newest whole checkpoint of the run folder.

    Args:
        ready: what `preflight` found on this machine.

    Raises:
        LoraRecipesError: anything a user can act on; before weights are loaded wherever that is possible.
    """
    run_dir, choices = RunDir.of(recipe.name), ready.choices
    introduce()
    meet(choices.training)
    with refusals_of(recipe, "training"):
        args = training_arguments(choices.training, run_dir)  # before the model: DeepSpeed hooks its loading here
    refuse_sharded(recipe, args)
    with PartialState().main_process_first():  # one rank unpacks, the others find it in the cache
        source = materialise(ready.source)
    tokenizer = load_tokenizer(recipe, source)
    config = model_config(recipe, source)
    require_vocabulary(recipe, config, tokenizer)
    _refuse_leaking_packing(recipe, config)
    targets = find_targets(recipe, config)
    _require_small_on_cpu(recipe, choices, targets)
    ends = end_token_ids(recipe, source, tokenizer)
    if recipe.section("generation"):  # what `generate` will refuse should not cost a training first
        tried_generation(recipe, config, ends, tokenizer)
    data = load_data(recipe, tokenizer, set(ends))
    last = _last_checkpoint(recipe, run_dir)
    if ready.repeats is not None or last is not None:  # on every rank: a new run's weights are hashed by one alone
        template = text_sha256(tokenizer.chat_template) if tokenizer.chat_template else None
        weights = base_of(recipe, source).weights_sha256
    if ready.repeats is not None:
        require_same_rows(ready.repeats, data.keys(), template, weights)
    if last is not None:
        ready.changed |= require_same_material(recipe, run_dir, data.keys(), template, weights, ready.accepted)
    report = audit(data, args.per_device_train_batch_size, _global_batch(args))
    require_sound(report)
    require_positions(recipe, config, report["lengths"].get("max", 0), data.limit)
    _refuse_leaking_stream(recipe, args, data, report["epoch_rows"])
    require_disk(run_dir, choices.training, targets, _steps(args, report["epoch_rows"]))
    ready.met = True
    base = load_base(recipe, source, choices, trains=True)
    diagnosis = Diagnosis(recipe, run_dir, report["trained_percent"], len(tokenizer))
    trainer = build_trainer(recipe, args, choices, base, tokenizer, data, [RecordCallback(run_dir), diagnosis], last)
    if last is not None and data.streams:
        _require_first_pass(recipe, last, _global_batch(args), report["epoch_rows"])
    if trainer.is_world_process_zero():
        describe(choices, trainer, data, report)
        _open_run(recipe, run_dir, source, ready, trainer, tokenizer, data, report, last)
    ready.opened = True
    trainer.add_callback(LongestFirst(trainer, data))
    trainer.stop, ready.stop.deferring = ready.stop, True
    try:
        _run(trainer, last)
    except pickle.UnpicklingError as error:
        raise RefusedError(
            f"{last}: a file in it is a pickle of more than tensors and numbers, and may be an attack; nothing of it was run. "
            "Delete that checkpoint, or start over with --fresh"
        ) from error
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise explained(error, recipe, trainer.batch_shape, trainer.state.global_step) from None
    finally:
        if trainer.is_world_process_zero():  # however it ended: the last line that was logged may be far behind
            write_status(run_dir, step=trainer.state.global_step)
    publish(trainer, run_dir, recipe, source, tokenizer, ends)


def _refuse_leaking_stream(recipe: Recipe, args: SFTConfig, data: LoadedData, rows: int) -> None:
    """Where a stream ends within an accumulation, the Trainer lets its gradient run into the first step of the next pass."""
    if data.streams and args.gradient_accumulation_steps > 1 and args.max_steps * _global_batch(args) > rows:
        raise RecipeError(
            f"{recipe.where('training.max_steps')}: {args.max_steps} steps of {_global_batch(args)} rows are more than one "
            f"pass over a stream of {rows:,} rows, which does not go with gradient_accumulation_steps > 1; set "
            f"training.max_steps={rows // _global_batch(args)}, or read without dataset.streaming"
        )


def _steps(args: SFTConfig, rows: int) -> int:
    """Of the whole run; packing makes fewer of them."""
    return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * rows / _global_batch(args))


def _global_batch(args: SFTConfig) -> int:
    """Rows of one optimizer step."""
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size


def _refuse_leaking_packing(recipe: Recipe, config: PreTrainedConfig) -> None:
    """Packed documents are kept apart by position ids, which only attention reads: a recurrent state runs on."""
    if not (recipe.get("training.packing") or recipe.get("training.padding_free")):
        return
    others = sorted(set(getattr(config, "layer_types", None) or []) - ATTENTION_LAYERS)
    recurrent = [name for name in RECURRENT_FIELDS if getattr(config, name, None)]
    if others or recurrent:
        key = "training.packing" if recipe.get("training.packing") else "training.padding_free"
        raise RecipeError(
            f"{recipe.where(key)}: {config.model_type} has layers that carry a state from token to token "
            f"({', '.join(others or recurrent)}), so packed documents would leak into each other; set {key}=false and "
            "training.train_sampling_strategy=group_by_length against padding"
        )


def _require_small_on_cpu(recipe: Recipe, choices: Choices, targets: Targets) -> None:
    if choices.device == "cpu" and targets.total > CPU_PARAMETERS and not recipe.get("training.use_cpu"):
        raise MachineError(
            f"{recipe.where('model.pretrained_model_name_or_path')}: {why_cpu(recipe)}, and {targets.total:,} parameters "
            "would take days on a CPU. Use a machine with a GPU, a smaller model (recipes/smollm2-135m-lora.yaml), or say "
            "that you mean it: training.use_cpu=true"
        )


def _open_run(
    recipe: Recipe,
    run_dir: RunDir,
    source: Source,
    ready: Ready,
    trainer: RecipeTrainer,
    tokenizer: PreTrainedTokenizerBase,
    data: LoadedData,
    report: dict[str, Any],
    last: Path | None,
) -> None:
    write_evidence(run_dir, data, report)
    write_status(run_dir, state="running", exit_code=None, reason="training")
    keep_metrics_until(run_dir, _state(last).global_step if last else -1)
    if last is not None:
        record_changed_on_the_way(recipe, run_dir, ready.choices)
    if last is None or ready.changed:  # else a run that goes on keeps the record of its beginning
        write_text(run_dir.recipe, json.dumps(recipe.plain(), indent=2, ensure_ascii=False) + "\n")
        write_manifest(
            run_dir,
            recipe,
            source,
            tokenizer.chat_template,
            data_hashes(recipe),
            data.keys(),
            report,
            ready.choices,
            trainer.args,
            None if last is None else ready.changed,
            ready.repeats,
        )
    for line in ready.changed.values():
        console.say(f"note: accepted: {line}", "yellow")
    if last is None:
        write_status(run_dir, last_good_checkpoint=None)
        if changes_base(recipe.section("lora")):
            with published(run_dir.checkpoints / INITIAL) as staging:
                keep_initial(trainer.model, staging)


def _last_checkpoint(recipe: Recipe, run_dir: RunDir) -> Path | None:
    """The newest whole checkpoint, the same on all ranks. Raises RefusedError when none of those that are there is whole."""
    said: list[Path | RefusedError | None] = [None]
    if PartialState().is_main_process:
        run = read_json(run_dir.manifest).get("run")
        weights = check_adapter if recipe.get("lora") else check_model

        def check(checkpoint: Path) -> None:
            _require_state(checkpoint)
            weights(checkpoint)

        try:
            said[0] = newest_whole(run_dir.checkpoints, run, check, lambda line: console.say(line, "yellow"))
        except RefusedError as error:
            said[0] = error
        if isinstance(said[0], Path):
            console.say(f"Going on from {said[0]}.")
    found = broadcast_object_list(said)[0]
    if isinstance(found, RefusedError):
        raise found
    return found


def _require_state(checkpoint: Path) -> None:
    """Raises RefusedError where the trainer's state cannot be read, or is that of another step."""
    file = checkpoint / "trainer_state.json"
    step = read_json(file).get("global_step")
    if f"checkpoint-{step}" != checkpoint.name:
        raise RefusedError(f"{file}: `global_step` is {step}, so it is the state of another step")
    try:
        _state(checkpoint)
    except TypeError as error:
        raise RefusedError(f"{file}: holds what no transformers.TrainerState does: {error}") from None


def _state(checkpoint: Path) -> TrainerState:
    return TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))


def _require_first_pass(recipe: Recipe, last: Path, rows_a_step: int, rows: int) -> None:
    """A checkpoint does not say where a stream stands that has begun anew; within the first pass steps tell it."""
    state = _state(last)
    if state.global_step < state.max_steps and state.global_step * rows_a_step >= rows:
        raise RunError(
            f"{last} lies in the second pass over a stream of {rows:,} rows, which cannot be resumed exactly; train again "
            f"under another name (lora-recipes new {recipe.path} NAME), or without dataset.streaming"
        )


def _run(trainer: RecipeTrainer, last: Path | None) -> None:
    """Train to the last step. A checkpoint of the last step is only loaded: the Trainer would add a step to it."""
    if last is not None:
        state = _state(last)
        if trainer.args.max_steps > 0:  # it may have been changed since
            state.max_steps = trainer.args.max_steps
        if state.global_step >= state.max_steps:
            trainer._load_from_checkpoint(str(last))
            trainer.state = state
            trainer._load_rng_state(str(last))  # with the evaluation that the run was stopped in
            if trainer.args.load_best_model_at_end and state.best_model_checkpoint:
                trainer._load_best_model()
            return
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    if trainer.state.global_step < trainer.state.max_steps:
        raise RunError(
            f"training stopped at step {trainer.state.global_step} of {trainer.state.max_steps}; nothing is published. "
            "The same command goes on"
        )
