"""Adapter folders as their files tell them, the words that name them, and weighted combinations of several."""

import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from lora_recipes.errors import RefusedError, RunError
from lora_recipes.model.adapted import check_adapter, fitting
from lora_recipes.model.initialise import changes_base
from lora_recipes.recipe.vocabulary import COMBINATIONS
from lora_recipes.run_dir import RunDir, published, read_json, write_json

BASE = "__base__"  # PEFT's name for no adapter, in a mixed batch
NAME = re.compile(r"[\w][\w.-]*")
DENSITY = 0.5  # share of the values that ties and dare_ties keep
SEED = 42  # of the values that dare_ties drops
# Fields of adapter_config.json that a swap takes over or that the weights already hold. Any other that is set is another
# kind of adapter.
TAKEN_OVER = {
    "r",
    "lora_alpha",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "init_lora_weights",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "inference_mode",
    "base_model_name_or_path",
    "revision",
    "task_type",
    "auto_mapping",
    "peft_version",
}
SAME_IN_BOTH = ("use_rslora", "lora_dropout", "fan_in_fan_out")  # PEFT refuses a swap between two values
DEFAULTS = {
    key: getattr(value, "value", value) for key, value in LoraConfig().to_dict().items() if key not in TAKEN_OVER
}


@dataclass(frozen=True)
class AdapterFile:
    """An adapter folder as its files tell it: its config, and the shape of each tensor by key."""

    folder: Path
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def read(cls, folder: Path) -> "AdapterFile":
        """Raises RefusedError when the adapter cannot be read, or its weights are not finite."""
        check_adapter(folder)
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as tensors:
            shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        return cls(folder, config, shapes)

    def special(self, but: tuple[str, ...] = ()) -> list[str]:
        """What makes it more than plain LoRA: fields with another value than PEFT's default, `but` these."""
        found = self.config.keys() - TAKEN_OVER - {*SAME_IN_BOTH, *but}
        return sorted(key for key in found if (self.config[key] or None) != (DEFAULTS.get(key) or None))

    def widths(self) -> dict[str, int]:
        """Of each matrix the dimension that is not its rank."""
        return {key: shape[1] if _is_first(key) else shape[0] for key, shape in self.shapes.items()}

    def changes_base(self) -> str | None:
        """The field by which loading it changes the base itself, which then is nobody else's base any more."""
        if self.config.get("bias", "none") != "none":
            return "bias"
        return "init_lora_weights" if changes_base(self.config) else None


def folder_of(word: str) -> Path:
    """The adapter folder that a word names: a path, or the name of a run.

    Raises:
        RunError: neither holds an adapter.
    """
    for folder in (Path(word), RunDir.of(word).adapter):
        if (folder / "adapter_config.json").is_file():
            return folder
    raise RunError(f"{word}: no adapter folder, and no run of that name has one ({RunDir.of(word).adapter})")


def parse_named(words: list[str]) -> dict[str, Path]:
    """`NAME=PATH` words as name → adapter folder, in their order; PATH may be the name of a run.

    Raises:
        RunError: no such form, no such adapter, a name twice or one that means the base.
    """
    found: dict[str, Path] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not equals or not path or not NAME.fullmatch(name):
            raise RunError(f"--adapter {word}: write NAME=PATH, such as --adapter polite=outputs/polite/adapter")
        if name in ("base", BASE):
            raise RunError(f"--adapter {word}: {name!r} means no adapter; give it another name")
        if name in found:
            raise RunError(f"--adapter {word}: there is an adapter {name!r} already")
        found[name] = folder_of(path)
    return found


def parse_weighted(words: list[str]) -> dict[str, tuple[Path, float]]:
    """`a=0.7` words as name → (adapter folder, weight), in their order; `a` is a run's name or an adapter folder.

    Raises:
        RunError: no such form, no such adapter, one adapter twice, or a weight that is no finite number.
    """
    found: dict[str, tuple[Path, float]] = {}
    for word in words:
        name, equals, number = word.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not equals or not name or not math.isfinite(weight):
            raise RunError(f"--adapters {word}: write NAME=WEIGHT with a finite number, such as --adapters a=0.7 b=0.3")
        folder = folder_of(name)
        if any(folder.resolve() == other.resolve() for other, _ in found.values()):
            raise RunError(f"--adapters {word}: the same adapter twice; give it one weight")
        found[name] = (folder, weight)
    return found


def combine(
    meta: PreTrainedModel,
    weighted: dict[str, tuple[Path, float]],
    method: str,
    destination: Path,
    *,
    rank: int | None = None,
    density: float = DENSITY,
    seed: int = SEED,
) -> dict[str, Any]:
    """Write the weighted combination of adapters as a plain adapter folder, without any weight of the base.

    PEFT's `add_weighted_adapter` does the arithmetic. `svd` is the weighted sum of what the adapters add to each
    layer; the other methods combine the A and the B matrices each by themselves (see docs/adapters.md).

    Args:
        meta: the base on the meta device (`build.meta_model`); it is used up.
        weighted: name → (adapter folder, weight).
        method: linear, ties, dare_ties or svd.
        rank: of an `svd`; unset: the sum of all ranks, with which nothing is lost.
        density: share of the values that ties and dare_ties keep.
        seed: of the values that dare_ties drops.

    Returns:
        {"adapter", "method", "weights", "rank", "relative_error"}; the error is the Frobenius norm of what a lower
        `rank` cut off, over that of the whole sum.

    Raises:
        RunError: nothing to combine, an unknown method, other ranks or layers than the method can combine.
        RefusedError: an adapter is broken, or more than matrices of plain LoRA.
    """
    files = {name: AdapterFile.read(folder) for name, (folder, _) in weighted.items()}
    _require_combinable(files, method, destination, rank, density)
    with torch.random.fork_rng(devices=[]):  # loading draws random numbers as well
        model = _with_adapters(_without_memory(meta), list(files.values()))
        names = list(model.peft_config)
        torch.manual_seed(seed)
        model.add_weighted_adapter(
            names,
            [weight for _, weight in weighted.values()],
            "combined",
            combination_type="cat" if method == "svd" else method,
            density=density,
        )
    tensors = get_peft_model_state_dict(model, adapter_name="combined", save_embedding_layers=False)
    full = max(tensor.shape[0] for name, tensor in tensors.items() if _is_first(name))
    rank = min(rank or full, full) if method == "svd" else full
    tensors, lost = _of_rank(tensors, rank)
    _write(tensors, replace(model.peft_config["combined"], r=rank, lora_alpha=rank), destination)
    return {
        "adapter": str(destination),
        "method": method,
        "weights": {name: weight for name, (_, weight) in weighted.items()},
        "rank": rank,
        "relative_error": lost,
    }


def _require_combinable(
    files: dict[str, AdapterFile], method: str, destination: Path, rank: int | None, density: float
) -> None:
    if method not in COMBINATIONS:
        raise RunError(f"no method is called {method!r}; methods: {', '.join(COMBINATIONS)}")
    if not files:
        raise RunError("no adapters to combine; name them: --adapters a=0.7 b=0.3")
    if not 0 < density <= 1 or (rank is not None and rank < 1):
        raise RunError(f"density is a share above 0 and up to 1, and rank at least 1; found {density} and {rank}")
    first_name, first = next(iter(files.items()))
    for name, file in files.items():
        if file.folder.resolve() == destination.resolve():
            raise RunError(f"{destination}: would be replaced by what it is a part of; combine into another folder")
        if special := file.special(but=("rank_pattern", "alpha_pattern")) or [
            field for field in [file.changes_base()] if field
        ]:
            raise RefusedError(
                f"{name}: an adapter with `{special[0]}` cannot be combined; PEFT combines plain LoRA only"
            )
        if whole := [key for key in file.shapes if ".lora_" not in key]:
            raise RefusedError(f"{name}: an adapter with whole weights ({whole[0]}) cannot be combined")
        if strangers := sorted(file.shapes.keys() ^ first.shapes.keys()):
            raise RunError(
                f"{name} and {first_name} adapt other target modules ({strangers[0]}); train both on the same"
            )
        widths, theirs = file.widths(), first.widths()
        if strangers := [key for key in widths if widths[key] != theirs[key]]:
            raise RefusedError(f"{name} and {first_name} are of other models: {strangers[0]} has another width")
        if method != "svd" and (others := [key for key in file.shapes if file.shapes[key] != first.shapes[key]]):
            raise RunError(
                f"{name} and {first_name} have other ranks ({others[0]}: {list(file.shapes[others[0]])} and "
                f"{list(first.shapes[others[0]])}), which `{method}` cannot combine; use --method svd"
            )


def _without_memory(meta: PreTrainedModel) -> PreTrainedModel:
    """Every parameter becomes one zero that is read at all places: a device and a shape, and no memory."""
    for module in meta.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            zero = torch.zeros((), dtype=torch.float32).expand(parameter.shape)
            setattr(module, name, torch.nn.Parameter(zero, requires_grad=False))
    return meta


def _with_adapters(base: PreTrainedModel, files: list[AdapterFile]) -> PeftModel:
    """All adapters beside each other; what PEFT gives a new one, such as its target modules, it takes from the first."""
    with fitting(files[0].folder):
        model = PeftModel.from_pretrained(base, str(files[0].folder), adapter_name="adapter_0", low_cpu_mem_usage=False)
    for number, file in enumerate(files[1:], start=1):
        with fitting(file.folder):
            model.load_adapter(str(file.folder), adapter_name=f"adapter_{number}", low_cpu_mem_usage=False)
    for file, (name, config) in zip(files, model.peft_config.items(), strict=True):
        if config.target_parameters:  # PEFT turns the experts of a mixture into these when it loads
            raise RefusedError(f"{file.folder}: an adapter with `target_parameters` cannot be combined")
        # "auto", PEFT's default, would look for the base that the adapter names, on the hub if need be.
        own = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        if own.keys() != file.shapes.keys():
            raise RefusedError(f"{file.folder}: not an adapter of this model: it has other layers")
        config.target_modules = model.peft_config["adapter_0"].target_modules
    return model


def _is_first(name: str) -> bool:
    return name.endswith((".lora_A.weight", ".lora_embedding_A"))


def _of_rank(tensors: dict[str, torch.Tensor], rank: int) -> tuple[dict[str, torch.Tensor], float]:
    """Every pair with exactly `rank` rows of A and columns of B, cut to its best approximation or filled with zeros.

    The singular values of B A are those of R_b R_a^T, where B = Q_b R_b and A^T = Q_a R_a: of a matrix as wide as the
    rank. PEFT's own `svd` takes B A apart, which at 4096 x 4096 takes 26 s a layer on two cores.

    Returns:
        The tensors, and the relative error of all cuts.
    """
    found, cut, whole = {}, 0.0, 0.0
    for name in filter(_is_first, tensors):
        other = name.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")
        first, second = tensors[name].double(), tensors[other].double()  # [r, in], [out, r]
        whole += float(((second.T @ second) * (first @ first.T)).sum())  # squared Frobenius norm of B A
        if first.shape[0] > rank:
            left, left_core = torch.linalg.qr(second)
            right, right_core = torch.linalg.qr(first.T)
            rotated, values, turned = torch.linalg.svd(left_core @ right_core.T, full_matrices=False)
            second = left @ rotated[:, :rank] * values[:rank]
            first = turned[:rank] @ right.T
            cut += float((values[rank:] ** 2).sum())
        missing = rank - first.shape[0]
        found[name] = torch.nn.functional.pad(first, (0, 0, 0, missing)).float().contiguous()
        found[other] = torch.nn.functional.pad(second, (0, missing)).float().contiguous()
    return found, math.sqrt(cut / whole) if whole else 0.0


def _write(tensors: dict[str, torch.Tensor], config: LoraConfig, destination: Path) -> None:
    """A PEFT adapter whose bytes do not vary between runs.

    The scaling of every part is in its matrices already. PEFT keeps `use_rslora` of the first part, which would scale
    the combination by the root of its rank once more.
    """
    with published(destination) as staging:
        replace(config, use_rslora=False, inference_mode=True, init_lora_weights=True).save_pretrained(str(staging))
        values = read_json(staging / "adapter_config.json")
        for key, value in values.items():
            values[key] = sorted(value) if isinstance(value, list) and key != "layers_to_transform" else value
        write_json(staging / "adapter_config.json", dict(sorted(values.items())))
        save_file(dict(sorted(tensors.items())), staging / "adapter_model.safetensors", metadata={"format": "pt"})
