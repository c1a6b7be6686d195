"""First weights of an adapter that PEFT leaves to its caller, and how they come back when a run is resumed.

EVA looks at the recipe's own rows, LoftQ at the original weights. PiSSA and OLoRA move a part of each weight W into the
adapter: W becomes the residual W - s B0 A0, so the first adapter (A0, B0) is kept beside the checkpoints.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.eva import initialize_lora_eva_weights
from peft.tuners.lora.layer import Embedding, ParamWrapper
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import transpose
from safetensors.torch import load_file
from transformers import PreTrainedModel

from lora_recipes.errors import RecipeError, RunError
from lora_recipes.model.build import load_base, lora_config, refusals_of
from lora_recipes.model.machine import Choices
from lora_recipes.model.source import locate, materialise
from lora_recipes.recipe import Recipe
from lora_recipes.run_dir import read_json

INITIAL = "initial"  # folder beside the checkpoints; PEFT also names the adapter so while it converts
EVA_BATCHES = 16  # micro-batches of training rows, gone through again until the directions stand still
EVA_FORWARDS = 500  # a limit to that: PEFT itself has none
_FORWARDED = ("input_ids", "attention_mask", "position_ids")

Batch = dict[str, torch.Tensor]


def changes_base(section: dict[str, Any]) -> bool:
    """Whether this `lora` section makes PEFT change the base weights when the adapter is made."""
    return str(section.get("init_lora_weights")).startswith(("pissa", "olora"))


def needs_whole_weights(section: dict[str, Any]) -> bool:
    """Whether the first weights are computed from whole weight matrices, which a sharded model does not have."""
    return changes_base(section) or section.get("init_lora_weights") in ("eva", "loftq")


def require_float32(recipe: Recipe, base: PreTrainedModel) -> None:
    """Raises RecipeError when a residual would be rounded: the adapter that is published would be another function."""
    if changes_base(recipe.section("lora")) and base.dtype != torch.float32:
        kind = str(base.dtype).removeprefix("torch.")
        raise RecipeError(
            f"{recipe.where('lora.init_lora_weights')}: `init_lora_weights: {recipe.get('lora.init_lora_weights')}` splits each "
            f"weight in two, and in {kind} what is left of it would be rounded, so that the published adapter does not answer "
            "as it was trained; set model.dtype=float32 (training.bf16 may stay on)"
        )


def require_matrices(model: PeftModel, recipe: Recipe) -> None:
    """Raises RecipeError for an adapter whose first weights cannot be computed: its layer has no matrix, or too small a one."""
    method = recipe.get("lora.init_lora_weights")
    where = f"{recipe.where('lora.init_lora_weights')}: `init_lora_weights: {method}`"
    for name, layer in _layers(model):
        if isinstance(layer, (Embedding, ParamWrapper)):
            raise RecipeError(
                f"{where} has no first weights for {name}, which is no linear layer; adapt linear layers only"
            )
        smallest = layer.in_features if method == "eva" else min(layer.in_features, layer.out_features)
        if layer.r["default"] > smallest:
            raise RecipeError(
                f"{where} takes the directions of {name} from a matrix that has {smallest}, fewer than the rank of "
                f"{layer.r['default']}; set lora.r={smallest}, or a lora.rank_pattern"
            )


def starting_config(section: dict[str, Any], last: Path | None) -> LoraConfig:
    """The adapter that a trainer starts from: the recipe's, or with the shape that a checkpoint's has."""
    if last is None or not needs_whole_weights(section):
        return lora_config(section)
    kept = section | {"init_lora_weights": True}
    if section["init_lora_weights"] == "eva":  # which has given each layer a rank of its own
        saved = read_json(last / "adapter_config.json")
        kept |= {key: saved[key] for key in ("target_modules", "rank_pattern", "alpha_pattern")} | {"eva_config": None}
    return lora_config(kept)


def begin(model: PeftModel, recipe: Recipe, choices: Choices, batches: Sequence[Batch]) -> None:
    """Give the adapter of a run that begins its first weights, where PEFT has not done so already.

    Args:
        batches: micro-batches of training rows; looked at only where EVA is asked for.

    Raises:
        RecipeError: too few tokens for EVA's directions, or directions that do not come to rest.
    """
    method = recipe.get("lora.init_lora_weights")
    if method == "eva":
        _eva(model, recipe, batches)
    elif method == "loftq":
        source = materialise(locate(recipe))
        _loftq(model, load_base(recipe, source, replace(choices, device="cpu"), quantized=False))


def go_on(model: PeftModel, recipe: Recipe, last: Path) -> None:
    """Bring back what `begin`, or PEFT, had made of base and adapter, before the weights of checkpoint `last` are loaded."""
    section, config = recipe.section("lora"), model.peft_config["default"]
    if changes_base(section):
        _subtract(model, last.parent / INITIAL)
    if needs_whole_weights(section):  # what is saved from here on says what it is
        wanted = lora_config(section)
        config.init_lora_weights, config.eva_config = wanted.init_lora_weights, wanted.eva_config


def keep_initial(model: PeftModel, folder: Path) -> None:
    """Save the adapter as it was made. Its config says that it is plain: loading it must not split the base again."""
    config = model.peft_config["default"]
    made, config.init_lora_weights = config.init_lora_weights, True
    model.save_pretrained(str(folder))
    config.init_lora_weights = made


def _subtract(model: PeftModel, initial: Path) -> None:
    """W - s B0 A0 for each adapted weight W, in the order of operations that PEFT has: equal to the last bit."""
    weights = initial / "adapter_model.safetensors"
    if not weights.is_file():
        raise RunError(
            f"{initial}: the adapter as it was made is gone, without which no checkpoint here can be resumed"
        )
    saved = load_file(weights)
    for name, layer in _layers(model):
        base = layer.get_base_layer()
        first, second = (
            saved[f"{name}.lora_{which}.weight"].to(base.weight.device) for which in ("A", "B")
        )  # [r, in], [out, r]
        turned = getattr(layer, "fan_in_fan_out", False)
        residual = transpose(base.weight.data, turned) - layer.scaling["default"] * second @ first
        base.weight.data = transpose(residual, turned)


def _layers(model: PeftModel) -> Iterator[tuple[str, LoraLayer]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def _eva(model: PeftModel, recipe: Recipe, batches: Sequence[Batch]) -> None:
    """Rows of A: the directions in which a layer's inputs vary most (arXiv 2410.07170); ranks go where most is explained."""
    config = model.peft_config["default"]
    where = recipe.where("lora.init_lora_weights")
    wanted = round(max([config.r, *config.rank_pattern.values()]) * config.eva_config.rho)
    fewest = min((_looked_at(batch, config.eva_config) for batch in batches), default=0)
    if fewest < wanted:
        raise RecipeError(
            f"{where}: EVA needs at least r x rho = {wanted} tokens in a micro-batch, and one has {fewest}; set a larger "
            "training.per_device_train_batch_size, a smaller lora.r, or lora.eva_config.use_label_mask=false"
        )
    forwards = 0

    def forward(adapted: PeftModel, inputs: Batch) -> None:
        nonlocal forwards
        forwards += 1
        if forwards > EVA_FORWARDS:
            raise RecipeError(
                f"{where}: EVA's directions still turn after {EVA_FORWARDS} batches; lower lora.eva_config.tau "
                f"({config.eva_config.tau}), lora.eva_config.rho ({config.eva_config.rho}) or lora.r ({config.r})"
            )
        trunk = adapted.get_base_model().base_model  # no head: its logits are not looked at
        trunk(**{key: inputs[key] for key in _FORWARDED if key in inputs}, use_cache=False)

    dtype = next(layer.lora_A["default"].weight.dtype for _, layer in _layers(model))
    with refusals_of(recipe, "lora"):
        initialize_lora_eva_weights(
            # Every rank sees the same rows; DDP then broadcasts the first rank's weights.
            model,
            batches,
            forward_fn=forward,
            gather_distributed_inputs=False,
            show_progress_bar=False,
        )
    for _, layer in _layers(model):  # layers of a new rank were made in another type than TRL had cast the old ones to
        layer.lora_A["default"].to(dtype)
        layer.lora_B["default"].to(dtype)


def _looked_at(batch: Batch, config: EvaConfig) -> int:
    """Tokens of a batch that EVA looks at: those with a loss, or all that are no padding."""
    if config.use_label_mask:
        return int((batch["labels"] != config.label_mask_value).sum())
    return int(batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum())


@torch.no_grad()
def _loftq(model: PeftModel, original: PreTrainedModel) -> None:
    """s B A: the best approximation of rank r to what quantization took from a weight (arXiv 2310.08659, one iteration).

    PEFT's `replace_lora_weights_loftq` computes on "cuda" whatever the machine has, and leaves the scaling s out.
    """
    weights = original.state_dict()
    for name, layer in _layers(model):
        base = layer.get_base_layer()
        if getattr(base.weight, "quant_state", None) is None:  # not quantized: nothing was lost
            continue
        lost = weights[f"{name.removeprefix('base_model.model.')}.weight"].to(base.weight.device, torch.float32)
        lost -= dequantize_module_weight(base).float()
        left, values, right = torch.linalg.svd(lost, full_matrices=False)
        rank = layer.r["default"]
        root = (values[:rank] / layer.scaling["default"]).sqrt()
        layer.lora_A["default"].weight.copy_(root[:, None] * right[:rank])
        layer.lora_B["default"].weight.copy_(left[:, :rank] * root)
        if layer.use_dora["default"]:  # its lengths were measured while B was zero
            layer.lora_magnitude_vector["default"].update_layer(
                base_layer=base,
                lora_A=layer.lora_A["default"].weight,
                lora_B=layer.lora_B["default"].weight,
                scaling=layer.scaling["default"],
            )
