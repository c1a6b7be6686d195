"""Finds what a recipe's LoRA would hit, on a model without weights, and refuses names that match nothing."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import torch
from peft import PeftModel
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedConfig

from lora_recipes.errors import RecipeError
from lora_recipes.limits import pattern_fault
from lora_recipes.model.build import adapted_on_meta, lora_config, meta_model, refusals_of
from lora_recipes.model.safe import MOST
from lora_recipes.recipe import Recipe

# What expert weights were called, as layers, before transformers made one parameter of all of them.
BEFORE_FUSION = {"gate_up_proj": {"gate_proj", "up_proj", "w1", "w3"}, "down_proj": {"w2"}}


@dataclass(frozen=True)
class Targets:
    """What LoRA hits: parameters (trainable, and all with the adapter), and how many modules of each name.

    `frozen_experts` counts the parameters of a mixture's experts that no adapter reaches: what a list of attention
    layers leaves out by choice. Without a `lora` section every parameter is trained, and nothing is hit.
    """

    trainable: int
    total: int
    hits: dict[str, int]
    frozen_experts: int = 0

    @property
    def percent(self) -> float:
        return 100 * self.trainable / self.total


def find_targets(recipe: Recipe, config: PreTrainedConfig) -> Targets:
    """Build base and adapter on the meta device (no memory, no weights) and check every name the recipe gives.

    Raises:
        RecipeError: a name in `target_modules`, `target_parameters`, `modules_to_save`, `exclude_modules`,
            `rank_pattern` or `alpha_pattern` that matches no module. One that matches beside one that does not is
            refused as well: PEFT would train half the adapter in silence. So it would with experts that are one 3-D
            parameter for all, which `all-linear` and the names of their projections pass by. Or a layer in
            `layer_replication` that is not there.
    """
    _require_layers(recipe, config)
    base = meta_model(config, recipe)
    if not recipe.get("lora"):
        everything = sum(parameter.numel() for parameter in base.parameters())
        return Targets(everything, everything, {})
    with refusals_of(recipe, "lora"):
        lora_config(recipe.section("lora"))
    modules = dict(base.named_modules())
    _require_quick_patterns(recipe, modules)
    layers = [name for name, module in modules.items() if isinstance(module, torch.nn.Linear)]
    experts = expert_weights(base, recipe.get("lora.modules_to_save") or [])
    _require_matches(recipe, base, layers, experts)
    _require_embedded(recipe, base)
    adapted = _adapted(recipe, base, layers)
    hit = adapted.targeted_module_names + adapted.targeted_parameter_names
    _require_hits(recipe, hit)
    trainable, total = adapted.get_nb_trainable_parameters()
    _require_reached(recipe, adapted, layers, experts, hit)
    hits = Counter(_last(name.removesuffix(".weight")) for name in hit)
    frozen = sum(parameter.numel() for name, parameter in experts.items() if name not in hit)
    return Targets(trainable, total, dict(hits), frozen)


def _require_layers(recipe: Recipe, config: PreTrainedConfig) -> None:
    """Raises RecipeError for `layer_replication` of layers that the model does not have, or of more than can be built."""
    ranges = recipe.get("lora.layer_replication") or []
    there = getattr(config.get_text_config(), "num_hidden_layers", MOST)
    where = f"{recipe.where('lora.layer_replication')}: `layer_replication`"
    for start, end in ranges:
        if not 0 <= start < end <= there:
            raise RecipeError(f"{where}: [{start}, {end}] is no range of this model's layers; they are [0, {there}]")
    if (total := sum(end - start for start, end in ranges)) > MOST:
        raise RecipeError(f"{where}: makes {total:,} layers, more than {MOST:,}")


def _require_quick_patterns(recipe: Recipe, names: Iterable[str]) -> None:
    """Raises RecipeError for a regular expression that is none, or would never be done with the model's names."""
    names = list(names)
    for key in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"):
        given = recipe.get(f"lora.{key}") or {}
        for pattern in [given] if isinstance(given, str) else given if isinstance(given, dict) else []:
            if fault := pattern_fault(pattern if isinstance(given, str) else rf"(.*\.)?({pattern})", names):
                raise RecipeError(f"{recipe.where(f'lora.{key}')}: `{key}`: {fault}")


def _require_embedded(recipe: Recipe, base: torch.nn.Module) -> None:
    """Raises RecipeError for a token to train that the model has no embedding for."""
    given = recipe.get("lora.trainable_token_indices") or []
    rows = base.get_input_embeddings().weight.shape[0]
    for token in [index for indices in given.values() for index in indices] if isinstance(given, dict) else given:
        if not 0 <= token < rows:
            where = recipe.where("lora.trainable_token_indices")
            raise RecipeError(
                f"{where}: `trainable_token_indices`: {token}, and the model has embeddings of 0 to {rows - 1}"
            )


def _require_matches(
    recipe: Recipe, base: torch.nn.Module, layers: list[str], experts: dict[str, torch.nn.Parameter]
) -> None:
    modules = [name for name, _ in base.named_modules()]
    parameters = [name for name, _ in base.named_parameters()]
    problems = []
    for key, known in (
        ("target_modules", modules),
        ("exclude_modules", modules),
        ("modules_to_save", modules),
        ("target_parameters", parameters),
    ):
        names = recipe.get(f"lora.{key}")
        if isinstance(names, list):
            problems += [
                _unmatched(recipe, key, name, known, layers, experts) for name in names if not _matches(name, known)
            ]
    if problems:
        raise RecipeError("\n".join(problems))


def _require_hits(recipe: Recipe, hit: list[str]) -> None:
    problems = []
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in recipe.get(f"lora.{key}") or {}:
            if not _pattern_matches(pattern, hit):
                problems.append(
                    f"{recipe.where(f'lora.{key}')}: `{key}`: {pattern!r} matches none of the targeted modules"
                )
    chosen = recipe.get("lora.layers_to_transform")
    for layer in [chosen] if isinstance(chosen, int) else chosen or []:
        if not any(f".{layer}." in name for name in hit):
            problems.append(
                f"{recipe.where('lora.layers_to_transform')}: `layers_to_transform`: no targeted module in layer {layer}"
            )
    if problems:
        raise RecipeError("\n".join(problems))


def expert_weights(base: torch.nn.Module, saved: Sequence[str] = ()) -> dict[str, torch.nn.Parameter]:
    """Weights of experts that are no layers, which target_modules cannot name; without those trained whole.

    Returns:
        By name: [experts, out, in], or [experts, in, out].
    """
    modules = dict(base.named_modules())
    return {
        name: parameter
        for name, parameter in base.named_parameters()
        if parameter.dim() == 3
        and parameter.shape[0] > 1
        and not isinstance(modules[name.rpartition(".")[0]], _ConvNd)
        and not any(f".{module}." in f".{name}" for module in saved)
    }


def _require_reached(
    recipe: Recipe, adapted: PeftModel, layers: list[str], experts: dict[str, torch.nn.Parameter], hit: list[str]
) -> None:
    """Raises RecipeError where the recipe names experts, or layers beside them, that PEFT leaves frozen.

    It passes by the experts of some architectures. For the others it takes the old names of their projections, and
    `all-linear`, for the experts, and drops the layers that have such a name: shared experts, dense first layers
    (peft.utils.transformers_weight_conversion).

    Args:
        layers: paths of the linear layers.
    """
    reached = {_last(name.removesuffix(".weight")) for name in hit if name not in experts}
    projections = set().union(*map(_projections, experts)) - reached
    dropped = sorted({_last(name) for name in layers if _last(name) in projections and _names(recipe, name)})
    frozen = [] if recipe.get("lora.target_parameters") else [name for name in experts if name not in hit]
    meant = [
        name
        for name in frozen
        if any(_names(recipe, f"{name.rpartition('.')[0]}.{projection}") for projection in _projections(name))
    ]
    if dropped or meant:
        what = f"the layers {', '.join(dropped)}" if dropped else "the experts"
        whole = ", ".join(dict.fromkeys(map(_last, adapted.targeted_module_names)))
        raise RecipeError(
            f"{recipe.where('lora.target_modules')}: `target_modules` does not reach {what} of this model, so they would stay "
            f"frozen in silence. Write under `lora`:\n  target_modules: [{whole}]\n{_lines_for(experts, dropped)}"
        )


def _names(recipe: Recipe, path: str) -> bool:
    """Whether `target_modules` takes in `path`, be there such a module or not."""
    targets = recipe.get("lora.target_modules") or []
    if isinstance(targets, list):
        return any(_matches(target, [path]) for target in targets)
    return targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND or re.fullmatch(targets, path) is not None


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _projections(parameter: str) -> set[str]:
    """The names that an expert weight has, or had before gate and up were one."""
    return {_last(parameter)} | BEFORE_FUSION.get(_last(parameter), set())


def _lines_for(experts: Iterable[str], dropped: Iterable[str] = ()) -> str:
    """What to write to train these experts, and layers whose names PEFT takes for theirs."""
    shared = {re.sub(r"^.*\.\d+\.", "", name) for name in experts}  # without the path down to the layer
    names = [*sorted(shared), *(f"{name}.weight" for name in dropped)]
    return f"  target_parameters: [{', '.join(names)}]\n  lora_dropout: 0.0"


def _adapted(recipe: Recipe, base: torch.nn.Module, layers: list[str]) -> PeftModel:
    try:
        return adapted_on_meta(base, recipe)
    except (ValueError, TypeError, ArithmeticError, LookupError) as error:
        # PEFT's own words for a pattern or a layer kind that cannot be adapted.
        # It says what does not go with experts by the setting's name: lora_dropout, use_dora, lora_bias, fan_in_fan_out.
        blamed = next((key for key in recipe.section("lora") if re.search(rf"\b{key}\b", str(error))), "target_modules")
        raise RecipeError(
            f"{recipe.where(f'lora.{blamed}')}: LoRA cannot be applied: {error}\n"
            f"linear layers here: {', '.join(sorted(set(map(_last, layers))))}"
        ) from None


def _matches(name: str, known: list[str]) -> bool:
    """PEFT's rule for names in a list: the whole path, or its last parts."""
    return any(path == name or path.endswith(f".{name}") for path in known)


def _pattern_matches(pattern: str, hit: list[str]) -> bool:
    return any(re.match(rf"(.*\.)?({pattern})$", name) for name in hit)  # peft.utils.other.get_pattern_key


def _unmatched(
    recipe: Recipe, key: str, name: str, known: list[str], layers: list[str], experts: dict[str, torch.nn.Parameter]
) -> str:
    if key == "target_modules" and any(_last(name) in _projections(expert) for expert in experts):
        return (
            f"{recipe.where(f'lora.{key}')}: `{key}`: {name!r} matches no module of this model, whose experts are no layers: "
            f"they would stay frozen in silence. Write under `lora` instead:\n{_lines_for(experts)}"
        )
    candidates = sorted(set(map(_last, known)) - {""})
    near = get_close_matches(name, candidates, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return (
        f"{recipe.where(f'lora.{key}')}: `{key}`: {name!r} matches no module of this model, so it would be left out in "
        f"silence; {hint}its linear layers: {', '.join(sorted(set(map(_last, layers))))}"
    )
