"""The weights of a merged model, from the base's files and the adapter's, in bounded memory."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from transformers import PreTrainedModel

from lora_recipes.merge.checkpoint import Checkpoint, Files, checkpoint_of, header_bytes
from lora_recipes.merge.layout import Layout, lay_out, read_base
from lora_recipes.merge.requantize import Requantizer
from lora_recipes.merge.stream import Merger, Streamed, forget_progress
from lora_recipes.model.adapted import adapter_on_meta
from lora_recipes.model.build import meta_model, model_config
from lora_recipes.model.machine import Choices, freed_memory_kept
from lora_recipes.model.source import Source
from lora_recipes.recipe import Recipe
from lora_recipes.run_dir import file_sha256, require_room

WORKERS = 4  # threads that read and merge, where there are as many cores; more were not measured
SPARE = 64 * 2**20  # bytes on the disk beside the weights: tokenizer, configs, evidence


@dataclass(frozen=True)
class Planned:
    """A merge that is decided and not begun.

    Attributes:
        identity: sha256 of all that the result depends on.
    """

    layout: Layout
    requantizer: Requantizer | None
    identity: str

    @property
    def model(self) -> PreTrainedModel:
        """The merged model without weights: its config and classes."""
        return self.layout.model


def plan_weights(recipe: Recipe, source: Source, choices: Choices, adapter: Path) -> Planned:
    """Decide every tensor of the merged model from headers.

    Args:
        adapter: a PEFT folder.

    Raises:
        RefusedError: adapter and base do not belong together, or no plain model can express the adapter.
        RunError: the base's weights are no safetensors.
    """
    checkpoint = checkpoint_of(recipe, source)
    config = model_config(recipe, source)
    original = recipe.get("merge.base", "original") == "original"
    wanted = recipe.get("merge.dtype")
    loaded = _dtype((wanted if original else None) or recipe.get("model.dtype", "auto"), config.dtype, checkpoint)
    cast = getattr(torch, wanted) if wanted and not original else None
    base = meta_model(config, recipe, loaded)
    requantizer = None if original else Requantizer(base, choices.quantization, choices.device)
    with Files() as files:
        known = read_base(base, checkpoint, loaded, files)
    model = adapter_on_meta(base, adapter)
    layout = lay_out(known, model, cast, recipe.get("merge.max_shard_size"))
    layout.model.config.dtype = cast or loaded
    how = None if original else [choices.quantization, choices.device, str(loaded)]
    return Planned(layout, requantizer, _identity(layout, checkpoint, adapter, how))


def _dtype(wanted: str, of_config: torch.dtype | str | None, checkpoint: Checkpoint) -> torch.dtype:
    """As from_pretrained: the type asked for, the config's, else that of the first weight that is not of integers."""
    if wanted != "auto":
        return getattr(torch, wanted)
    if of_config is not None:
        return getattr(torch, of_config) if isinstance(of_config, str) else of_config
    return next(stored.dtype for stored in checkpoint.tensors.values() if stored.dtype.is_floating_point)


def _identity(layout: Layout, checkpoint: Checkpoint, adapter: Path, opened: list[Any] | None) -> str:
    """What a half-written merge must have been begun with to be gone on with.

    Args:
        opened: how the base was quantized before it was opened; None where the original is merged into.
    """
    heads = [
        header_bytes([(unit.outputs[n].name, unit.outputs[n].dtype, unit.outputs[n].shape) for unit, n in shard]).hex()
        for shard in layout.shards.values()
    ]
    files = {stored.file for stored in checkpoint.tensors.values()}
    stamps = sorted((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    adapters = [file_sha256(adapter / name) for name in ("adapter_model.safetensors", "adapter_config.json")]
    versions = [torch.__version__, peft.__version__, transformers.__version__]
    return hashlib.sha256(json.dumps([heads, stamps, adapters, opened, versions]).encode()).hexdigest()


def write_weights(planned: Planned, folder: Path, *, keep_progress: bool = False) -> Streamed:
    """Merge into `folder`; what an earlier try finished there is kept.

    Args:
        keep_progress: whether the record of what is whole stays until `forget_progress`, so that nothing is written again
            if what follows in the folder fails.

    Raises:
        MachineError: the disk is too small.
        RefusedError: NaN or infinity.
    """
    there = [*folder.glob("*.safetensors"), *folder.glob(".*.part")]
    require_room(
        folder,
        planned.layout.bytes + SPARE,
        "the merged weights",
        "make room, or run from a folder on another disk",
        reused=sum(file.stat().st_size for file in there),
    )
    threads = torch.get_num_threads()
    workers = max(2, min(threads, WORKERS))  # two on one core as well: one may wait for the disk
    torch.set_num_threads(max(1, threads // workers))  # in each of them
    try:
        with freed_memory_kept(), Files() as files:
            written = Merger(planned.layout, files, planned.requantizer, workers).write(folder, planned.identity)
    finally:
        torch.set_num_threads(threads)
    if not keep_progress:
        forget_progress(folder)
    return written
