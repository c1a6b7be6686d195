"""`show`: YAML that loads to the same recipe, with what set each value behind it."""

import json
from pathlib import Path

import pytest

from lora_recipes.recipe import Recipe, load_recipe
from lora_recipes.recipe.show import render

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
PARENT = """\
model:
  pretrained_model_name_or_path: org/tiny
lora:
  target_modules: [q_proj, v_proj]
  rank_pattern:
    q_proj: 4
dataset:
  path: json
  data_files: {train: data/a.jsonl}
  split: train
training:
  learning_rate: 2e-5
  max_length: null
  seed: 1
"""


def write(folder: Path, text: str, name: str = "child.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def reloaded(recipe: Recipe, folder: Path) -> Recipe:
    return load_recipe(write(folder, render(recipe), "shown.yaml"))


def line_of(text: str, start: str) -> str:
    [line] = [line for line in text.splitlines() if line.strip().startswith(start)]
    return line


def test_what_is_shown_loads_to_the_same_values(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, PARENT))
    assert reloaded(recipe, tmp_path).plain() == recipe.plain()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_is_shown_as_it_is(tmp_path: Path, path: Path) -> None:
    recipe = load_recipe(path)
    assert reloaded(recipe, tmp_path).plain() == recipe.plain()


@pytest.mark.parametrize(
    "text",
    [
        "2e-4",
        "1234e56",
        "12",
        "012",
        "no",
        "null",
        "true",
        "~",
        "",
        " x ",
        "a # b",
        "a: b",
        "- a",
        "***",
        "日本",
        "a\nb",
    ],
)
def test_a_text_stays_the_text_it_is(tmp_path: Path, text: str) -> None:
    generation = f"generation: {{max_new_tokens: 4, stop_strings: {json.dumps(text)}}}\n"
    recipe = load_recipe(write(tmp_path, PARENT + generation))
    assert recipe.get("generation.stop_strings") == text
    assert reloaded(recipe, tmp_path).plain() == recipe.plain()


@pytest.mark.parametrize("text", ["2e-4", "a\nb", "null", "a, b", "Human: 你好\nAssistant:"])
def test_a_text_in_a_list_stays_the_text_it_is(tmp_path: Path, text: str) -> None:
    generation = f"generation: {{max_new_tokens: 4, prompts: [{json.dumps(text)}]}}\n"
    recipe = load_recipe(write(tmp_path, PARENT + generation))
    assert reloaded(recipe, tmp_path).get("generation.prompts") == [text]


@pytest.mark.parametrize(
    "key", ["[qk]_proj", "*.q_proj", "a: b", "# x", "null", "12", "^model.*q$", "{q,k}", "2e-4", ""]
)
def test_a_key_stays_the_key_it_is(tmp_path: Path, key: str) -> None:
    text = PARENT.replace("    q_proj: 4\n", f"    {json.dumps(key)}: 4\n")
    recipe = load_recipe(write(tmp_path, text))
    assert recipe.get("lora.rank_pattern") == {key: 4}
    assert reloaded(recipe, tmp_path).plain() == recipe.plain()


@pytest.mark.parametrize("value", ["1e-5", "0.1", "1e-12", "1.0"])
def test_a_number_stays_the_number_it_is(tmp_path: Path, value: str) -> None:
    recipe = load_recipe(write(tmp_path, PARENT), [f"training.learning_rate={value}"])
    assert reloaded(recipe, tmp_path).get("training.learning_rate") == float(value)


@pytest.mark.parametrize("override", ["lora.rank_pattern={}", "lora.modules_to_save=[]", "lora.rank_pattern=null"])
def test_an_empty_value_is_shown(tmp_path: Path, override: str) -> None:
    recipe = load_recipe(write(tmp_path, PARENT.replace("    q_proj: 4\n", "")), [override])
    assert reloaded(recipe, tmp_path).plain() == recipe.plain()


def test_an_empty_section_is_shown(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, f"{PARENT}merge: {{}}\n"))
    assert reloaded(recipe, tmp_path).plain() == recipe.plain()


def test_behind_each_value_stands_what_set_it(tmp_path: Path) -> None:
    parent = write(tmp_path, PARENT, "parent.yaml")
    child = write(tmp_path, "extends: parent.yaml\ntraining:\n  seed: 2\n  max_steps: 9\n")
    text = render(load_recipe(child, ["training.max_steps=5", "lora.rank_pattern.k_proj=8"]))
    assert line_of(text, "pretrained_model_name_or_path: org/tiny").endswith(f"# {parent}:2")
    assert line_of(text, "q_proj: 4").endswith(f"# {parent}:6")
    assert line_of(text, "k_proj: 8").endswith("# command line (lora.rank_pattern.k_proj=8)")
    assert line_of(text, "train: data/a.jsonl").endswith(f"# {parent}:9")
    assert line_of(text, "max_length: null").endswith(f"# {parent}:13")
    assert line_of(text, "seed: 2").endswith(f"# {child}:3")
    assert line_of(text, "max_steps: 5").endswith("# command line (training.max_steps=5)")


def test_every_line_but_the_names_of_mappings_has_an_origin(tmp_path: Path) -> None:
    prompts = 'generation:\n  max_new_tokens: 4\n  prompts: ["Human: hello\\nAssistant:"]\n'
    recipe = load_recipe(write(tmp_path, PARENT + prompts))
    for line in render(recipe).splitlines():
        assert line.endswith(":") or "  # " in line


def test_an_override_with_a_line_break_is_still_one_comment(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, PARENT), ['training.run_name="a\n b"'])
    assert reloaded(recipe, tmp_path).plain() == recipe.plain()


def test_a_list_of_sources_is_shown_with_what_set_each_key(tmp_path: Path) -> None:
    write(tmp_path, PARENT, "parent.yaml")
    text = "extends: parent.yaml\ndataset:\n  - path: json\n    data_files: {train: a.jsonl}\n  - path: org/b\n"
    child = write(tmp_path, text)
    recipe = load_recipe(child, ["dataset.1.weight=2"])
    shown = [line.split("  # ") for line in render(recipe).splitlines()]
    start = next(n for n, line in enumerate(shown) if line[0] == "dataset:")
    assert [[part.rstrip() for part in line] for line in shown[start : start + 7]] == [
        ["dataset:"],
        ["  - path: json", f"{child}:3"],
        ["    data_files:"],
        ["      train: a.jsonl", f"{child}:4"],
        ["  - path: org/b", f"{child}:5"],
        ["    weight: 2", "command line (dataset.1.weight=2)"],
        ["training:"],
    ]
    assert reloaded(recipe, tmp_path).plain() == recipe.plain()
