"""Fixtures of the data room: recipes on rows that a test writes, and a token cache of each test's own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_recipes.cli import main
from lora_recipes.recipe import Recipe, load_recipe
from tests.data_room.rows import Seen


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def recipe_on(write_recipe: Callable[..., Path], workdir: Path) -> Callable[..., Recipe]:
    """A recipe whose training rows are the given ones (dicts, or raw lines); keywords are `training` keys."""

    def build(rows: list[Any], dataset: dict[str, Any] | None = None, **training: Any) -> Recipe:
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        (workdir / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        keys = {"data_files": {"train": "rows.jsonl"}, "eval_split": None, **(dataset or {})}
        return load_recipe(write_recipe(dataset=keys, training=training))

    return build


@pytest.fixture
def recipe_of(write_recipe: Callable[..., Path], workdir: Path) -> Callable[..., Recipe]:
    """A recipe on one file with the given bytes; keywords are `dataset` keys."""

    def build(
        content: bytes, name: str = "rows.jsonl", training: dict[str, Any] | None = None, **dataset: Any
    ) -> Recipe:
        (workdir / name).write_bytes(content)
        keys = {"data_files": {"train": name}, "eval_split": None, **dataset}
        return load_recipe(write_recipe(dataset=keys, training=training or {}))

    return build


@pytest.fixture
def audit(capsys: pytest.CaptureFixture[str]) -> Callable[[Recipe], Seen]:
    def run(recipe: Recipe) -> Seen:
        capsys.readouterr()
        code = main(["audit", str(recipe.path), "--json"])
        report = json.loads(capsys.readouterr().out)
        if "error" in report:
            assert report["error"]["exit_code"] == code
            return Seen(code, report, report["error"]["message"])
        assert (code == 2) == bool(report["problems"])
        return Seen(code, report, "\n".join(problem["text"] for problem in report["problems"]))

    return run
