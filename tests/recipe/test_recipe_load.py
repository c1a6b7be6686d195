"""Resolving a recipe: `extends`, overrides, and the immutable `Recipe` that comes out."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from lora_recipes.errors import EXIT_USER
from lora_recipes.recipe import InvalidRecipe, Recipe, load_recipe

PARENT = """\
model:
  pretrained_model_name_or_path: org/tiny
quantization:
  load_in_4bit: true
lora:
  r: 16
  target_modules: [q_proj, v_proj]
  rank_pattern: {q_proj: 4, k_proj: 2}
dataset:
  path: org/data
  split: train
training:
  learning_rate: 2e-4
  seed: 1
"""


def write(folder: Path, text: str, name: str = "child.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def load(folder: Path, child: str, *overrides: str) -> Recipe:
    write(folder, PARENT, "parent.yaml")
    return load_recipe(write(folder, child), overrides)


def refusal(path: str | Path, *overrides: str) -> str:
    with pytest.raises(InvalidRecipe) as raised:
        load_recipe(path, overrides)
    assert raised.value.exit_code == EXIT_USER
    return str(raised.value)


def test_a_recipe_without_a_parent_is_what_the_file_says(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, PARENT))
    assert list(recipe.plain()) == ["model", "quantization", "lora", "dataset", "training"]
    assert recipe.get("training.learning_rate") == 0.0002


def test_an_empty_child_is_its_parent(tmp_path: Path) -> None:
    recipe = load(tmp_path, "extends: parent.yaml\n")
    assert recipe.plain() == load_recipe(tmp_path / "parent.yaml").plain()


def test_extends_itself_is_no_value_of_the_recipe(tmp_path: Path) -> None:
    assert "extends" not in load(tmp_path, "extends: parent.yaml\n").values


def test_mappings_merge_key_by_key_at_every_depth(tmp_path: Path) -> None:
    recipe = load(tmp_path, "extends: parent.yaml\nlora:\n  lora_alpha: 8\n  rank_pattern: {k_proj: 3, v_proj: 5}\n")
    assert recipe.section("lora") == {
        "r": 16,
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"q_proj": 4, "k_proj": 3, "v_proj": 5},
        "lora_alpha": 8,
    }


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("lora: {r: 8}", "lora.r", 8),
        ("lora: {target_modules: [o_proj]}", "lora.target_modules", ["o_proj"]),
        ("lora: {target_modules: all-linear}", "lora.target_modules", "all-linear"),
        ("lora: {rank_pattern: null}", "lora.rank_pattern", None),
    ],
)
def test_a_list_or_a_scalar_or_null_replaces(tmp_path: Path, line: str, key: str, value: object) -> None:
    recipe = load(tmp_path, f"extends: parent.yaml\n{line}\n")
    assert recipe.get(key) == value


def test_a_null_key_stays_a_value(tmp_path: Path) -> None:
    recipe = load(tmp_path, "extends: parent.yaml\ntraining: {max_length: null}\n")
    assert recipe.section("training") == {"learning_rate": 0.0002, "seed": 1, "max_length": None}


@pytest.mark.parametrize("null", ["null", "~", ""])
def test_a_null_section_is_dropped(tmp_path: Path, null: str) -> None:
    recipe = load(tmp_path, f"extends: parent.yaml\nquantization: {null}\n")
    assert "quantization" not in recipe.values
    assert recipe.section("quantization") == {}


def test_a_dropped_section_can_be_set_anew_further_down(tmp_path: Path) -> None:
    write(tmp_path, "extends: parent.yaml\nquantization: null\n", "middle.yaml")
    recipe = load(tmp_path, "extends: middle.yaml\nquantization: {load_in_8bit: true}\n")
    assert recipe.section("quantization") == {"load_in_8bit": True}


def test_each_generation_wins_over_the_one_before(tmp_path: Path) -> None:
    write(tmp_path, "extends: parent.yaml\nlora: {r: 8, lora_alpha: 8}\n", "middle.yaml")
    recipe = load(tmp_path, "extends: middle.yaml\nlora: {lora_alpha: 4}\n")
    assert recipe.get("lora.r") == 8
    assert recipe.get("lora.lora_alpha") == 4
    assert recipe.get("lora.target_modules") == ["q_proj", "v_proj"]


def test_each_value_remembers_the_file_and_line_that_set_it(tmp_path: Path) -> None:
    recipe = load(tmp_path, "# a child\nextends: parent.yaml\nlora:\n  r: 8\n")
    assert recipe.where("lora.r") == f"{tmp_path / 'child.yaml'}:4"
    assert recipe.where("lora.rank_pattern.k_proj") == f"{tmp_path / 'parent.yaml'}:8"
    assert recipe.where("training.learning_rate") == f"{tmp_path / 'parent.yaml'}:13"


def test_a_parent_is_found_relative_to_its_child(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    write(tmp_path / "base", PARENT, "grand.yaml")
    write(tmp_path / "base", "extends: grand.yaml\n", "parent.yaml")
    assert load_recipe(write(tmp_path, "extends: base/parent.yaml\n")).get("lora.r") == 16


def test_the_same_parent_reached_once_is_no_circle(tmp_path: Path) -> None:
    write(tmp_path, "extends: parent.yaml\n", "middle.yaml")
    assert load(tmp_path, "extends: middle.yaml\n").get("lora.r") == 16


def test_a_circle_is_refused_and_named_as_a_path(tmp_path: Path) -> None:
    write(tmp_path, "lora: {r: 8}\nextends: b.yaml\n", "a.yaml")
    write(tmp_path, "extends: c.yaml\n", "b.yaml")
    write(tmp_path, "extends: a.yaml\n", "c.yaml")
    message = refusal(tmp_path / "a.yaml")
    assert message.startswith(f"{tmp_path / 'c.yaml'}:1:10: `extends` goes in a circle")
    assert "a.yaml → b.yaml → c.yaml → a.yaml" in message


def test_a_recipe_that_extends_itself_is_a_circle(tmp_path: Path) -> None:
    assert "child.yaml → child.yaml" in refusal(write(tmp_path, "extends: child.yaml\n"))


def test_a_chain_of_parents_ends(tmp_path: Path) -> None:
    write(tmp_path, PARENT, "0.yaml")
    for number in range(1500):
        write(tmp_path, f"extends: {number}.yaml\n", f"{number + 1}.yaml")
    load_recipe(tmp_path / "10.yaml")
    for number in (11, 1500):
        assert "`extends` comes after 10 others in a chain" in refusal(tmp_path / f"{number}.yaml")


def test_a_recipe_that_is_a_link_to_itself_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    assert "loop.yaml: cannot be read" in refusal(tmp_path / "loop.yaml")
    assert "`extends` names a file that does not exist" in refusal(write(tmp_path, "extends: loop.yaml\n"))


def test_a_circle_through_a_link_is_a_circle(tmp_path: Path) -> None:
    write(tmp_path, "extends: link.yaml\n")
    (tmp_path / "link.yaml").symlink_to(tmp_path / "child.yaml")
    assert "goes in a circle" in refusal(tmp_path / "child.yaml")


def test_a_missing_parent_is_named_at_its_place(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, "\nextends: base/nope.yaml\n"))
    assert message.startswith(f"{tmp_path / 'child.yaml'}:2:10: `extends` names a file that does not exist")
    assert str(tmp_path / "base" / "nope.yaml") in message


@pytest.mark.parametrize(
    "name", ["x" * 300 + ".yaml", '"a\\0b.yaml"', '""', "."], ids=["long", "NUL", "empty", "folder"]
)
def test_a_parent_name_that_can_be_no_file_is_one_problem(tmp_path: Path, name: str) -> None:
    assert refusal(write(tmp_path, f"extends: {name}\n")).startswith(f"{tmp_path / 'child.yaml'}:1:10: `extends`")


@pytest.mark.parametrize("value", ["[parent.yaml]", "5", "{file: parent.yaml}", "true", "null"])
def test_extends_takes_one_name(tmp_path: Path, value: str) -> None:
    message = refusal(write(tmp_path, f"extends: {value}\n"))
    assert message.startswith(f"{tmp_path / 'child.yaml'}:1:10: `extends` takes one file name")


def test_a_broken_parent_is_reported_in_the_parent(tmp_path: Path) -> None:
    write(tmp_path, "lora:\n\tr: 1\n", "broken.yaml")
    message = refusal(write(tmp_path, "extends: broken.yaml\n"))
    assert message.startswith(f"{tmp_path / 'broken.yaml'}:2:1: ")


def test_an_override_wins_over_every_file_and_says_so(tmp_path: Path) -> None:
    recipe = load(tmp_path, "extends: parent.yaml\nlora: {r: 8}\n", "lora.r=4")
    assert recipe.get("lora.r") == 4
    assert recipe.where("lora.r") == "command line (lora.r=4)"
    assert recipe.where("lora.target_modules") == f"{tmp_path / 'parent.yaml'}:7"


def test_the_last_of_two_overrides_wins(tmp_path: Path) -> None:
    assert load(tmp_path, "extends: parent.yaml\n", "lora.r=4", "lora.r=2").get("lora.r") == 2


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("lora.rank_pattern.q_proj=8", "lora.rank_pattern", {"q_proj": 8, "k_proj": 2}),
        ("lora.target_modules=[o_proj]", "lora.target_modules", ["o_proj"]),
        ("lora.rank_pattern={o_proj: 3}", "lora.rank_pattern", {"q_proj": 4, "k_proj": 2, "o_proj": 3}),
        ("training.learning_rate=1e-4", "training.learning_rate", 0.0001),
        ("training.max_length=null", "training.max_length", None),
        ("training.max_length=", "training.max_length", None),
        ("training.run_name=a=b", "training.run_name", "a=b"),
        ("generation={max_new_tokens: 4}", "generation.max_new_tokens", 4),
        ("merge.dtype=float32", "merge.dtype", "float32"),
    ],
)
def test_an_override_reaches_every_depth(tmp_path: Path, override: str, key: str, value: object) -> None:
    assert load(tmp_path, "extends: parent.yaml\n", override).get(key) == value


@pytest.mark.parametrize("override", ["quantization=null", "quantization="])
def test_an_override_drops_a_section(tmp_path: Path, override: str) -> None:
    assert "quantization" not in load(tmp_path, "extends: parent.yaml\n", override).values


@pytest.mark.parametrize("word", ["lora", "lora.r", "=1", ".r=1", "lora.=1", "lora..r=1", ""])
def test_a_word_that_is_no_override_is_refused(tmp_path: Path, word: str) -> None:
    message = refusal(write(tmp_path, PARENT), word)
    assert message.startswith("command line: ")
    assert "is not an override; write section.key=value" in message


def test_an_override_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, PARENT)
    for word in ("training.run_name=\udcff", "training.\udcff=1", "\udcff"):
        message = refusal(path, word)
        assert "is not UTF-8 text" in message
        message.encode()


def test_an_override_deeper_than_any_key_is_refused(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, PARENT), f"training.{'d.' * 3000}e=1")
    assert "more than 40 deep" in message
    assert len(message) < 400


def test_broken_yaml_in_an_override_is_refused_as_the_command_lines(tmp_path: Path) -> None:
    assert refusal(write(tmp_path, PARENT), "lora.target_modules=[q").startswith(
        "command line (lora.target_modules=[q)"
    )


@pytest.mark.parametrize("override", ["lora.r=sixteen", "lora=5", "dataset.path.x=1", "lora.rr=4", "loraa.r=4"])
def test_a_wrong_override_is_refused_as_the_command_lines(tmp_path: Path, override: str) -> None:
    assert refusal(write(tmp_path, PARENT), override).startswith(f"command line ({override}): ")


def test_the_parent_cannot_be_changed_by_an_override(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, PARENT), "extends=other.yaml")
    assert message.startswith("command line (extends=other.yaml): `extends`")


def test_a_recipe_cannot_be_changed(tmp_path: Path) -> None:
    recipe: Any = load_recipe(write(tmp_path, PARENT))
    with pytest.raises(TypeError):
        recipe.values["lora"] = {}
    with pytest.raises(TypeError):
        recipe.values["lora"]["r"] = 8
    with pytest.raises(TypeError):
        recipe.values["lora"]["target_modules"][0] = "o_proj"
    with pytest.raises(TypeError):
        recipe.values["lora"]["rank_pattern"]["q_proj"] = 1
    with pytest.raises(TypeError):
        recipe.origins["lora.r"] = None
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.path = Path("other.yaml")


def test_what_a_recipe_hands_out_is_a_copy_of_plain_values(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, PARENT))
    for lora in (recipe.section("lora"), recipe.plain()["lora"], recipe.get("lora")):
        assert type(lora) is type(lora["rank_pattern"]) is dict
        assert type(lora["target_modules"]) is list
        lora["r"] = 1
        lora["target_modules"].append("o_proj")
        lora["rank_pattern"].clear()
    assert recipe.get("lora.r") == 16
    assert recipe.get("lora.target_modules") == ["q_proj", "v_proj"]
    assert recipe.get("lora.rank_pattern") == {"q_proj": 4, "k_proj": 2}


def test_get_returns_the_default_only_for_what_is_not_set(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, PARENT), ["training.max_length=null"])
    assert recipe.get("training.max_length", 5) is None
    assert recipe.get("training.max_steps", 5) == 5
    assert recipe.get("merge.dtype", "float32") == "float32"
    assert recipe.get("lora.r.deeper", 5) == 5


def test_where_falls_back_from_key_to_section_to_file(tmp_path: Path) -> None:
    path = write(tmp_path, PARENT)
    recipe = load_recipe(path)
    assert recipe.where("lora.r") == f"{path}:6"
    assert recipe.where("lora.bias") == f"{path}:5"
    assert recipe.where("merge.dtype") == str(path)


@pytest.mark.parametrize("name", ["a.yaml", "llama2-7b_v1.0.yaml", "A.yml", "x" * 80 + ".yaml"])
def test_the_name_of_a_recipe_is_its_file_name(tmp_path: Path, name: str) -> None:
    assert load_recipe(write(tmp_path, PARENT, name)).name == Path(name).stem


@pytest.mark.parametrize("name", ["a b.yaml", "-a.yaml", "._a.yaml", "数据.yaml", "x" * 81 + ".yaml", "a\n.yaml"])
def test_a_file_name_that_cannot_name_a_run_folder_is_refused(tmp_path: Path, name: str) -> None:
    assert "the file's name becomes the run folder's" in refusal(write(tmp_path, PARENT, name))


@pytest.mark.parametrize("name", ["recipe.json", "recipe", "recipe.yaml.bak", ".yaml"])
def test_a_file_that_is_not_named_yaml_is_refused(tmp_path: Path, name: str) -> None:
    assert "a recipe is a .yaml file" in refusal(write(tmp_path, PARENT, name))


def test_a_folder_is_refused(tmp_path: Path) -> None:
    assert "is a folder" in refusal(tmp_path)


def test_two_loads_of_one_recipe_are_equal(tmp_path: Path) -> None:
    path = write(tmp_path, PARENT)
    assert load_recipe(path) == load_recipe(path)
    assert load_recipe(path) == load_recipe(str(path))
    assert load_recipe(path) != load_recipe(path, ["lora.r=8"])


MIXTURE = """\
extends: parent.yaml
dataset:
  - path: org/a
    weight: 2
  - path: json
    data_files:
      train: data/b.jsonl
      test: [data/c.jsonl]
"""


def test_a_list_of_sources_replaces_the_parents_source(tmp_path: Path) -> None:
    recipe = load(tmp_path, MIXTURE)
    first = {"path": "org/a", "weight": 2}
    second = {"path": "json", "data_files": {"train": "data/b.jsonl", "test": ["data/c.jsonl"]}}
    assert recipe.section("dataset") == recipe.plain()["dataset"] == [first, second]
    assert recipe.datasets() == [("dataset.0", first), ("dataset.1", second)]


def test_one_source_is_a_mixture_of_one(tmp_path: Path) -> None:
    assert load(tmp_path, "extends: parent.yaml\n").datasets() == [("dataset", {"path": "org/data", "split": "train"})]


def test_a_recipe_without_data_has_no_sources(tmp_path: Path) -> None:
    assert Recipe(tmp_path, {}, {}).datasets() == []


def test_get_reaches_into_a_list(tmp_path: Path) -> None:
    recipe = load(tmp_path, MIXTURE)
    assert recipe.get("dataset.0.path") == "org/a"
    assert recipe.get("dataset.1.data_files.test") == ["data/c.jsonl"]
    assert recipe.get("dataset.1.data_files.test.0") == "data/c.jsonl"
    for key in ("dataset.2.path", "dataset.path", "dataset.-1.path", "dataset.0.x", "dataset.0.path.0"):
        assert recipe.get(key, "none") == "none"


def test_each_key_of_a_listed_source_remembers_its_line(tmp_path: Path) -> None:
    path, recipe = tmp_path / "child.yaml", load(tmp_path, MIXTURE)
    for key, line in (
        ("dataset", 2),
        ("dataset.0", 3),
        ("dataset.0.weight", 4),
        ("dataset.1.path", 5),
        ("dataset.1.split", 5),  # not set: the source itself
        ("dataset.1.data_files", 6),
        ("dataset.1.data_files.train", 7),
        ("dataset.1.data_files.test.0", 8),
    ):
        assert recipe.where(key) == f"{path}:{line}", key


def test_a_mapping_inside_a_section_remembers_its_line(tmp_path: Path) -> None:
    recipe = load(tmp_path, "extends: parent.yaml\ndataset:\n  data_files:\n    train: a.jsonl\n")
    assert recipe.where("dataset.data_files") == f"{tmp_path / 'child.yaml'}:3"
    assert recipe.where("dataset.data_files.train") == f"{tmp_path / 'child.yaml'}:4"


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("dataset.0.weight=0.5", "dataset.0.weight", 0.5),
        ("dataset.1.eval_split=0.1", "dataset.1.eval_split", 0.1),
        ("dataset.1.data_files.train=d.jsonl", "dataset.1.data_files.train", "d.jsonl"),
        ("dataset.0={weight: 3}", "dataset.0.weight", 3),
    ],
)
def test_an_override_reaches_into_a_listed_source(tmp_path: Path, override: str, key: str, value: object) -> None:
    before, after = load(tmp_path, MIXTURE), load(tmp_path, MIXTURE, override)
    assert after.get(key) == value
    assert after.where(key) == f"command line ({override})"
    for other in ("dataset.0.path", "dataset.1.path", "dataset.1.data_files.test", "dataset.0.split"):
        assert after.get(other) == before.get(other)
        assert after.where(other) == before.where(other)


def test_overrides_of_two_sources_both_hold(tmp_path: Path) -> None:
    words = ["dataset.0.weight=1", "dataset.1.weight=3", "dataset.0.split=test"]
    recipe = load(tmp_path, MIXTURE, *words)
    assert [recipe.get(word.partition("=")[0]) for word in words] == [1, 3, "test"]


def test_a_list_on_the_command_line_can_be_changed_by_the_next_word(tmp_path: Path) -> None:
    recipe = load(tmp_path, "extends: parent.yaml\n", "dataset=[{path: org/a}]", "dataset.0.weight=3")
    assert recipe.section("dataset") == [{"path": "org/a", "weight": 3}]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "dataset.weight=2",
            "`dataset.weight` does not say which of the 2 sources in the list `dataset` it means; "
            "write dataset.0.weight=..., or up to dataset.1",
        ),
        (
            "dataset.data_files.train=a",
            "`dataset.data_files.train` does not say which of the 2 sources in the list `dataset` it means; "
            "write dataset.0.data_files.train=..., or up to dataset.1",
        ),
        (
            "dataset.2.weight=2",
            "`dataset.2.weight` names a source that is not there: the list `dataset` has 2; "
            "they count from 0: dataset.0 to dataset.1",
        ),
        (
            f"dataset.{'9' * 5000}.weight=2",
            f"`dataset.{'9' * 5000}.weight` names a source that is not there: the list `dataset` has 2; "
            "they count from 0: dataset.0 to dataset.1",
        ),
        ("dataset.0.pth=a", "`dataset.0.pth` is not a field of datasets.load_dataset; did you mean `path`?"),
        ("dataset.0=5", "`dataset.0` must be a mapping, found 5"),
    ],
)
def test_an_override_that_misses_a_listed_source_is_one_message(tmp_path: Path, override: str, expected: str) -> None:
    load(tmp_path, MIXTURE)
    assert refusal(tmp_path / "child.yaml", override).replace(f" ({override})", "") == f"command line: {expected}"


def test_a_number_in_an_override_needs_a_list(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, PARENT), "dataset.0.weight=2")
    assert message == (
        "command line: `dataset.0.weight` names a source by number, but `dataset` is no list; write dataset.weight=..."
    )
