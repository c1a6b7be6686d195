"""A trained adapter on its base, with every tensor accounted for; and whether weights on disk are sound."""

import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import PreTrainedModel

from lora_recipes.errors import LoraRecipesError, RefusedError, machine_fault
from lora_recipes.model.adapter_config import read_config
from lora_recipes.model.weights import header_of, read_entries, require_own_files

# Ways of PEFT to begin that write into the base's weights.
CHANGE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Safetensors' names; a narrower type was cut from one of these, and is no training's.
FLOATS = ("F16", "BF16", "F32", "F64")
MATRIX = re.compile(r"\.lora_([AB]\.weight|embedding_[AB])$")
SHOWN_LINES = 3  # of what PEFT says
UNMERGEABLE = {  # keys of peft.LoraConfig
    "alora_invocation_tokens": "an aLoRA adapter works only after its invocation tokens, which no plain model can do",
    "layer_replication": "several layers have one weight, so there is no plain model to merge into",
    "arrow_config": "it chooses among several adapters for each token, which no plain model can do",
    "monteclora_config": "it has learnt how much its weights vary, which no plain model can hold",
}


@contextmanager
def fitting(folder: Path) -> Iterator[None]:
    """Around PEFT's loading of an adapter, which may come from anybody: what it stumbles over is the adapter's fault."""
    try:
        yield
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError, ImportError, AssertionError) as error:
        if machine_fault(error) or isinstance(error, LoraRecipesError):
            raise
        of_torch = isinstance(error, RuntimeError) and not isinstance(error, NotImplementedError)
        if of_torch and "size mismatch" not in str(error):
            raise
        said = str(error).strip().splitlines() or [""]
        told = "; ".join(line.strip() for line in said[:SHOWN_LINES])
        raise RefusedError(f"{folder}: not an adapter of this model: {type(error).__name__}: {told}") from error


def attach_adapter(base: PreTrainedModel, folder: Path) -> PeftModel:
    """Load `folder` onto `base`, in evaluation mode.

    Raises:
        RefusedError: the adapter is torn, holds NaN or infinity, or lacks or has keys that the model does not.
    """
    saved = check_adapter(folder)
    resize_embeddings(base, load_file(folder / "adapter_model.safetensors"))
    with fitting(folder):
        model = PeftModel.from_pretrained(base, str(folder), low_cpu_mem_usage=False)
    # Embeddings may lie beside the adapter; "auto", PEFT's default, would look for the base's config, on the hub if need be.
    needed, known = (get_peft_model_state_dict(model, save_embedding_layers=all_).keys() for all_ in (False, True))
    if needed - saved or saved - known:
        raise _not_of_this_model(folder, needed - saved, saved - known)
    return model.eval()


def adapter_on_meta(base: PreTrainedModel, folder: Path) -> PeftModel:
    """The adapter in `folder` with its tensors in memory, 16-bit ones as float32, on a base that has none (meta device).

    Raises:
        RefusedError: it lacks or has keys, or has shapes, that the model does not; or no merge can express it.
    """
    saved = load_file(folder / "adapter_model.safetensors")  # mapped: read where it is used
    with fitting(folder):
        config = LoraConfig.from_pretrained(str(folder))
    _refuse_unmergeable(folder, config)
    config.inference_mode = True
    config.init_lora_weights, config.eva_config = True, None  # nothing is computed from the base
    resize_embeddings(base, saved)
    with warnings.catch_warnings(), fitting(folder):
        warnings.simplefilter("ignore")
        model = get_peft_model(base, config)
    wanted = get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    given: dict[str, torch.Tensor] = {}
    # PEFT knows which saved key is which parameter, and tells it to load_state_dict alone.
    model.load_state_dict = lambda state, **_: given.update(state)
    if wanted <= saved.keys():
        set_peft_model_state_dict(model, saved)
    del model.load_state_dict
    # With resized embeddings PEFT writes whole modules twice, once under a name that it reads again as no parameter.
    repeats = [
        name
        for name in given
        if name.replace(".modules_to_save.", ".modules_to_save.default.") in given.keys() - {name}
    ]
    for name in repeats:
        del given[name]
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    wrong = [name for name, tensor in given.items() if shapes.get(name) != tensor.shape]
    if wrong or not wanted <= saved.keys():
        raise _not_of_this_model(folder, wanted - saved.keys(), set(wrong))
    _assign(model, given)
    return model.eval()


def _assign(model: PeftModel, given: dict[str, torch.Tensor]) -> None:
    """Put tensors in the place of parameters; what was one parameter under several names stays one."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        names.setdefault(id(parameter), []).append(name)
    for name, parameter in parameters.items():
        if name not in given:
            continue
        tensor = given[name]
        if "lora_" in name and tensor.dtype in (torch.float16, torch.bfloat16):
            tensor = tensor.float()  # as PEFT does with what it loads
        new = torch.nn.Parameter(tensor, requires_grad=False)
        for shared in names[id(parameter)]:
            holder, _, last = shared.rpartition(".")
            setattr(model.get_submodule(holder), last, new)


def _refuse_unmergeable(folder: Path, config: LoraConfig) -> None:
    """Raises RefusedError for what no merge can express in a plain model."""
    for name, why in UNMERGEABLE.items():
        if getattr(config, name):
            raise RefusedError(f"{folder}: cannot be merged, `{name}`: {why}. Serve it as an adapter")
    if str(config.init_lora_weights).lower().startswith(CHANGE_BASE):
        raise RefusedError(
            f"{folder}: `init_lora_weights: {config.init_lora_weights}` has moved a part of the base into the adapter, so it "
            "does not belong to the base on disk. Convert it first: save_pretrained(…, path_initial_model_for_weight_conversion)"
        )


def resize_embeddings(base: PreTrainedModel, saved: Mapping[str, torch.Tensor]) -> None:
    """Give the base as many rows of embeddings as an adapter holds that was trained with more, or fewer, tokens."""
    name = next(name for name, module in base.named_modules() if module is base.get_input_embeddings())
    places = (f"{name}.weight", f"{name}.base_layer.weight", f"{name}.modules_to_save.weight")
    for key in (f"base_model.model.{place}" for place in places):
        if key in saved and len(saved[key]) != base.get_input_embeddings().weight.shape[0]:
            base.resize_token_embeddings(len(saved[key]), mean_resizing=False)


def _not_of_this_model(folder: Path, missing: Collection[str], unexpected: Collection[str]) -> RefusedError:
    return RefusedError(
        f"{folder}: not an adapter of this model: {len(missing)} keys are missing, {len(unexpected)} are not known or of "
        f"another shape ({', '.join(sorted({*missing, *unexpected})[:3])})"
    )


def check_adapter(folder: Path) -> set[str]:
    """The keys of a sound adapter.

    Raises:
        RefusedError: its weights are a pickle, cannot be read or are not finite; a link leaves the folder; or its config
            asks for what no adapter may.
        RunError: its config is of a kind, or a version of PEFT, that is not known here.
    """
    weights = folder / "adapter_model.safetensors"
    require_own_files(folder)
    pickled = folder / "adapter_model.bin"
    if pickled.is_file() and not weights.is_file():
        raise RefusedError(
            f"{pickled}: a pickle, which can run code when it is loaded; no option loads an adapter from one. Ask its "
            "publisher for adapter_model.safetensors, or load and save it with PEFT where you trust it"
        )
    if not weights.is_file():  # a pipe would never end
        raise RefusedError(f"{weights}: cannot be read: no such file")
    read_config(folder, _require_matrices(weights))
    return _check_weights(weights)


def _require_matrices(weights: Path) -> dict[str, tuple[int, ...]]:
    """Tensor → shape. PEFT would cast what is no float, and lose a part of it without a word."""
    shapes = header_of(weights)
    for name, entry in read_entries(weights)[1].items():
        if entry["dtype"] not in FLOATS:
            raise RefusedError(
                f"{weights}: {name} is of type {entry['dtype']}, and an adapter holds floats ({', '.join(FLOATS)}); get the "
                "adapter from its publisher again"
            )
        if MATRIX.search(name) and len(shapes[name]) < 2:
            raise RefusedError(
                f"{weights}: {name} has the shape {list(shapes[name])}, no matrix; get the adapter from its publisher again"
            )
    return shapes


def require_change(folder: Path) -> None:
    """Raises RefusedError for an adapter that changes nothing: every B is zero, as before the first step."""
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as tensors:
        names = list(tensors.keys())
        others = [name for name in names if "lora_A" not in name and "lora_embedding_A" not in name]
        if not any(tensors.get_tensor(name).any() for name in others):
            raise RefusedError(f"{folder}: every B is zero, so this adapter changes nothing; was it trained?")


def check_model(folder: Path) -> set[str]:
    """The keys of a sound plain model: `check_adapter` for full fine-tuning."""
    files = sorted(folder.glob("*.safetensors"))
    if not files or not (folder / "config.json").is_file():
        raise RefusedError(f"{folder}: holds no whole model")
    return set().union(*(_check_weights(file) for file in files))


def _check_weights(weights: Path) -> set[str]:
    try:
        with safe_open(weights, framework="pt") as tensors:
            names = set(tensors.keys())
            for name in names:
                if not torch.isfinite(tensors.get_tensor(name)).all():
                    raise RefusedError(f"{weights}: {name} holds NaN or infinity; the run diverged, nothing is merged")
    except (OSError, ValueError, SafetensorError) as error:
        raise RefusedError(f"{weights}: cannot be read: {error}") from None
    return names
