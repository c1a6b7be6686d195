"""`export`: the merged model as GGUF with an Ollama Modelfile, and the adapter as inference engines load it."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from lora_recipes import console
from lora_recipes.errors import RefusedError, RunError
from lora_recipes.export.architecture import NotBuiltIn
from lora_recipes.export.engines import write_adapter
from lora_recipes.export.gguf import write_gguf
from lora_recipes.export.llama_cpp import convert, converter
from lora_recipes.export.ollama import modelfile
from lora_recipes.model.adapted import check_model
from lora_recipes.model.build import generation_config_in, meta_model
from lora_recipes.model.folder import require_intact, require_publishable, write_sums
from lora_recipes.recipe import Recipe
from lora_recipes.run_dir import RunDir, file_sha256, published, write_json
from lora_recipes.trained import require_same_adapter

FORMATS = ["gguf", "ollama"]
OUTTYPE = "f16"


def export(recipe: Recipe) -> dict[str, Any]:
    """Write `export.formats` to `outputs/<name>/exports`, which is replaced as a whole or left as it was.

    Returns:
        What is written to exports/manifest.json: {"exports", "formats", "outtype", "converter", "files": {name:
        {"bytes", "sha256"}}, "notes"}.

    Raises:
        RunError: nothing merged or trained yet.
        RecipeError: the model's family is not built in, and the recipe names no llama.cpp checkout.
        RefusedError: the merged model was changed, is not finite, lacks tensors or cannot be held by the type; engines
            would not load the adapter; a file holds a path of this machine.
        MachineError: llama.cpp's converter failed.
    """
    run_dir = RunDir.of(recipe.name)
    formats = recipe.get("export.formats", FORMATS)
    made: dict[str, Any] = {"exports": str(run_dir.exports), "formats": formats, "notes": []}
    if "adapter" in formats:
        if not recipe.get("lora"):
            raise RunError(f"{recipe.path}: no adapter to export: without a `lora` section the whole model is trained")
        run_dir.require_adapter(recipe.path)
        require_same_adapter(recipe, run_dir, None)
    if {"gguf", "ollama"} & set(formats):
        _require_merged(recipe, run_dir)
    run_dir.require_writable()
    with published(run_dir.exports) as staging:
        if "adapter" in formats:
            write_adapter(run_dir.adapter, staging / "adapter", recipe)
        if {"gguf", "ollama"} & set(formats):  # a Modelfile is of no use without the file it names
            _write_model(recipe, run_dir.merged, staging, made)
        made["files"] = {
            str(file.relative_to(staging)): {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
            for file in sorted(staging.rglob("*"))
            if file.is_file()
        }
        write_json(staging / "manifest.json", made)
        require_publishable(staging, adapter=True)
        write_sums(staging)
    _show(made)
    return made


def _require_merged(recipe: Recipe, run_dir: RunDir) -> None:
    if not (run_dir.merged / "config.json").is_file():
        before = f"lora-recipes merge {recipe.path}" if recipe.get("lora") else f"lora-recipes train {recipe.path}"
        raise RunError(f"{run_dir.merged}: no merged model yet; make it first: {before}")
    require_intact(run_dir.merged)
    check_model(run_dir.merged)


def _write_model(recipe: Recipe, merged: Path, staging: Path, made: dict[str, Any]) -> None:
    """The GGUF file, by this project or by llama.cpp's converter, and the Modelfile beside it."""
    outtype = recipe.get("export.outtype", OUTTYPE)
    keywords = {"trust_remote_code": bool(recipe.get("model.trust_remote_code")), "local_files_only": True}
    config = AutoConfig.from_pretrained(merged, **keywords)
    if getattr(config, "quantization_config", None) is not None:
        raise RefusedError(
            f"{merged} is quantized; GGUF is made from 16- or 32-bit weights. Merge with merge.dtype set"
        )
    tokenizer = AutoTokenizer.from_pretrained(merged, **keywords)
    generation = generation_config_in(merged, local_files_only=True)
    path = staging / f"{recipe.name}-{outtype}.gguf"
    console.say(f"Writing {path.name} …")
    try:
        expected = set(meta_model(config, recipe).state_dict())
        written = write_gguf(merged, path, outtype, config, tokenizer, generation, expected, recipe.name)
        made |= {"converter": "built in", "tensors": written["tensors"]}
        made["notes"] += written["notes"]
    except NotBuiltIn as reason:
        path.unlink(missing_ok=True)
        convert(converter(recipe, str(reason)), merged, path, outtype)
        made |= {"converter": "llama.cpp"}
        made["notes"].append(f"converted by llama.cpp: {reason}")
    made["outtype"] = outtype
    if "ollama" in made["formats"]:
        text, notes = modelfile(path, tokenizer, generation, recipe.section("generation"))
        (staging / "Modelfile").write_text(text, encoding="utf-8")
        made["notes"] += notes


def _show(made: dict[str, Any]) -> None:
    rows = [
        (name, f"{facts['bytes']:,} bytes, sha256 {facts['sha256'][:16]}…") for name, facts in made["files"].items()
    ]
    console.facts(f"Exported to {made['exports']}", rows)
    for note in made["notes"]:
        console.say(f"note: {note}", "yellow")
    if "ollama" in made["formats"]:
        console.say(f"Next: ollama create NAME -f {made['exports']}/Modelfile")
