"""A trained adapter on its base, with every tensor accounted for; and whether weights on disk are sound."""

import json
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from lora_recipes.errors import RefusedError


def attach_adapter(base: PreTrainedModel, folder: Path) -> PeftModel:
    """Load `folder` onto `base`, in evaluation mode.

    Raises:
        RefusedError: the adapter is torn, holds NaN or infinity, or lacks or has keys that the model does not.
    """
    saved = check_adapter(folder)
    model = PeftModel.from_pretrained(base, str(folder), low_cpu_mem_usage=False)
    loaded = get_peft_model_state_dict(model).keys()
    missing, unexpected = loaded - saved, saved - loaded
    if missing or unexpected:
        raise RefusedError(
            f"{folder}: not an adapter of this model: {len(missing)} keys are missing, {len(unexpected)} are not known "
            f"({', '.join(sorted(missing | unexpected)[:3])})"
        )
    return model.eval()


def check_adapter(folder: Path) -> set[str]:
    """The keys of a sound adapter. Raises RefusedError when its weights cannot be read or are not finite."""
    weights = folder / "adapter_model.safetensors"
    try:
        json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RefusedError(f"{weights}: cannot be read: {error}") from None
    return _check_weights(weights)


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
