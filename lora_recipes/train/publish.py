"""What a finished run leaves: an adapter that fits the untouched base, or the whole model where all of it was trained."""

import json
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_recipes import console
from lora_recipes.errors import RefusedError
from lora_recipes.metrics import metrics_sha256
from lora_recipes.model.build import make_servable
from lora_recipes.model.digest import tensor_hashes
from lora_recipes.model.folder import read_sums, require_publishable, write_sums
from lora_recipes.model.identity import Base, base_of, write_provenance
from lora_recipes.model.initialise import INITIAL, changes_base
from lora_recipes.model.source import Source
from lora_recipes.recipe import Recipe
from lora_recipes.run_dir import SUMS, RunDir, file_sha256, published, read_json, staging_of, write_json, write_text
from lora_recipes.train.card import card
from lora_recipes.train.record import write_status
from lora_recipes.train.trainer import RecipeTrainer

SETS = ("target_modules", "exclude_modules", "modules_to_save", "target_parameters")  # of adapter_config.json


def publish(
    trainer: RecipeTrainer,
    run_dir: RunDir,
    recipe: Recipe,
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    ends: list[int],
) -> None:
    """Write `adapter/`, or for full fine-tuning `merged/`; whole, or not at all.

    Args:
        source: the base that was trained on.
        ends: tokens that end an answer.

    Raises:
        RefusedError: a trained weight is not finite, or what was written is not what was trained.
    """
    trainer.require_finite()
    main = trainer.is_world_process_zero()
    if recipe.get("lora"):
        _adapter(trainer, run_dir, recipe, source, main)
        what, after = f"Adapter: {run_dir.adapter}", "generate merge"
    else:
        _model(trainer, run_dir, recipe, tokenizer, ends, main)
        what, after = f"Model: {run_dir.merged}", "generate"
    if main:
        write_status(run_dir, state="complete", exit_code=0, reason="trained", step=trainer.state.global_step)
        console.say(what, "bold")
        console.say(f"Next: make {after} RECIPE={recipe.path}")


def _adapter(trainer: RecipeTrainer, run_dir: RunDir, recipe: Recipe, source: Source, main: bool) -> None:
    with published(run_dir.adapter) if main else nullcontext(staging_of(run_dir.adapter)) as staging:
        if (
            trainer.is_deepspeed_enabled and trainer.deepspeed is None
        ):  # of a last checkpoint: there was nothing to train
            if main:
                trainer._save(str(staging))
        else:
            trainer.save_model(str(staging))
        trainer.accelerator.wait_for_everyone()
        if main:
            if changes_base(recipe.section("lora")):
                _fit_the_untouched_base(trainer, run_dir.checkpoints / INITIAL, staging)
            _tidy(staging, recipe, run_dir, base_of(recipe, source))
            _record(staging, run_dir.adapter, run_dir, trainer.state.global_step)


def _fit_the_untouched_base(trainer: RecipeTrainer, initial: Path, staging: Path) -> None:
    """Replace the adapter of a base that was split by a plain one of twice the rank: s B A - s B0 A0."""
    weights = staging / "adapter_model.safetensors"
    trained = load_file(weights)
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.save_pretrained(str(staging), path_initial_model_for_weight_conversion=str(initial))
    # PEFT converts A and B and drops all else that was trained: DoRA's lengths, rows of the embedding, whole modules.
    save_file(trained | load_file(weights), weights, metadata={"format": "pt"})


def _model(
    trainer: RecipeTrainer,
    run_dir: RunDir,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    ends: list[int],
    main: bool,
) -> None:
    started = time.monotonic()
    model: PreTrainedModel = trainer.accelerator.unwrap_model(trainer.model)
    make_servable(model, ends, tokenizer)
    section = recipe.section("merge")
    if dtype := section.get("dtype"):
        model.to(getattr(torch, dtype))
    weights = trainer.accelerator.get_state_dict(trainer.deepspeed or trainer.model)  # gathered, where they are sharded
    if not main:
        return
    size = {key: section[key] for key in ("max_shard_size",) if key in section}
    with published(run_dir.merged) as staging:
        model.save_pretrained(staging, state_dict=weights, **size)
        tokenizer.save_pretrained(staging)
        count = _require_equal(staging, weights, model)
        report: dict[str, Any] = {
            "merged": str(run_dir.merged),
            "dtype": str(model.dtype).removeprefix("torch."),
            "tensors_equal": count,
            "passed": True,
            "seconds": round(time.monotonic() - started, 1),
        }
        require_publishable(staging)
        write_sums(staging)
        _record(staging, run_dir.merged, run_dir, trainer.state.global_step)
        report |= {"adapter_sha256": None, "merged_sha256": file_sha256(staging / SUMS)}
        write_json(run_dir.parity, report)


def _require_equal(folder: Path, weights: Mapping[str, torch.Tensor], model: PreTrainedModel) -> int:
    """Tensors on disk, each bit the trained one. Raises RefusedError when one differs, or a parameter is not there."""
    written = set()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                if name not in weights or not torch.equal(tensors.get_tensor(name), weights[name].cpu()):
                    raise RefusedError(f"{file}: {name} is not the trained tensor; nothing is published")
                written.add(name)
    # Of tied weights one name is written. `named_parameters` gives one as well, not always the same.
    lost = [
        name
        for name, _ in model.named_parameters()
        if not any(weights[other].data_ptr() == weights[name].data_ptr() for other in written)
    ]
    if lost:
        raise RefusedError(f"{folder}: {lost[0]} was not written; nothing is published")
    return len(written)


def _record(staging: Path, folder: Path, run_dir: RunDir, step: int) -> None:
    """What the run came to, by hashes, in its manifest: a repetition is held against it."""
    result = {
        "folder": folder.name,
        "step": step,
        "files": read_sums(staging),
        "tensors": tensor_hashes(staging),
        "metrics_sha256": metrics_sha256(run_dir),
    }
    write_json(run_dir.manifest, read_json(run_dir.manifest) | {"published": result})


def _tidy(folder: Path, recipe: Recipe, run_dir: RunDir, base: Base) -> None:
    """What loads an adapter and says what it is: no pickle, no path of this machine, a config whose bytes do not vary
    between runs, a card that is true, and the base it belongs to."""
    config = folder / "adapter_config.json"
    values = json.loads(config.read_text(encoding="utf-8"))
    for key in SETS:
        if isinstance(values.get(key), list):
            values[key] = sorted(values[key])
    values["base_model_name_or_path"], values["revision"] = base.name, base.revision
    write_json(config, values)
    write_text(folder / "README.md", card(recipe, run_dir, base))
    template = read_json(run_dir.manifest).get("chat_template_sha256")
    write_provenance(folder, base, recipe=recipe.name, chat_template_sha256=template)
    require_publishable(folder, adapter=True)
    write_sums(folder)
