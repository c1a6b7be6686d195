"""How cost grows: with rows to prepare, with the length of a row, with the size of the model, with processes.

    .venv/bin/python -m benchmarks.suite scaling --only rows length          (of rows, length, model, processes, compiled)

Training is in float32 on rows that are exactly as long as said, all positions but the first tenth supervised. Each figure is
taken in a process of its own, the least of its steps. The exponent is the slope of a straight line through the logarithms.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import data_preparation, memory, results
from benchmarks.peers.run import HERE as PEERS
from benchmarks.peers.trace import figures
from benchmarks.results import ROOT, Row

ROWS = (1_000, 10_000, 100_000)
LENGTHS = (64, 128, 256, 512, 1024, 2048)
TOKENS = 2048  # of a step, whatever the length of its rows
MODELS = (memory.DEMO, memory.LLAMA, memory.LLAMA_1B)
NAMES = {memory.DEMO: "SmolLM2-135M", memory.LLAMA: "Llama-364M", memory.LLAMA_1B: "Llama-1.07B"}
STEPS = 4  # the first is not counted
PROCESS_STEPS = 8


def slope(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The exponent of growth: of the straight line that fits the logarithms best."""
    x, y = [math.log(size) for size in sizes], [math.log(cost) for cost in costs]
    middle, height = sum(x) / len(x), sum(y) / len(y)
    spread = sum((one - middle) ** 2 for one in x)
    return sum((one - middle) * (other - height) for one, other in zip(x, y, strict=True)) / spread


def rows(folder: Path) -> Row:
    """Seconds to prepare so many rows."""
    found = []
    for count in ROWS:
        file = folder / f"{count}.jsonl"
        data_preparation.write_rows(file, count)
        took = data_preparation.measured("ours", file, folder / f"prepared-{count}")
        found.append({"rows": count, "seconds": took["seconds"], "tokens": took["tokens"], "peak": took["peak"]})
    return _grown(found, "rows", "seconds")


def length(folder: Path) -> Row:
    """CPU seconds of a row, by its length; a step has always as many tokens."""
    found = []
    for size in LENGTHS:
        took = _training(
            folder / str(size), {"model": memory.DEMO, "rows": TOKENS // size, "length": size}, memory.DEMO
        )
        found.append({"length": size, "cpu_per_token": took / TOKENS, "cpu_per_row": took * size / TOKENS})
    return _grown(found, "length", "cpu_per_row")


def model(folder: Path) -> Row:
    """CPU seconds of a token, by the size of the model."""
    found = []
    for name in MODELS:
        made = name
        if name in memory.LLAMAS:
            made = str(memory.make_llama(folder / name, "float32", memory.LLAMAS[name]))
        rows, tokens = 2, 2 * 256
        took = _run(folder / f"of-{NAMES[name]}", {"model": name, "rows": rows, "length": tokens // rows}, made)
        found.append(
            {"model": NAMES[name], "parameters": took["parameters"], "cpu_per_token": min(took["cpu"]) / tokens}
        )
    return _grown(found, "parameters", "cpu_per_token")


def processes(folder: Path) -> Row:
    """Rows per second of one process on one core and of two on two, each with its own micro-batch of 4 x 256 tokens."""
    found = []
    cores = len(os.sched_getaffinity(0))
    for count in (1, 2):
        own = folder / f"processes-{count}"
        own.mkdir()
        setting = {"model": memory.DEMO, "rows": 4, "length": 256}
        recipe, steps = memory.write_recipe(own, setting, memory.DEMO), own / "steps.jsonl"
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
        words += [str(ROOT / "run.py"), str(recipe), f"training.max_steps={PROCESS_STEPS}"]
        clock = [sys.executable, "-I", "-S", str(PEERS / "clock.py"), str(own / "took.json"), str(count)]
        given = os.environ | {
            "OMP_NUM_THREADS": "1",
            "BENCH_TRACE": str(steps),
            "PYTHONPATH": os.pathsep.join([str(PEERS / "hook"), str(ROOT)]),
        }
        done = subprocess.run([*clock, *words], cwd=own, env=given, capture_output=True, text=True, check=False)
        if not steps.is_file():
            raise RuntimeError(f"{count} processes: {done.stderr[-3000:]}")
        took = figures(steps, None)["seconds_per_step"]
        found.append(
            {
                "processes": count,
                "cores": min(count, cores),
                "seconds_per_step": took,
                "rows_per_second": 4 * count / took,
            }
        )
    return _grown(found, "processes", "rows_per_second")


def compiled(folder: Path) -> Row:
    """CPU seconds of a step with and without `torch_compile`, and what compiling takes; rows of 2 x 256 tokens."""
    found = []
    for bf16 in (False, True):
        setting = {"model": memory.DEMO, "rows": 2, "length": 256, "bf16": bf16}
        plain, made = (
            _run(folder / f"{bf16}-{name}", setting, memory.DEMO, f"training.torch_compile={name}")
            for name in ("false", "true")
        )
        step, faster = statistics.median(plain["cpu"]), statistics.median(made["cpu"])
        compiling = made["first_cpu"] - plain["first_cpu"]
        found.append({"bf16": bf16, "plain": step, "compiled": faster, "compiling": compiling})
    return {"figures": found}


PARTS: dict[str, Callable[[Path], Row]] = {
    "rows": rows,
    "length": length,
    "model": model,
    "processes": processes,
    "compiled": compiled,
}


def measure(parts: Sequence[str] | None, keep: Callable[[Row], None]) -> None:
    """The parts, each handed over as {name: figures} when it is taken."""
    for name in parts or PARTS:
        with tempfile.TemporaryDirectory() as folder:
            keep({name: PARTS[name](Path(folder))})


def markdown(found: dict[str, Row]) -> list[str]:
    """A table of each part."""
    lines: list[str] = []
    if "rows" in found:
        lines += ["**Preparing rows**", ""]
        lines += results.table(
            ["rows", "tokens", "s", "rows/s", "peak MB"],
            [
                [
                    f"{one['rows']:,}",
                    f"{one['tokens']:,}",
                    f"{one['seconds']:.2f}",
                    f"{one['rows'] / one['seconds']:,.0f}",
                    f"{one['peak'] / 1e6:,.0f}",
                ]
                for one in found["rows"]["figures"]
            ],
        )
        lines += ["", f"Exponent of seconds by rows: {found['rows']['exponent']:.2f}.", ""]
    if "length" in found:
        lines += [f"**Tokens a row** (SmolLM2-135M, {TOKENS:,} tokens a step)", ""]
        lines += results.table(
            ["tokens a row", "ms CPU a token", "ms CPU a row"],
            [
                [f"{one['length']:,}", f"{1e3 * one['cpu_per_token']:.2f}", f"{1e3 * one['cpu_per_row']:,.0f}"]
                for one in found["length"]["figures"]
            ],
        )
        exponent = found["length"]["exponent"]
        lines += ["", f"Exponent of a row's cost by its length: {exponent:.2f} (attention is in it).", ""]
    if "model" in found:
        lines += ["**Model** (2 rows of 256 tokens a step)", ""]
        lines += results.table(
            ["model", "parameters", "ms CPU a token"],
            [
                [one["model"], f"{one['parameters']:,}", f"{1e3 * one['cpu_per_token']:.2f}"]
                for one in found["model"]["figures"]
            ],
        )
        lines += ["", f"Exponent of a token's cost by parameters: {found['model']['exponent']:.2f}.", ""]
    if "processes" in found:
        lines += ["**Processes** (each on a core, 4 rows of 256 tokens)", ""]
        lines += results.table(
            ["processes", "cores", "s a step", "rows/s"],
            [
                [
                    str(one["processes"]),
                    str(one["cores"]),
                    f"{one['seconds_per_step']:.2f}",
                    f"{one['rows_per_second']:.2f}",
                ]
                for one in found["processes"]["figures"]
            ],
        )
        exponent = found["processes"]["exponent"]
        lines += ["", f"Exponent of rows per second by processes: {exponent:.2f} (1: twice as many).", ""]
    if "compiled" in found:
        lines += ["**`training.torch_compile: true`** (SmolLM2-135M, 2 rows of 256 tokens a step)", ""]
        lines += results.table(
            ["computes in", "CPU s a step", "compiled", "faster", "CPU s to compile", "paid back after steps"],
            [
                [
                    "bf16" if one["bf16"] else "float32",
                    f"{one['plain']:.2f}",
                    f"{one['compiled']:.2f}",
                    f"{one['plain'] / one['compiled']:.2f} ×",
                    f"{one['compiling']:.0f}",
                    f"{math.ceil(saved)}" if (saved := _pays_back(one)) else "never",
                ]
                for one in found["compiled"]["figures"]
            ],
        )
        lines += [""]
    return lines[:-1]


def _pays_back(one: Row) -> float | None:
    """Steps after which compiling has taken less than it has saved."""
    saved = one["plain"] - one["compiled"]
    return one["compiling"] / saved if saved > 0 else None


def _grown(found: list[Row], size: str, cost: str) -> Row:
    return {"figures": found, "exponent": slope([one[size] for one in found], [one[cost] for one in found])}


def _training(folder: Path, setting: dict[str, Any], model: str) -> float:
    return min(_run(folder, setting, model)["cpu"])


def _run(folder: Path, setting: dict[str, Any], model: str, *settings: str) -> Row:
    """`steps.timed` of a setting of benchmarks/memory.py, in a fresh process."""
    folder.mkdir()
    recipe = memory.write_recipe(folder, setting, model)
    words = [sys.executable, "-m", "benchmarks.scaling", str(recipe), f"training.max_steps={STEPS}", *settings]
    given = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, cwd=folder, env=given, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{setting}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    from benchmarks.steps import timed

    print(json.dumps(timed(Path(sys.argv[1]), sys.argv[2:])))
