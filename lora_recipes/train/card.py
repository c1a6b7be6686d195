"""The model card of an adapter: only what the run's own records say."""

import math
from collections.abc import Iterator
from typing import Any

import yaml

from lora_recipes.model.identity import Base, portable
from lora_recipes.plan.method import method_in_full
from lora_recipes.recipe import Recipe
from lora_recipes.run_dir import RunDir, read_json, read_jsonl

LOAD = """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained({base!r})
model = PeftModel.from_pretrained(base, "PATH_TO_THIS_FOLDER")
```"""


def card(recipe: Recipe, run_dir: RunDir, base: Base) -> str:
    """README.md of the adapter folder. The base's licence holds for the adapter as well, and is not guessed here."""
    manifest, status, lines = read_json(run_dir.manifest), read_json(run_dir.status), read_jsonl(run_dir.metrics)
    head: dict[str, Any] = {"library_name": "peft", "tags": ["lora", "sft", "trl"], "pipeline_tag": "text-generation"}
    if "/" in base.name and not base.name.startswith((".", "package:")):
        head["base_model"] = base.name
    told = [
        (
            "Base",
            f"{base.name}{f' at {base.revision}' if base.revision else ''}, weights sha256 `{base.weights_sha256}`",
        ),
        ("Method", method_in_full(recipe)),
        ("Steps", f"{status.get('step')} of {status.get('max_steps')}, seed {manifest.get('seed')}"),
        ("Loss", _losses(lines)),
        ("Data", ", ".join(_files(manifest.get("data", {})))),
        ("Chat template", f"sha256 `{manifest.get('chat_template_sha256')}`"),
        ("Made with", ", ".join(f"{name} {found}" for name, found in manifest.get("versions", {}).items())),
    ]
    rows = "\n".join(f"| {name} | {value or 'not recorded'} |" for name, value in told)
    return (
        f"---\n{yaml.safe_dump(head, sort_keys=True)}---\n\n# {recipe.name}\n\n"
        f"A LoRA adapter, fine-tuned with the recipe `{recipe.path.name}`. It belongs to the base below and to no other of "
        f"the same shape. Licence: that of the base and of the data.\n\n| | |\n|---|---|\n{rows}\n\n"
        f"{LOAD.format(base=base.name)}\n\n"
        "What the adapter can do was not measured when this card was written; see evaluation.json and parity.json of the "
        "run.\n"
    )


def _files(data: dict[str, str]) -> Iterator[str]:
    """Data files as they may be called elsewhere."""
    for name, digest in data.items():
        yield f"`{portable(name)}` (sha256 `{digest[:12]}`)"


def _losses(lines: list[dict[str, Any]]) -> str | None:
    """First and last losses of training; rows written as text are not finite and stay out."""
    losses = [line["loss"] for line in lines if isinstance(line.get("loss"), float) and math.isfinite(line["loss"])]
    return f"{losses[0]:.4f} at the first record, {losses[-1]:.4f} at the last" if losses else None
