"""The adapter as vLLM, SGLang and TGI load it, or the reason why they would not."""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import safe_open

from lora_recipes.errors import RefusedError
from lora_recipes.model.adapted import check_adapter
from lora_recipes.model.identity import portable
from lora_recipes.recipe import Recipe
from lora_recipes.run_dir import write_json

MAX_RANK = 512  # the largest of vLLM's --max-lora-rank
# Key of adapter_config.json → why an engine does not load an adapter that sets it.
REJECTED = {
    "modules_to_save": "whole modules were trained beside the adapter, and engines load low-rank weights alone",
    "use_dora": "DoRA also rescales each row, and engines compute plain LoRA",
    "lora_bias": "the low-rank layers have biases, which engines do not add",
    "trainable_token_indices": "rows of the embedding were trained, which engines do not load",
    "target_parameters": "fused experts were adapted as parameters, in a layout that engines do not read",
    "rank_pattern": "layers differ in rank; engines, vLLM among them, apply one rank and one scale to all",
    "alpha_pattern": "layers differ in alpha; engines, vLLM among them, apply one rank and one scale to all",
    "alora_invocation_tokens": "aLoRA switches on in the middle of a text",
    "layer_replication": "layers are repeated, which changes the model itself",
    "use_qalora": "QALoRA pools the inputs",
    "use_bdlora": "BD-LoRA has block-diagonal matrices",
    "arrow_config": "Arrow routes between adapters",
    "megatron_config": "it is sharded for Megatron",
}


def write_adapter(adapter: Path, folder: Path, recipe: Recipe) -> None:
    """Copy `adapter` to `folder` in the form that engines load. `adapter` is a sound PEFT folder.

    Raises:
        RefusedError: the adapter is broken, or an engine would refuse it or compute something else.
    """
    check_adapter(adapter)
    config: dict[str, Any] = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    if reasons := _reasons(config, adapter / "adapter_model.safetensors"):
        raise RefusedError(
            "\n".join(
                [f"{adapter}: vLLM and other engines do not load this adapter:"]
                + [f"  - {reason}" for reason in reasons]
                + [f"Serve the merged model instead: lora-recipes merge {recipe.path}"]
            )
        )
    folder.mkdir(parents=True)
    shutil.copyfile(adapter / "adapter_model.safetensors", folder / "adapter_model.safetensors")
    recorded, named = config.get("base_model_name_or_path"), recipe.get("model.pretrained_model_name_or_path")
    config["base_model_name_or_path"] = recorded if recorded and portable(recorded) == recorded else portable(named)
    write_json(folder / "adapter_config.json", config)


def _reasons(config: dict[str, Any], weights: Path) -> list[str]:
    reasons = [f"{key}: {why}" for key, why in REJECTED.items() if config.get(key)]
    if config.get("peft_type") != "LORA":
        reasons.append(f"peft_type: {config.get('peft_type')} is not LORA")
    if config.get("bias", "none") != "none":
        reasons.append(f"bias: {config['bias']} trains biases of the base, which engines do not load")
    if config["r"] > MAX_RANK:
        reasons.append(f"r: {config['r']} is more than {MAX_RANK}, the largest rank that vLLM takes")
    with safe_open(weights, framework="pt") as tensors:
        names = sorted(tensors.keys())
    plain = (".lora_A.weight", ".lora_B.weight")
    if experts := [name for name in names if ".experts." in name]:
        reasons.append(f"{experts[0]}: experts of a mixture are stored in a layout that engines do not read")
    if other := [name for name in names if not name.endswith(plain)]:
        reasons.append(f"{other[0]}: not a low-rank weight of a linear layer ({len(other)} of {len(names)} tensors)")
    return reasons
