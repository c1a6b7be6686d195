"""A trainer without its run, what tests do to the checkpoints of a run, and what they compare."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lora_recipes.data.load import load_data
from lora_recipes.model.build import end_token_ids, load_base, load_tokenizer
from lora_recipes.model.machine import choose
from lora_recipes.model.source import locate
from lora_recipes.recipe import load_recipe
from lora_recipes.run_dir import RunDir, file_sha256, read_json, read_jsonl, write_json
from lora_recipes.train.trainer import RecipeTrainer, build_trainer, training_arguments

EVERY_STEP = {"save_strategy": "steps", "save_steps": 1}


def make_trainer(path: Path, *overrides: str) -> RecipeTrainer:
    recipe = load_recipe(path, overrides)
    source, choices = locate(recipe), choose(recipe)
    tokenizer = load_tokenizer(recipe, source)
    data = load_data(recipe, tokenizer, set(end_token_ids(recipe, source, tokenizer)))
    base = load_base(recipe, source, choices)
    args = training_arguments(choices.training, RunDir.of(recipe.name))
    return build_trainer(recipe, args, choices, base, tokenizer, data, [])


def cut_off(run_dir: RunDir, *, after: int | None = None) -> None:
    """As if killed before the adapter was published, and after the checkpoint of a step where one is given."""
    shutil.rmtree(run_dir.adapter, ignore_errors=True)
    shutil.rmtree(run_dir.merged, ignore_errors=True)
    for checkpoint in run_dir.checkpoints.glob("checkpoint-*"):
        if after is not None and int(checkpoint.name.split("-")[1]) > after:
            shutil.rmtree(checkpoint)


def reseal(checkpoint: Path) -> None:
    """Make the manifest of a checkpoint say what its files are now."""
    manifest = read_json(checkpoint / "manifest.json")
    for name in manifest["files"]:
        file = checkpoint / name
        manifest["files"][name] = {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
    write_json(checkpoint / "manifest.json", manifest)


def digest(checkpoint: Path) -> dict[str, str]:
    """Weights, optimizer, schedule and random state of a checkpoint, to the last bit, and the losses up to it."""
    weights = sorted(checkpoint.glob("*.safetensors"))
    found = {file.name: _hashed({name: load_file(file)[name] for name in sorted(load_file(file))}) for file in weights}
    for file in sorted([*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")]):
        found[file.name] = _hashed(torch.load(file, weights_only=False))
    log = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    found["log"] = _hashed([{key: line[key] for key in sorted(line) if _repeats(key)} for line in log])
    return found


def metrics(run_dir: RunDir) -> list[dict[str, Any]]:
    """The lines of a run without what depends on the clock, and without the closing line of a launch."""
    lines = [line for line in read_jsonl(run_dir.metrics) if "train_runtime" not in line]
    return [{key: value for key, value in line.items() if _repeats(key)} for line in lines]


def _repeats(key: str) -> bool:
    """Not the clock."""
    return not any(word in key for word in ("seconds", "runtime", "per_second", "preparation_time"))


def _hashed(value: Any) -> str:
    found = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, torch.Tensor):
            found.update(f"{part.dtype}{tuple(part.shape)}".encode())
            found.update(part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(part, dict):
            for key, inner in part.items():
                found.update(repr(key).encode())
                add(inner)
        elif isinstance(part, list | tuple):
            found.update(str(len(part)).encode())
            for inner in part:
                add(inner)
        else:
            found.update(part.tobytes() if hasattr(part, "tobytes") else repr(part).encode())

    add(value)
    return found.hexdigest()
