"""Several adapters on one base in memory: swapped without loading the base again, or mixed in one batch."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from safetensors import safe_open
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lora_recipes.errors import RefusedError, RunError
from lora_recipes.model.adapted import attach_adapter, fitting
from lora_recipes.model.adapters import BASE, DEFAULTS, SAME_IN_BOTH, AdapterFile
from lora_recipes.model.answer import answer_batch

UNMIXABLE = ("use_dora", "target_parameters", "trainable_token_indices", "alora_invocation_tokens", "arrow_config")


def unlike(slot: AdapterFile, other: AdapterFile) -> str | None:
    """Why `other` cannot be swapped into the place of `slot`; None where the swap is exact.

    PEFT's hot swap writes new matrices and one scaling into the old layers. So both must be plain LoRA on the same
    layers; a rank or alpha of its own for some layers (patterns) is not carried over (peft 0.21: utils/hotswap.py
    compares the pattern with the name of the matrix, not with that of the layer).
    """
    for adapter in (slot, other):
        if special := adapter.special():
            return f"{special[0]} in {adapter.folder}"
    for key in SAME_IN_BOTH:
        if slot.config.get(key, DEFAULTS[key]) != other.config.get(key, DEFAULTS[key]):
            return f"another {key}"
    if slot.shapes.keys() != other.shapes.keys():
        return "other target modules"
    if not all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in other.shapes):
        return "an adapted embedding"
    return None


@dataclass
class _Slot:
    """A place for an adapter in the model's layers, by PEFT's name; `holds` is the adapter that is there now."""

    peft_name: str
    first: AdapterFile  # what its layers were made for
    holds: str | None


class AdapterSet:
    """One base in memory and any number of named adapters, one of which is active; None is the base alone.

    The adapter that is swapped in answers as if it were freshly loaded.
    """

    def __init__(self, base: PreTrainedModel, folders: dict[str, Path]) -> None:
        """Load the first of `folders` onto the base.

        Raises:
            RefusedError: an adapter is broken, does not fit the base, or changes it and is not the only one.
        """
        self.files = {name: AdapterFile.read(folder) for name, folder in folders.items()}
        for file in self.files.values():
            _require_fit(base, file)
        self.changes_base = {
            file.folder: what
            for file in self.files.values()
            if (what := file.changes_base() or _overwritten(base, file))
        }
        for folder, what in self.changes_base.items():
            if len(folders) > 1:
                raise RefusedError(
                    f"{folder}: `{what}` changes the base itself when the adapter is loaded, so that no other adapter can "
                    "be beside it; leave the others out"
                )
        first, file = next(iter(self.files.items()))
        self.model: PeftModel = attach_adapter(base, file.folder)
        self.slots = [_Slot("default", file, first)]
        self.active: str | None = first

    def swap(self, name: str | None) -> str:
        """Make `name` the active adapter; None: the base alone.

        Returns:
            How: "base", "hot swap" (new weights into the layers of another), "loaded" (beside the others, once), or
            "set_adapter" (it was there already).

        Raises:
            RunError: no such adapter, or no base without it.
            RefusedError: the adapter's files changed since, and are broken now.
        """
        if name is None:
            self._leave()
            return "base"
        if name not in self.files:
            raise RunError(f"no adapter is called {name!r}; there are {', '.join(self.files)}")
        slot, how = self._place(name)
        self.model.base_model.enable_adapter_layers()
        self.model.set_adapter(slot.peft_name, inference_mode=True)
        self.active = name
        return how

    def _require_base(self) -> None:
        for folder, what in self.changes_base.items():
            raise RunError(f"{folder}: `{what}` changed the base itself, so that there is none without the adapter")

    def _leave(self) -> None:
        self._require_base()
        self.model.base_model.disable_adapter_layers()
        self.active = None

    def _place(self, name: str) -> tuple[_Slot, str]:
        for slot in self.slots:
            if slot.holds == name:
                return slot, "set_adapter"
        for slot in self.slots:
            if unlike(slot.first, self.files[name]) is None:
                self._swap_into(slot, name)
                return slot, "hot swap"
        return self._load(name), "loaded"

    def _swap_into(self, slot: _Slot, name: str) -> None:
        folder = self.files[name].folder
        if AdapterFile.read(folder) != self.files[name]:
            raise RefusedError(f"{folder}: another adapter than when the chat began; start again to use it")
        slot.holds = None  # until all of it is there
        self.model.set_adapter(slot.peft_name, inference_mode=True)  # PEFT compares with the config of the active one
        hotswap_adapter(self.model, str(folder), slot.peft_name, torch_device=str(self.model.device))
        for parameter_name, parameter in self.model.named_parameters():
            # A larger matrix is taken over in the file's own type; a fresh load would compute in float32.
            if f".{slot.peft_name}." in parameter_name and parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.float()
        slot.holds = name

    def _load(self, name: str) -> _Slot:
        file = self.files[name]
        peft_name = f"adapter_{len(self.slots)}"  # a user's name may hold a dot, which no module's may
        with fitting(file.folder):
            self.model.load_adapter(str(file.folder), adapter_name=peft_name, low_cpu_mem_usage=False)
        # "auto", PEFT's default, would look for the base that the adapter names, on the hub if need be.
        needed, known = (
            get_peft_model_state_dict(self.model, adapter_name=peft_name, save_embedding_layers=all_).keys()
            for all_ in (False, True)
        )
        if unknown := sorted((needed - file.shapes.keys()) | (file.shapes.keys() - known)):
            raise RefusedError(
                f"{file.folder}: not an adapter of this model: {len(unknown)} keys differ ({unknown[0]})"
            )
        self.model.eval()
        self.slots.append(_Slot(peft_name, file, name))
        return self.slots[-1]

    @contextmanager
    def side_by_side(self, names: list[str]) -> Iterator[list[str]]:
        """All of `names` in memory at once, by PEFT's names for them, and the active one as before afterwards.

        Raises:
            RunError: no such adapter, or one that PEFT cannot mix with others in a batch.
        """
        for name in dict.fromkeys(names):
            if name != BASE and name not in self.files:
                raise RunError(f"no adapter is called {name!r}; there are {', '.join(self.files)}, and {BASE!r}")
            config = {} if name == BASE else self.files[name].config
            if found := [key for key in UNMIXABLE if config.get(key)]:
                raise RunError(f"{name}: PEFT mixes no adapters with `{found[0]}` in one batch; ask it alone")
        if BASE in names:
            self._require_base()
        if len({tuple(sorted(self.files[name].config.get("modules_to_save") or ())) for name in {*names} - {BASE}}) > 1:
            raise RunError("PEFT mixes adapters with `modules_to_save` only where all save the same; ask each alone")
        places = {slot.holds: slot.peft_name for slot in self.slots if slot.holds}
        for name in dict.fromkeys(names):
            if name not in (BASE, *places):
                places[name] = self._load(name).peft_name
        self.model.base_model.enable_adapter_layers()
        try:
            yield [BASE if name == BASE else places[name] for name in names]
        finally:
            self.swap(self.active)


def answers_mixed(
    adapters: AdapterSet,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    names: list[str],
    config: GenerationConfig,
) -> list[str]:
    """One batch, in which `names[i]` answers `prompts[i]` (token ids); "__base__" is the base without an adapter.

    Raises:
        RunError: no such adapter, one that PEFT cannot mix, or not one name a prompt.
    """
    if len(prompts) != len(names):
        raise RunError(f"{len(prompts)} prompts and {len(names)} names of adapters; each prompt needs one")
    with adapters.side_by_side(names) as places:
        given = answer_batch(adapters.model, tokenizer, prompts, config, adapter_names=places)
    return [one.text for one in given]


def _require_fit(base: PreTrainedModel, file: AdapterFile) -> None:
    """Each pair of matrices belongs to a layer of the base and has its widths, so that loading cannot stop half way."""
    modules: dict[str, Any] = dict(base.named_modules())
    for key, shape in file.shapes.items():
        path, matrix = key.removeprefix("base_model.model.").rpartition(".lora_")[::2]
        layer: Any = modules.get(path)
        if matrix not in ("A.weight", "B.weight") or not hasattr(layer, "in_features"):
            if path and layer is None and not path.endswith(".base_layer"):
                raise RefusedError(f"{file.folder}: not an adapter of this model, which has no layer {path}")
            continue
        width, found = (layer.in_features, shape[1]) if matrix == "A.weight" else (layer.out_features, shape[0])
        if width != found:
            raise RefusedError(
                f"{file.folder}: not an adapter of this model: {path} is {width} wide, the adapter's matrix {found}"
            )


def _overwritten(base: PreTrainedModel, file: AdapterFile) -> str | None:
    """A weight of the base that the adapter brings along with another value, as PEFT does for adapted embeddings."""
    weights, saved = base.state_dict(), file.config.get("modules_to_save") or ()
    with safe_open(file.folder / "adapter_model.safetensors", framework="pt") as tensors:
        for key in file.shapes:
            name = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
            if name not in weights or any(f".{module}." in f".{name}" for module in saved):
                continue
            mine, theirs = weights[name], tensors.get_tensor(key)
            if mine.shape != theirs.shape or not torch.equal(mine.cpu(), theirs.to(mine.dtype)):
                return name
    return None
