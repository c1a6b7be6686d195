"""The table of all recipes, planned against common cards, and the files it is written into."""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from lora_recipes.errors import RunError
from lora_recipes.model.targets import find_targets
from lora_recipes.plan.architecture import config_of, facts_of
from lora_recipes.plan.cards import GIB, Target, target_of
from lora_recipes.plan.memory import Estimate
from lora_recipes.plan.method import method_of
from lora_recipes.plan.required import required_on
from lora_recipes.recipe import load_recipe
from lora_recipes.run_dir import write_text

FOLDER = Path("recipes")
# Of cards with the same memory the one with the least of it stands for all.
CARDS = {"T4 16": "t4-16", "3090/4090 24": "rtx4090-24", "A100 40": "a100-40", "A100/H100 80": "h100-80"}
MAIN = "3090/4090 24"
DEMO_LICENCE = "Apache-2.0"  # of SmolLM2-135M-Instruct, which a package carries
# File, and the columns that it shows.
FILES = {
    Path("docs/recipes.md"): ("recipe", "family", "method", "trained", "licence", "needs", *CARDS),
    Path("README.md"): ("recipe", "method", "trained", *CARDS),
    Path("README.zh-CN.md"): ("recipe", "method", "trained", *CARDS),
}
TUTORIAL = ("llama2-7b-qlora", "llama2-13b-qlora")
PLAN_PAGE = Path("docs/plan.md")
HEADS = {"needs": "GiB on 24 GB", "trained": "trained parameters"}


def shipped() -> list[Path]:
    """Every recipe that can be run, in the order of their names.

    Raises:
        RunError: no `recipes` folder here.
    """
    found = sorted(FOLDER.glob("*.yaml"))
    if not found:
        raise RunError(f"{FOLDER.resolve()}: no recipes here; call this in the root of the repository")
    return found


def write_tables() -> list[Path]:
    """Plan every recipe and write the tables between their marks. Returns the files that were written."""
    paths = shipped()
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        rows = list(pool.map(row_of, paths, chunksize=4))
    mark = f"<!-- {digest(paths)} -->"
    files = [file for file in FILES if file.is_file()]
    for file in files:
        columns = FILES[file]
        lines = [
            "| " + " | ".join(HEADS.get(name, name) for name in columns) + " |",
            "|" + "---|" * len(columns),
            *("| " + " | ".join(_shown(row[name], name, file) for name in columns) + " |" for row in rows),
        ]
        write_block(file, "recipes", [*lines, "", mark])
    if PLAN_PAGE.is_file():
        write_block(PLAN_PAGE, "tutorial", tutorial())
        files.append(PLAN_PAGE)
    return files


def _shown(cell: str, column: str, file: Path) -> str:
    if column != "recipe":
        return cell
    return f"[{cell}]({os.path.relpath(FOLDER, file.parent)}/{cell}.yaml)"


def tutorial() -> list[str]:
    """The usual tutorial's claim, that 24 GB are enough for 7B and 13B in 4 bits, at its micro-batch of 4 rows."""
    lines = [
        "| recipe | tokens a row | expected, may come to | fits | largest micro-batch | without checkpointing |",
        "|---|--:|--:|---|--:|--:|",
    ]
    return lines + [tutorial_row(name, length) for name in TUTORIAL for length in (512, 2048, 4096)]


def tutorial_row(name: str, length: int) -> str:
    """One recipe with rows of one length."""
    target = target_of("24GiB", None, None)
    words = ["training.per_device_train_batch_size=4", f"training.max_length={length}"]
    recipe = load_recipe(FOLDER / f"{name}.yaml", [*words, "training.activation_checkpointing=true"])
    config = config_of(recipe)
    estimate = Estimate(recipe, config, target)
    memory = estimate.memory()
    kept = Estimate(recipe.changed({"training.activation_checkpointing": False}), config, target).memory()
    cells = [
        name,
        f"{length:,}",
        f"{memory.expected / GIB:.1f}, {memory.high / GIB:.1f} GiB",
        "yes" if memory.high <= target.memory else "no",
        str(estimate.most_rows()),
        f"{kept.expected / GIB:.1f} GiB",
    ]
    return f"| {' | '.join(cells)} |"


def row_of(path: Path) -> dict[str, str]:
    """The cells of one recipe. A card's cell is the largest micro-batch that fits; in brackets when the recipe asks for
    more, "–" when not even one row fits."""
    recipe = load_recipe(path)
    config = config_of(recipe)
    targets = find_targets(recipe, config)
    facts = facts_of(recipe.get("model.pretrained_model_name_or_path")) or {"licence": DEMO_LICENCE, "gated": False}
    cells = {
        "recipe": path.stem,
        "family": config.model_type,
        "method": method_of(recipe),
        "trained": f"{targets.trainable:,} ({targets.percent:.2f} %)",
        "licence": facts["licence"] + (", gated" if facts["gated"] else ""),
    }
    estimates: dict[str, Estimate] = {}
    for name, card in CARDS.items():
        target = target_of(card, None, None)
        required = required_on(recipe, target)
        key = json.dumps(required)
        if key not in estimates:
            estimates[key] = Estimate(recipe.changed(required), config, target)
        cells[name] = _cell(estimates[key], target)
        if name == MAIN:
            cells["needs"] = f"{estimates[key].memory().expected / GIB:.1f}"
    return cells


def _cell(estimate: Estimate, target: Target) -> str:
    most = estimate.most_rows(target.memory)
    if most == 0:
        return "–"
    return f"{most}" if most >= estimate.rows else f"({most})"


def digest(paths: Sequence[Path]) -> str:
    """What the table was made from: changes with a recipe's model, quantization, lora or training, or a model's facts."""
    parts: list[Any] = []
    for path in paths:
        recipe = load_recipe(path)
        named = recipe.get("model.pretrained_model_name_or_path")
        parts.append([path.name, *(recipe.section(name) for name in ("model", "quantization", "lora", "training"))])
        parts.append(facts_of(named))
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def block_of(file: Path, name: str) -> list[str]:
    """The lines between the marks `<!-- NAME -->` and `<!-- /NAME -->`."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return lines[lines.index(f"<!-- {name} -->") + 1 : lines.index(f"<!-- /{name} -->")]


def write_block(file: Path, name: str, block: Sequence[str]) -> None:
    """Put lines between the marks of a file, in the place of those that are there.

    Raises:
        RunError: the file has no such marks.
    """
    lines = file.read_text(encoding="utf-8").splitlines()
    try:
        first, last = lines.index(f"<!-- {name} -->"), lines.index(f"<!-- /{name} -->")
    except ValueError:
        raise RunError(f"{file}: has no lines <!-- {name} --> and <!-- /{name} --> to write between") from None
    write_text(file, "\n".join([*lines[: first + 1], "", *block, "", *lines[last:]]) + "\n")
