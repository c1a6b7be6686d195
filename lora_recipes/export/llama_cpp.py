"""Runs the converter of a llama.cpp checkout that the recipe names, for models that are not built in."""

import subprocess
import sys
from pathlib import Path

from lora_recipes.errors import MachineError, RecipeError
from lora_recipes.recipe import Recipe

CONVERTER = "convert_hf_to_gguf.py"
TAIL = 12  # lines of its output that an error shows


def converter(recipe: Recipe, reason: str) -> Path:
    """The script. Raises RecipeError where the recipe names no checkout, or one without it.

    Args:
        reason: why this project does not convert the model itself.
    """
    folder = recipe.get("export.llama_cpp")
    if folder is None:
        raise RecipeError(
            f"{recipe.where('model.pretrained_model_name_or_path')}: not converted to GGUF here: {reason}. "
            "Llama, SmolLM, Mistral, Qwen2 and Qwen3 are built in; for others name a llama.cpp checkout "
            "(git clone https://github.com/ggml-org/llama.cpp): export.llama_cpp=FOLDER. Or export the adapter alone: "
            "export.formats='[adapter]'"
        )
    script = Path(folder) / CONVERTER
    if not script.is_file():
        raise RecipeError(
            f"{recipe.where('export.llama_cpp')}: {folder} has no {CONVERTER}, so it is no llama.cpp checkout"
        )
    return script


def convert(script: Path, merged: Path, path: Path, outtype: str) -> None:
    """Convert the model in `merged` to `path`. Raises MachineError with the end of its output when it fails."""
    command = [sys.executable, str(script), str(merged), "--outfile", str(path), "--outtype", outtype]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode or not path.is_file():
        tail = "\n".join(done.stdout.splitlines()[-TAIL:])
        raise MachineError(f"{script} ended with code {done.returncode} and wrote no model; its last lines:\n{tail}")
