"""The tables of all recipes are those that `make table` would write now."""

from pathlib import Path

import pytest

from lora_recipes.errors import RunError
from lora_recipes.plan.method import method_of
from lora_recipes.plan.table import (
    CARDS,
    FILES,
    block_of,
    digest,
    row_of,
    shipped,
    tutorial_row,
    write_block,
)
from lora_recipes.recipe import load_recipe
from tests.conftest import ROOT

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("file", FILES, ids=str)
def test_the_table_is_current(file: Path):
    block = block_of(file, "recipes")
    rows = {line.split("[")[1].split("]")[0]: line for line in block if line.startswith("| [")}
    assert list(rows) == [path.stem for path in RECIPES]
    assert f"<!-- {digest(shipped())} -->" in block, "a recipe or a model's facts changed: make table"


@pytest.mark.parametrize("name", ["smollm2-135m-lora", "llama2-7b-qlora", "qwen3-0.6b-lora"])
def test_rows_are_what_is_planned_now(name: str):
    row = row_of(Path("recipes") / f"{name}.yaml")
    line = next(line for line in block_of(Path("docs/recipes.md"), "recipes") if f"[{name}]" in line)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    shown = [row[column] for column in FILES[Path("docs/recipes.md")]]
    assert cells[1:] == shown[1:], "the plan changed: make table"


def test_the_tutorials_claim_is_answered_for_both_sizes_and_three_lengths():
    lines = [line for line in block_of(Path("docs/plan.md"), "tutorial") if line.startswith("| llama2")]
    assert len(lines) == 6
    assert tutorial_row("llama2-7b-qlora", 2048) in lines, "the plan changed: make table"


def test_each_method_has_its_name():
    assert method_of(load_recipe("recipes/smollm2-135m-qlora.yaml")) == "QLoRA"
    assert method_of(load_recipe("recipes/smollm2-135m-lora.yaml", ["lora.use_dora=true"])) == "DoRA"


def test_a_model_that_is_too_large_for_every_card_says_so():
    row = row_of(Path("recipes/mixtral-8x7b-lora.yaml"))
    assert [row[card] for card in CARDS] == ["–"] * len(CARDS) and "gated" not in row["licence"]


def test_a_block_is_written_between_its_marks_and_nowhere_else(tmp_path: Path):
    file = tmp_path / "page.md"
    file.write_text("before\n<!-- a -->\nold\n<!-- /a -->\nafter\n", encoding="utf-8")
    write_block(file, "a", ["new"])
    assert file.read_text(encoding="utf-8") == "before\n<!-- a -->\n\nnew\n\n<!-- /a -->\nafter\n"
    write_block(file, "a", ["newer"])
    assert block_of(file, "a") == ["", "newer", ""]
    with pytest.raises(RunError, match="has no lines <!-- b -->"):
        write_block(file, "b", [])


def test_without_recipes_it_says_where_to_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match="in the root of the repository"):
        shipped()
