"""Finds what a recipe's LoRA would hit, on a model without weights, and refuses names that match nothing."""

import re
import warnings
from dataclasses import dataclass
from difflib import get_close_matches

import torch
from peft import PeftModel, get_peft_model
from transformers import PreTrainedConfig

from lora_recipes.errors import RecipeError
from lora_recipes.model.build import lora_config, meta_model, refusals_of
from lora_recipes.recipe import Recipe


@dataclass(frozen=True)
class Targets:
    """What LoRA hits: parameters (trainable, and all with the adapter), and how many modules of each name."""

    trainable: int
    total: int
    hits: dict[str, int]

    @property
    def percent(self) -> float:
        return 100 * self.trainable / self.total


def find_targets(recipe: Recipe, config: PreTrainedConfig) -> Targets:
    """Build base and adapter on the meta device (no memory, no weights) and check every name the recipe gives.

    Raises:
        RecipeError: a name in `target_modules`, `target_parameters`, `modules_to_save`, `exclude_modules`,
            `rank_pattern` or `alpha_pattern` that matches no module. One that matches beside one that does not is
            refused as well: PEFT would train half the adapter in silence.
    """
    with refusals_of(recipe, "lora"):
        lora_config(recipe.section("lora"))
    base = meta_model(config, recipe)
    modules = dict(base.named_modules())
    parameters = [name for name, _ in base.named_parameters()]
    linear = {name.rpartition(".")[2] for name, module in modules.items() if isinstance(module, torch.nn.Linear)}
    problems = []
    for key, known in (
        ("target_modules", list(modules)),
        ("exclude_modules", list(modules)),
        ("modules_to_save", list(modules)),
        ("target_parameters", parameters),
    ):
        names = recipe.get(f"lora.{key}")
        if isinstance(names, list):
            problems += [_unmatched(recipe, key, name, known, linear) for name in names if not _matches(name, known)]
    if problems:
        raise RecipeError("\n".join(problems))
    adapted = _adapted(recipe, base, linear)
    hit = adapted.targeted_module_names + adapted.targeted_parameter_names
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in recipe.get(f"lora.{key}") or {}:
            if not _pattern_matches(pattern, hit):
                problems.append(
                    f"{recipe.where(f'lora.{key}')}: `{key}`: {pattern!r} matches none of the targeted modules"
                )
    layers = recipe.get("lora.layers_to_transform")
    for layer in [layers] if isinstance(layers, int) else layers or []:
        if not any(f".{layer}." in name for name in hit):
            problems.append(
                f"{recipe.where('lora.layers_to_transform')}: `layers_to_transform`: no targeted module in layer {layer}"
            )
    if problems:
        raise RecipeError("\n".join(problems))
    trainable, total = adapted.get_nb_trainable_parameters()
    hits: dict[str, int] = {}
    for name in hit:
        hits[name.rpartition(".")[2]] = hits.get(name.rpartition(".")[2], 0) + 1
    return Targets(trainable, total, hits)


def _adapted(recipe: Recipe, base: torch.nn.Module, linear: set[str]) -> PeftModel:
    section = recipe.section("lora") | {"init_lora_weights": True}  # PiSSA and the like compute on real weights
    try:
        with warnings.catch_warnings():  # PEFT warns of what `find_targets` turns into errors
            warnings.simplefilter("ignore")
            return get_peft_model(base, lora_config(section))
    except (ValueError, TypeError) as error:  # PEFT's own words for a pattern or a layer kind that cannot be adapted
        where = recipe.where("lora.target_modules")
        raise RecipeError(
            f"{where}: LoRA cannot be applied: {error}\nlinear layers here: {', '.join(sorted(linear))}"
        ) from None


def _matches(name: str, known: list[str]) -> bool:
    """PEFT's rule for names in a list: the whole path, or its last parts."""
    return any(path == name or path.endswith(f".{name}") for path in known)


def _pattern_matches(pattern: str, hit: list[str]) -> bool:
    return any(re.match(rf"(.*\.)?({pattern})$", name) for name in hit)  # peft.utils.other.get_pattern_key


def _unmatched(recipe: Recipe, key: str, name: str, known: list[str], linear: set[str]) -> str:
    candidates = sorted({path.rpartition(".")[2] for path in known} - {""})
    near = get_close_matches(name, candidates, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return (
        f"{recipe.where(f'lora.{key}')}: `{key}`: {name!r} matches no module of this model, so it would be left out in "
        f"silence; {hint}its linear layers: {', '.join(sorted(linear))}"
    )
