"""What cannot be trained as a launch shares it out among processes: refused before weights are loaded."""

import os
from collections.abc import Iterator

from transformers.training_args import OptimizerNames
from trl import SFTConfig

from lora_recipes.errors import MachineError, RecipeError
from lora_recipes.launch import FSDP, NONE, ZERO3, sharding
from lora_recipes.model.initialise import needs_whole_weights
from lora_recipes.model.machine import SHARDABLE, of_bitsandbytes
from lora_recipes.recipe import Recipe
from lora_recipes.train.changes import world_size

FLOATS = ("float16", "bfloat16", "float32")


def refuse_sharded(recipe: Recipe, args: SFTConfig) -> None:
    """Raises RecipeError for what no process can do that has only a part of each weight, with the way out."""
    how = sharding(os.environ)
    for key, why in _impossible(recipe, args, how):
        raise RecipeError(f"{recipe.where(key)}: {why}")
    if how == FSDP and args.device.type == "cpu":  # accelerate would train with DDP, and say nothing
        raise MachineError(
            "FSDP shares a model out among GPUs, and no GPU is visible; launch with accelerate_configs/cpu.yaml"
        )


def _impossible(recipe: Recipe, args: SFTConfig, how: str) -> Iterator[tuple[str, str]]:
    """(key, why not and what to do instead)."""
    if recipe.get("model.device_map") is not None and world_size() > 1:
        yield (
            "model.device_map",
            f"one process spreads a model over devices, and there are {world_size()}; launch one (--num_processes 1), or drop "
            "the key",
        )
    if how == NONE:
        return
    whole = "which no process of an FSDP or DeepSpeed run has; launch with accelerate_configs/ddp.yaml, or drop the key"
    if needs_whole_weights(recipe.section("lora")):
        kind = recipe.get("lora.init_lora_weights")
        yield "lora.init_lora_weights", f"`init_lora_weights: {kind}` is computed from whole weights, {whole}"
    if recipe.get("training.lorafa"):
        yield "training.lorafa", f"LoRA-FA projects its gradients on whole weights, {whole}"
    if not recipe.section("lora") and recipe.get("merge.dtype") and how in (FSDP, ZERO3):
        yield (
            "merge.dtype",
            "weights that are shared out are written in the type that they are trained in; drop the key",
        )
    if how == FSDP:
        yield from _impossible_with_fsdp(recipe, args)


def _impossible_with_fsdp(recipe: Recipe, args: SFTConfig) -> Iterator[tuple[str, str]]:
    """FSDP 2 keeps weights as DTensors, and casts those of a floating-point type to the type it computes in."""
    ddp = "launch with accelerate_configs/ddp.yaml"
    if of_bitsandbytes(OptimizerNames(args.optim).value):
        yield (
            "training.optim",
            f"bitsandbytes' optimizers know no DTensor; set training.optim={SHARDABLE}, or {ddp}",
        )
    if recipe.get("quantization.load_in_8bit"):
        yield (
            "quantization.load_in_8bit",
            f"8-bit weights would lose their scales under FSDP; set load_in_4bit, or {ddp}",
        )
    if recipe.get("quantization.load_in_4bit"):
        if recipe.get("lora.use_dora"):
            yield (
                "lora.use_dora",
                f"on a 4-bit base A and B are bf16 and DoRA's lengths are not, which FSDP refuses; {ddp}",
            )
        storage, computes = recipe.get("quantization.bnb_4bit_quant_storage"), _computes_in(args)
        if storage in FLOATS and computes not in (None, storage):
            yield (
                "quantization.bnb_4bit_quant_storage",
                f"FSDP would cast the packed weights from {storage} to {computes}, in which it computes, and destroy them; set "
                f"quantization.bnb_4bit_quant_storage={computes}",
            )
    if any(name.endswith("head") for name in recipe.get("lora.modules_to_save") or []):
        yield (
            "lora.modules_to_save",
            f"under FSDP TRL's loss reads the head in a way that loses the gradients of other processes; {ddp}, or drop the head",
        )


def _computes_in(args: SFTConfig) -> str | None:
    return "bfloat16" if args.bf16 else "float16" if args.fp16 else None
