"""Where the suite keeps what it measured: one JSON file by section, each with the machine that it was taken on."""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "benchmarks" / "results.json"
PAGE = ROOT / "docs" / "performance.md"
Row = dict[str, Any]


def machine() -> Row:
    """What a figure depends on, without importing torch."""
    path = Path("/proc/cpuinfo")
    facts = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    named, vendor, family, model = (
        next((line.partition(":")[2].strip() for line in facts if line.startswith(what)), "")
        for what in ("model name", "vendor_id", "cpu family", "model\t")
    )
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": named or platform.processor() or platform.machine(),
        "vendor": vendor,
        "generation": f"family {family}, model {model}" if family else "",  # a cloud's model name does not tell
        "cores": os.cpu_count(),
        "cores_allowed": allowed,
        "amx": any("amx_bf16" in line.split() for line in facts if line.startswith("flags")),
        "torch": importlib.metadata.version("torch"),
    }


def card() -> str:
    """Name, driver and memory of the GPU that is measured, as its own tool says."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    words = ["nvidia-smi", f"--id={visible}", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown (no nvidia-smi)"
    return done.stdout.splitlines()[0]


def begun(command: str) -> Row:
    """The facts of a section that is about to be measured."""
    return machine() | {"date": _now(), "commit": _commit(), "command": command, "load_before": os.getloadavg()[0]}


def ended(facts: Row) -> Row:
    """The same facts, when it was measured."""
    return facts | {"load_after": os.getloadavg()[0], "ended": _now()}


def described(facts: Row) -> str:
    """The facts in one line of Markdown."""
    generation = f" ({facts['generation']})" if facts.get("generation") else ""
    amx = "with AMX" if facts["amx"] else "without AMX"
    load = f"load {facts['load_before']:.1f} before" + (
        f", {facts['load_after']:.1f} after" if "load_after" in facts else ""
    )
    return (
        f"{facts['cpu']}{generation} {amx}, {facts['cores']} cores, {facts['cores_allowed']} of them allowed; torch {facts['torch']}; "
        f"{load}; {facts['date']}, commit {facts['commit']}: `{facts['command']}`"
    )


def read(file: Path = FILE) -> dict[str, Row]:
    """All sections; none where nothing was measured yet."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def kept_here(section: str, facts: Row, file: Path = FILE) -> Row:
    """A section as far as it was measured on this machine: figures of two machines stand in no table together."""
    found = read(file).get(section, {})
    keys = ("cpu", "generation", "cores", "amx", "torch", "gpu")
    same = found and all(found["machine"].get(key) == facts.get(key) for key in keys)
    return found if same else {}


def keep(section: str, found: Row, file: Path = FILE) -> None:
    """Put a section in the place of its last figures; the others stay as they are."""
    kept = read(file) | {section: found}
    beside = file.with_suffix(".new")
    beside.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    beside.replace(file)


def with_row(rows: Sequence[Row], row: Row, keys: Sequence[str]) -> list[Row]:
    """The rows with one more, which takes the place of those it measures anew.

    Rows with the same keys are rounds of one measurement: a first round replaces them all, a later one only its own.
    """

    def replaced(old: Row) -> bool:
        same = all(old.get(key) == row.get(key) for key in keys)
        return same and (row["round"] == 1 or old["round"] == row["round"])

    return [*(old for old in rows if not replaced(old)), row]


def publish(section: str, lines: Sequence[str], page: Path = PAGE) -> None:
    """Write a section's tables between its marks."""
    from lora_recipes.plan.table import write_block

    write_block(page, section, lines)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """A Markdown table, whose first columns are words and all others figures."""
    rule = ["---"] * left + ["--:"] * (len(heads) - left)
    return [
        "| " + " | ".join(heads) + " |",
        "|" + "|".join(rule) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes")


def _commit() -> str:
    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "lora_recipes", "benchmarks/*.py", "run.py")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if changed else "")
