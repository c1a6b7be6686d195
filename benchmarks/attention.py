"""Forward and backward of a CPU's attention as training computes it, against torch's own, for rows of several lengths.

    python -m benchmarks.suite attention

Heads as SmolLM2-135M's, or as Llama-3.2-1B's; one thread; CPU seconds, the least of several runs in turn.
"""

import time
from collections.abc import Callable
from typing import Any

HEADS = {"SmolLM2-135M": (9, 3), "Llama-3.2-1B": (32, 8)}  # heads, key heads; of 64
SIZE = 64
LENGTHS = (64, 200, 512, 1024)
ROUNDS, LEAST = 5, 0.1  # of each in turn; CPU seconds of one


def measure() -> list[dict[str, Any]]:
    """A line for each model, type and length: milliseconds of both, and how far their gradients are from the exact ones."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    from lora_recipes.model.attention import Rows, attend
    from lora_recipes.model.machine import give_memory_back

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    give_memory_back()
    torch.manual_seed(0)
    found = []
    for model, (heads, keys) in HEADS.items():
        for dtype in (torch.float32, torch.bfloat16):
            for length in LENGTHS:
                inputs = [
                    torch.randn(1, length, count, SIZE).to(dtype).transpose(1, 2).requires_grad_()
                    for count in (heads, keys, keys)
                ]
                slope = torch.randn(1, length, heads, SIZE).to(dtype)
                rows = Rows(0, (length,))

                def ours(given: list[torch.Tensor], rows: Rows = rows) -> torch.Tensor:
                    return attend(torch.nn.Module(), *given, None, rows=rows)[0]

                def torchs(given: list[torch.Tensor]) -> torch.Tensor:  # as transformers calls it
                    return scaled_dot_product_attention(*given, is_causal=True, enable_gqa=True).transpose(1, 2)

                exact = [one.detach().double().requires_grad_() for one in inputs]
                wanted = torch.autograd.grad(torchs(exact), exact, slope.double())
                line: dict[str, Any] = {"model": model, "dtype": str(dtype).removeprefix("torch."), "tokens": length}
                ways = {"ours": ours, "torch": torchs}
                for name, ms in _in_turn(ways, inputs, slope).items():
                    gradients = torch.autograd.grad(ways[name](inputs), inputs, slope)
                    far = sum((one - other).norm() ** 2 for one, other in zip(gradients, wanted, strict=True))
                    line[name] = {"ms": ms, "far": float((far / sum(one.norm() ** 2 for one in wanted)) ** 0.5)}
                found.append(line)
    torch.set_num_threads(threads)
    return found


def _in_turn(ways: dict[str, Callable[[Any], Any]], inputs: Any, slope: Any) -> dict[str, float]:
    """Milliseconds of CPU time of each way, the least of all rounds."""
    import torch

    best = dict.fromkeys(ways, float("inf"))
    for _ in range(ROUNDS):
        for name, way in ways.items():
            count, started = 0, time.process_time()
            while (spent := time.process_time() - started) < LEAST:
                torch.autograd.grad(way(inputs), inputs, slope)
                count += 1
            best[name] = min(best[name], 1000 * spent / count)
    return best


def markdown(figures: list[dict[str, Any]]) -> list[str]:
    """The section's table."""
    from benchmarks import results

    heads = ["heads of", "type", "tokens", "torch ms", "ours ms", "ours / torch", "torch's error", "our error"]
    body = [
        [
            line["model"],
            line["dtype"].replace("bfloat16", "bf16"),
            f"{line['tokens']:,}",
            *(f"{line[name]['ms']:.2f}" for name in ("torch", "ours")),
            f"{line['ours']['ms'] / line['torch']['ms']:.2f}",
            *(f"{line[name]['far']:.1e}" for name in ("torch", "ours")),
        ]
        for line in figures
    ]
    told = "The error is the distance of all gradients from those of float64, over their size."
    return [*results.table(heads, body, 2), "", told]
