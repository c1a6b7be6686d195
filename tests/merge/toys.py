"""Small bases and adapters of every kind, and the two ways to merge them: PEFT's in memory, and ours from disk."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lora_recipes.merge.stream import Streamed
from lora_recipes.merge.weights import Planned, plan_weights, write_weights
from lora_recipes.model.adapted import attach_adapter
from lora_recipes.model.build import load_base
from lora_recipes.model.machine import Choices
from lora_recipes.model.source import Source
from lora_recipes.recipe import Recipe

SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
WHOLE = {"target_modules": "all-linear", "r": 8, "lora_alpha": 16}


def make_base(
    folder: Path, kind: str = "llama", dtype: str = "bfloat16", shard: str | None = None, **sizes: Any
) -> Path:
    """A model of random weights. Biases and norms are random too, so that no tensor is like another."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(SIZES | sizes))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.to(getattr(torch, dtype)).save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
    return folder


def make_adapter(base: Path, folder: Path, *, resize: int | None = None, dtype: str | None = None, **lora: Any) -> Path:
    """An adapter in which everything that trains has moved.

    Args:
        resize: rows that the embeddings are given before.
        dtype: type that its matrices are stored in; unset: float32.
    """
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if resize:
        model.resize_token_embeddings(resize, mean_resizing=False)
    with warnings.catch_warnings():  # of tied layers, and of biases that are trained: both are wanted
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora))
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.05)
        adapted.save_pretrained(folder)
    if dtype:
        edit(folder / "adapter_model.safetensors", lambda name, tensor: tensor.to(getattr(torch, dtype)))
    return folder


def edit(file: Path, change: Any) -> None:
    """Rewrite a safetensors file: `change(name, tensor)` is the new tensor, or None where there shall be none."""
    changed = {name: change(name, tensor.clone()) for name, tensor in load_file(file).items()}
    save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, file, {"format": "pt"})


def recipe_on(
    base: Path | str, quantization: dict[str, Any] | None = None, model: dict[str, Any] | None = None, **merge: Any
) -> Recipe:
    """What merging reads of a recipe."""
    values: dict[str, Any] = {
        "model": {"pretrained_model_name_or_path": str(base)} | (model or {}),
        "lora": {},
        "merge": ({"base": "dequantized"} if quantization else {}) | merge,
        "training": {"use_cpu": True},
        "quantization": quantization or {},
    }
    return Recipe(Path("toy.yaml"), values, {})


def source_of(recipe: Recipe) -> Source:
    named = recipe.get("model.pretrained_model_name_or_path")
    return Source("folder", named, named)


def choices_of(recipe: Recipe) -> Choices:
    return Choices({}, recipe.section("quantization"), "cpu")


def in_memory(recipe: Recipe, adapter: Path) -> PreTrainedModel:
    """PEFT's own merge, of the same base."""
    source, choices, dtype = source_of(recipe), choices_of(recipe), recipe.get("merge.dtype")
    if choices.quantization:
        base = load_base(recipe, source, choices).dequantize()
        base = base.to(getattr(torch, dtype)) if dtype else base
    else:
        base = load_base(recipe, source, choices, dtype=dtype, quantized=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return attach_adapter(base, adapter).merge_and_unload()


def plan(recipe: Recipe, adapter: Path) -> Planned:
    return plan_weights(recipe, source_of(recipe), choices_of(recipe), adapter)


def streamed(recipe: Recipe, adapter: Path, folder: Path) -> tuple[Planned, Streamed]:
    """Our merge, from the files."""
    folder.mkdir(exist_ok=True)
    planned = plan(recipe, adapter)
    return planned, write_weights(planned, folder)


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a model's files; none may be in two."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        loaded = load_file(file)
        assert not found.keys() & loaded.keys()
        found |= loaded
    return found


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """What is compared: -0.0 is not 0.0, and NaN is itself."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def require_same(recipe: Recipe, adapter: Path, folder: Path) -> tuple[Planned, Streamed]:
    """Merge both ways into `folder`, and hold every name, type, shape and bit of one against the other."""
    planned, result = streamed(recipe, adapter, folder / "ours")
    merged = in_memory(recipe, adapter)
    merged.save_pretrained(folder / "theirs")
    ours, theirs = tensors_in(folder / "ours"), tensors_in(folder / "theirs")
    assert ours.keys() == theirs.keys()
    different = [
        name
        for name, tensor in theirs.items()
        if ours[name].dtype != tensor.dtype
        or ours[name].shape != tensor.shape
        or not torch.equal(bits(ours[name]), bits(tensor))
    ]
    assert not different
    configs = json.loads((folder / "theirs" / "config.json").read_text()), planned.model.config.to_dict()
    assert len({json.dumps([c.get(k) for k in ("tie_word_embeddings", "vocab_size", "dtype")]) for c in configs}) == 1
    return planned, result


def require_changed(base: Path, merged: Path) -> None:
    """That a merge did something: a comparison of two merges that both do nothing would pass too."""
    before, after = tensors_in(base), tensors_in(merged)
    assert any(not torch.equal(tensor.float(), after[name].float()) for name, tensor in before.items() if name in after)


def names_in(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())
