"""Fixtures of the data room: recipes on rows that a test writes, and a token cache of each test's own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_recipes.recipe import Recipe, load_recipe


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
