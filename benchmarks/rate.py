"""How many products of numbers a second the machine's own matrix product makes: the limit of any training step.

    python -m benchmarks.rate float32

The best of many products of the demo model's shapes, in a process of as many threads as it may use cores.
"""

import json
import os
import subprocess
import sys
import time

from benchmarks.results import ROOT

SHAPES = ((256, 576, 1536), (256, 1536, 576), (512, 576, 576), (64, 576, 49152))  # tokens x in x out, of SmolLM2-135M
SECONDS = 2.0  # of each shape


def flops_per_token(body: int, head: int, adapter: int, supervised_share: float) -> float:
    """Floating-point operations that a real token of LoRA training needs, without attention's scores.

    A frozen weight is multiplied in the forward and for the gradient of its input (2 operations each); the head only where
    a token is supervised; an adapter's weight also for its own gradient.
    """
    return 4 * body + 4 * head * supervised_share + 6 * adapter


def measured(dtype: str, cores: int) -> float:
    """Operations per second of the best product, in a process of its own."""
    threads = {"OMP_NUM_THREADS": str(cores), "MKL_NUM_THREADS": str(cores), "CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, "-m", "benchmarks.rate", dtype, str(cores)]
    done = subprocess.run(words, cwd=ROOT, env=os.environ | threads, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)["best"]


def main() -> None:
    dtype, cores = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 1
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    import torch

    torch.set_num_threads(cores)
    found = {}
    for rows, inner, columns in SHAPES:
        left = torch.randn(rows, inner).to(getattr(torch, dtype))
        right = torch.randn(columns, inner).to(getattr(torch, dtype))  # as a Linear's weight lies
        out = torch.empty(rows, columns, dtype=left.dtype)
        best, until = float("inf"), time.perf_counter() + SECONDS
        while time.perf_counter() < until:
            started = time.perf_counter()
            torch.mm(left, right.T, out=out)
            best = min(best, time.perf_counter() - started)
        found[f"{rows}x{inner}x{columns}"] = 2 * rows * inner * columns / best
    print(json.dumps({"best": max(found.values()), "shapes": found}))


if __name__ == "__main__":
    main()
