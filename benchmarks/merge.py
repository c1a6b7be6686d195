"""Time and memory of a streaming merge: against copying the same files, and against PEFT's merge in memory.

    make bench-merge                        Llama-2-7B's shape, fp16, 13.5 GB; needs 28 GB of disk
    make bench-merge BENCH="--layers 4"     a smaller one

Makes a model with random weights and an adapter of rank 16 on all linear layers, merges it, deletes both. Prints Markdown.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

LLAMA2_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "dtype": "float16",
}
SHARD = 5 * 10**9  # bytes
RANK = 16


def make_base(folder: Path, layers: int) -> None:
    """A Llama in shards of 5 GB, each tensor cut out of one block of random numbers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from lora_recipes.merge.checkpoint import INDEX, header_bytes

    folder.mkdir()
    config = LlamaConfig(num_hidden_layers=layers, **LLAMA2_7B)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).half()
    shards: list[list[tuple[str, torch.dtype, tuple[int, ...]]]] = [[]]
    size = 0
    for name, tensor in model.state_dict().items():
        if size + tensor.nbytes > SHARD and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append((name, tensor.dtype, tuple(tensor.shape)))
        size += tensor.nbytes
    torch.manual_seed(0)
    block = (torch.randn(2**24) * 0.02).half().numpy()
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        title = f"model-{number:05}-of-{len(shards):05}.safetensors"
        with (folder / title).open("wb") as stream:
            stream.write(header_bytes(shard))
            for name, _, shape in shard:
                weight_map[name] = title
                left = int(torch.Size(shape).numel())
                while left:
                    stream.write(block[: min(left, len(block))])
                    left -= min(left, len(block))
            os.fsync(stream.fileno())
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def make_adapter(base: Path, folder: Path) -> None:
    """An adapter of rank 16 on all linear layers, as PEFT saves it."""
    import torch
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    config = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    adapted = get_peft_model(model, config)
    torch.manual_seed(1)
    tensors = {
        name: torch.randn(tensor.shape) * 0.01
        for name, tensor in get_peft_model_state_dict(adapted, save_embedding_layers=False).items()
    }
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config.inference_mode = True
    config.save_pretrained(str(folder))


def peak_of(process: str = "self") -> int:
    """Most memory held since it was last reset, bytes."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024


def stream(base: Path, adapter: Path, target: Path) -> None:
    """Our merge, without the proof, which loads the model."""
    from lora_recipes.merge.weights import plan_weights, write_weights
    from lora_recipes.model.machine import Choices
    from lora_recipes.model.source import Source
    from lora_recipes.recipe import Recipe

    sections: dict[str, Any] = {
        "model": MappingProxyType({"pretrained_model_name_or_path": str(base)}),
        "lora": MappingProxyType({}),
        "merge": MappingProxyType({"dtype": "float16"}),
    }
    recipe = Recipe(target.with_suffix(".yaml"), MappingProxyType(sections), MappingProxyType({}))
    planned = plan_weights(recipe, Source("folder", str(base), str(base)), Choices({}, {}, "cpu"), adapter)
    target.mkdir(exist_ok=True)
    write_weights(planned, target)


def memory(base: Path, adapter: Path, target: Path) -> None:
    """PEFT's merge of the loaded model."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float16)
    merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    merged.save_pretrained(target, max_shard_size=SHARD)
    _sync(target)


def copy(base: Path, adapter: Path, target: Path) -> None:
    """The physical limit: the same bytes read and written."""
    target.mkdir(exist_ok=True)
    subprocess.run(["cp", *map(str, base.glob("*.safetensors")), str(target)], check=True)
    _sync(target)


def _sync(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


WAYS = {"stream": stream, "memory": memory, "copy": copy}


def child(way: str, base: Path, adapter: Path, target: Path) -> None:
    """One merge in this process; prints its seconds and its peak above what the imports took."""
    from lora_recipes import process

    process.prepare()
    if way != "copy":
        import lora_recipes.merge.weights  # noqa: F401 - what everybody pays
    before = peak_of()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak (man 5 proc)
    started = time.perf_counter()
    WAYS[way](base, adapter, target)
    seconds = time.perf_counter() - started
    sys.stdout.write(json.dumps({"seconds": seconds, "imports": before, "peak": peak_of()}) + "\n")


def run(way: str, base: Path, adapter: Path, target: Path) -> dict[str, float]:
    """One way in a process of its own, into an empty place."""
    shutil.rmtree(target, ignore_errors=True)
    command = [sys.executable, __file__, "--child", way, "--at", str(base), str(adapter), str(target)]
    ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(ended.stdout.splitlines()[-1])


def sums(folder: Path) -> dict[str, str]:
    from lora_recipes.run_dir import file_sha256

    return {file.name: file_sha256(file) for file in sorted(folder.glob("*.safetensors"))}


def tensors(folder: Path) -> dict[str, str]:
    """sha256 of each tensor's bytes: files may hold them in another order."""
    import torch

    from lora_recipes.merge.checkpoint import Files, read_checkpoint

    with Files() as files:
        return {
            name: hashlib.sha256(memoryview(files.read(stored).view(-1).view(torch.uint8).numpy())).hexdigest()
            for name, stored in sorted(read_checkpoint(folder).tensors.items())
        }


def killed(base: Path, adapter: Path, target: Path, seconds: float, times: int) -> int:
    """Kill a merge at random moments until it has died `times` times, then let it finish. Returns the deaths seen."""
    shutil.rmtree(target, ignore_errors=True)
    command = [sys.executable, __file__, "--child", "stream", "--at", str(base), str(adapter), str(target)]
    deaths = 0
    draw = random.Random(0)
    for _ in range(times):
        running = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            running.wait(timeout=draw.uniform(0, 1.2 * seconds))
        except subprocess.TimeoutExpired:
            running.send_signal(signal.SIGKILL)
            running.wait()
            deaths += 1
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return deaths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--no-memory", action="store_true", help="leave PEFT's merge in memory out")
    parser.add_argument("--folder", type=Path, help="where to work; unset: a temporary folder here")
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--at", nargs=3, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, *args.at)
        return
    found = measure(
        args.layers,
        args.pairs,
        kills=args.kills,
        with_memory=not args.no_memory,
        folder=args.folder,
        say=sys.stderr.write,
    )
    print("\n".join(markdown(found)))


def measure(
    layers: int,
    pairs: int = 3,
    *,
    kills: int = 0,
    with_memory: bool = True,
    folder: Path | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> dict[str, Any]:
    """The runs of each way, seconds and bytes, and what was found of sameness: {"bytes", "ways": {way: [run]}, "ratios" …}."""
    with tempfile.TemporaryDirectory(dir=folder or Path.cwd(), prefix=".bench-merge-") as name:
        place = Path(name)
        base, adapter, target = place / "base", place / "adapter", place / "merged"
        make_base(base, layers)
        make_adapter(base, adapter)
        size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
        say(f"base: {size / 1e9:.2f} GB\n")
        ways: dict[str, list[dict[str, float]]] = {"stream": [], "copy": []}
        ours: dict[str, str] = {}
        of_ours: dict[str, str] = {}
        for pair in range(pairs):
            for way in ("stream", "copy") if pair % 2 else ("copy", "stream"):
                ways[way].append(run(way, base, adapter, target))
                say(f"{way}: {ways[way][-1]}\n")
                if way == "stream":
                    ours = sums(target)
                    of_ours = of_ours or (tensors(target) if with_memory else {})
                shutil.rmtree(target)
        found: dict[str, Any] = {"bytes": size, "layers": layers, "ways": ways}
        found["ratios"] = [
            mine["seconds"] / theirs["seconds"] for mine, theirs in zip(ways["stream"], ways["copy"], strict=True)
        ]
        if with_memory:
            ways["memory"] = [run("memory", base, adapter, target)]
            found["same_as_memory"] = tensors(target) == of_ours
            shutil.rmtree(target)
        if kills:
            seconds = statistics.median(mine["seconds"] for mine in ways["stream"])
            deaths = killed(base, adapter, target, seconds, kills)
            found["killed"] = {"deaths": deaths, "tries": kills, "same": sums(target) == ours}
        return found


def markdown(found: dict[str, Any]) -> list[str]:
    """The figures as a table and what else was found."""
    lines = [f"{found['bytes'] / 1e9:.2f} GB, {found['layers']} layers, fp16, rank {RANK} on all linear layers", ""]
    lines += ["| way | seconds (median) | peak above imports, MB |", "|---|--:|--:|"]
    for way, runs in found["ways"].items():
        seconds = statistics.median(run["seconds"] for run in runs)
        peak = max(run["peak"] - run["imports"] for run in runs) / 1e6
        lines.append(f"| {way} | {seconds:.1f} | {peak:,.0f} |")
    ratios = found["ratios"]
    each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    lines += ["", f"stream / copy, median of {len(ratios)} pairs: {statistics.median(ratios):.2f} ({each})"]
    if "same_as_memory" in found:
        lines += ["", f"tensors equal to those of PEFT in memory, bit for bit: {found['same_as_memory']}"]
    if "killed" in found:
        told = found["killed"]
        lines += [
            "",
            f"killed {told['deaths']} times of {told['tries']} tries, then finished: same sha256: {told['same']}",
        ]
    return lines


if __name__ == "__main__":
    main()
