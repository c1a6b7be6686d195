"""Is a training step or the tokenisation slower than it was? CPU seconds over those of a fixed loop, against stored ratios.

    make bench-regress                   (exit code 1 where one is slower by more than the tolerance)
    make bench-regress BENCH=--store     (writes benchmarks/ratios.json for this kind of CPU)

The fixed loop multiplies matrices of torch in the same process, on one thread, between the loops that are measured: a
machine that is slower, or busy, is so for both. Of several turns the least counts, which other work can only add to.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from benchmarks import data_preparation, memory, results, steps

FILE = results.ROOT / "benchmarks" / "ratios.json"
TOLERANCE = 0.25
TURNS = 3
PRODUCTS, SIDE = 100, 768  # of the fixed loop
STEPS = 6
ROWS = 2_000
SETTING = {"model": memory.DEMO, "rows": 4, "length": 96}


def slower(found: Mapping[str, float], stored: Mapping[str, float], tolerance: float = TOLERANCE) -> list[str]:
    """What is slower than stored by more than the tolerance; a ratio that is not stored is no reason."""
    return [
        f"{name}: {ratio:.2f}, stored {stored[name]:.2f}: {100 * (ratio / stored[name] - 1):+.0f} %"
        for name, ratio in found.items()
        if name in stored and ratio > stored[name] * (1 + tolerance)
    ]


def reference() -> float:
    """CPU seconds of the fixed loop."""
    import torch

    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(SIDE, SIDE, generator=generator) for _ in range(2))
    out = torch.empty(SIDE, SIDE)
    started = time.process_time()
    for _ in range(PRODUCTS):
        torch.mm(left, right, out=out)
    return time.process_time() - started


def tokenisation() -> float:
    """CPU seconds from `rows.jsonl` here to masked tokens on disk, with a cache that has the unpacked model only."""
    from lora_recipes.data.load import load_data
    from lora_recipes.run_dir import cache_folder

    models, was = cache_folder("models"), os.environ.get("XDG_CACHE_HOME")
    with tempfile.TemporaryDirectory() as cache:
        (Path(cache) / "lora-recipes").mkdir()
        (Path(cache) / "lora-recipes" / "models").symlink_to(models)
        os.environ["XDG_CACHE_HOME"] = cache
        try:
            recipe, tokenizer, ends = data_preparation.tokenizer_and_recipe(Path.cwd())
            started = time.process_time()
            load_data(recipe, tokenizer, ends)
            return time.process_time() - started
        finally:
            del os.environ["XDG_CACHE_HOME"]
            os.environ |= {"XDG_CACHE_HOME": was} if was else {}


def measure() -> dict[str, float]:
    """{"training step", "tokenisation"}: ratios to the fixed loop."""
    import torch

    torch.set_num_threads(1)
    references, tokenisations, trained = [], [], []
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data_preparation.write_rows(folder / "rows.jsonl", ROWS)
        (folder / "training").mkdir()
        recipe = memory.write_recipe(folder / "training", SETTING, memory.DEMO)
        os.chdir(folder)
        try:
            reference()  # libraries warm up
            for _ in range(TURNS):
                references.append(reference())
                tokenisations.append(tokenisation())
                references.append(reference())
                trained += steps.timed(recipe, [f"training.max_steps={STEPS}"])["cpu"]
        finally:
            os.chdir(here)
    fixed = min(references)
    return {"training step": min(trained) / fixed, "tokenisation": min(tokenisations) / fixed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", action="store_true", help="write the ratios for this kind of CPU")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="%(default)s: a quarter slower is too slow")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    if hasattr(os, "sched_setaffinity"):  # training takes all cores that it may, and the fixed loop one
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    from lora_recipes import process

    process.prepare()
    facts = results.machine()
    kind = f"{facts['vendor']}, {'with' if facts['amx'] else 'without'} AMX"
    found = measure()
    kept = json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {}
    stored = kept.get(kind, {}).get("ratios", {})
    for name, ratio in found.items():
        print(f"{name}: {ratio:.2f} of the fixed loop" + (f", stored {stored[name]:.2f}" if name in stored else ""))
    if args.store:
        kept[kind] = {"ratios": found, "cpu": facts["cpu"], "torch": facts["torch"]}
        FILE.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        return
    if not stored:
        sys.exit(f"{FILE.name} has no ratios of a CPU of {kind}; store some with --store")
    complaints = slower(found, stored, args.tolerance)
    sys.exit("\n".join(complaints) if complaints else 0)


if __name__ == "__main__":
    main()
