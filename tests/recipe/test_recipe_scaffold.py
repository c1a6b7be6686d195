"""`new`: a sparse child that means the same as its source plus the overrides, and never harms a file."""

from pathlib import Path

import pytest
import yaml

from lora_recipes.errors import EXIT_USER, LoraRecipesError
from lora_recipes.recipe import load_recipe
from lora_recipes.recipe.scaffold import new_recipe

SOURCE = """\
model:
  pretrained_model_name_or_path: org/tiny
lora:
  target_modules: [q_proj, v_proj]
dataset:
  path: org/data
  split: train
training:
  learning_rate: 2e-4
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "recipes" / "source.yaml"
    path.parent.mkdir()
    path.write_text(SOURCE)
    return path


def files(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def refusal(source: Path, name: str, overrides: list[str]) -> str:
    """The message of a `new` that is refused; whatever was there before is there after, and nothing else."""
    before = files(source.parent.parent)
    with pytest.raises(LoraRecipesError) as raised:
        new_recipe(source, name, overrides)
    assert files(source.parent.parent) == before
    assert raised.value.exit_code == EXIT_USER
    return str(raised.value)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["training.learning_rate=1e-5"],
        ["model.pretrained_model_name_or_path=org/other", "dataset.data_files.train=my.jsonl"],
        ["lora.target_modules=all-linear", "lora.rank_pattern.q_proj=8", "lora.rank_pattern.k_proj=4"],
        ['lora.rank_pattern={"[qk]_proj": 8}'],
        ["lora.r=8", "lora.r=4"],
        ["training.max_length=null"],
        ["generation={max_new_tokens: 4, prompts: [日本, 'no', \"a\\nb\"]}"],
        ["training.run_name='2e-4'"],
        ["model.revision='1234e56'"],
        ["training.seed=7", "training={seed: 8}"],
        ["lora.rank_pattern=null", "lora.rank_pattern.q_proj=8"],
        ["lora.rank_pattern.q_proj=8", "lora.rank_pattern={k_proj: 4}"],
    ],
    ids=" ".join,
)
def test_the_child_means_its_source_with_the_overrides(source: Path, overrides: list[str]) -> None:
    child = new_recipe(source, "mine", overrides)
    assert load_recipe(child).plain() == load_recipe(source, overrides).plain()


def test_the_child_lies_beside_its_source_under_its_own_name(source: Path) -> None:
    assert new_recipe(source, "mine", []) == source.parent / "mine.yaml"


@pytest.mark.parametrize("name", ["mine", "mine.yaml", "mine.yml"])
def test_the_run_folder_is_not_the_sources(source: Path, name: str) -> None:
    child = load_recipe(new_recipe(source, name, []))
    assert child.name == "mine"
    assert child.name != load_recipe(source).name


def test_the_child_holds_only_what_differs(source: Path) -> None:
    child = new_recipe(source, "mine", ["lora.r=8", "training.learning_rate=1e-5"])
    assert yaml.safe_load(child.read_text()) == {
        "extends": "source.yaml",
        "lora": {"r": 8},
        "training": {"learning_rate": 1e-5},
    }


def test_a_child_without_overrides_only_extends(source: Path) -> None:
    assert yaml.safe_load(new_recipe(source, "mine", []).read_text()) == {"extends": "source.yaml"}


def test_a_section_can_be_dropped(source: Path) -> None:
    source.write_text(SOURCE + "quantization: {load_in_4bit: true}\n")
    child = new_recipe(source, "mine", ["quantization=null"])
    assert "quantization" not in load_recipe(child).values


def test_a_child_of_a_child_extends_the_child(source: Path) -> None:
    first = new_recipe(source, "first", ["lora.r=8"])
    second = new_recipe(first, "second", ["lora.lora_alpha=4"])
    assert yaml.safe_load(second.read_text())["extends"] == "first.yaml"
    assert load_recipe(second).section("lora") == {"target_modules": ["q_proj", "v_proj"], "r": 8, "lora_alpha": 4}


def test_the_source_stays_as_it_is(source: Path) -> None:
    new_recipe(source, "mine", ["lora.r=8"])
    assert source.read_text() == SOURCE


@pytest.mark.parametrize("text", ["lora: {r: 1}\n", "", "not a recipe"])
def test_an_existing_file_stays_as_it_is(source: Path, text: str) -> None:
    (source.parent / "mine.yaml").write_text(text)
    assert "mine.yaml exists and is left as it is" in refusal(source, "mine", [])


def test_a_link_to_nowhere_is_an_existing_file(source: Path) -> None:
    (source.parent / "mine.yaml").symlink_to(source.parent / "elsewhere.yaml")
    assert "exists" in refusal(source, "mine", [])


@pytest.mark.parametrize("name", ["source", "source.yaml"])
def test_a_recipe_is_never_written_over_its_source(source: Path, name: str) -> None:
    assert "exists" in refusal(source, name, ["lora.r=8"])


@pytest.mark.parametrize("existing", ["source.yaml", "other.yaml"])
def test_a_second_suffix_cannot_share_the_run_folder_of_another_recipe(source: Path, existing: str) -> None:
    (source.parent / existing).write_text(SOURCE)
    assert existing in refusal(source, existing.replace(".yaml", ".yml"), [])


@pytest.mark.parametrize(
    "override",
    ["lora.r=sixteen", "lora.rr=8", "training.learning_rate=5", "lora", "lora.target_modules=[q", "model=null"],
)
def test_a_wrong_override_writes_nothing(source: Path, override: str) -> None:
    assert refusal(source, "mine", [override])


def test_the_parent_cannot_be_an_override(source: Path) -> None:
    (source.parent / "other.yaml").write_text(SOURCE)
    assert "extends" in refusal(source, "mine", ["extends=other.yaml"])


def test_a_wrong_source_writes_nothing(source: Path) -> None:
    source.write_text(SOURCE + "lorra: {r: 8}\n")
    assert "lorra" in refusal(source, "mine", [])


def test_a_missing_source_writes_nothing(source: Path) -> None:
    assert "no such file" in refusal(source.parent / "nope.yaml", "mine", [])


@pytest.mark.parametrize("name", ["../mine", "a/b", "/mine", "mine/", ".", ".."])
def test_a_path_is_no_name(source: Path, name: str) -> None:
    assert refusal(source, name, [])


@pytest.mark.parametrize(
    "name", ["", "a b", "-mine", "数据", ".hidden", "a\nb", "x" * 81, "x" * 300], ids=lambda name: repr(name[:9])
)
def test_a_name_that_cannot_name_a_run_folder_is_refused(source: Path, name: str) -> None:
    assert refusal(source, name, [])


def test_a_child_of_a_mixture_writes_the_list_as_a_whole(source: Path) -> None:
    source.write_text(f"{SOURCE.split('dataset:')[0]}dataset:\n  - path: org/a\n  - path: org/b\n")
    words = ["dataset.1.weight=2", "dataset.0.weight=0.5"]
    child = new_recipe(source, "mine", words)
    assert load_recipe(child).plain() == load_recipe(source, words).plain()
    assert yaml.safe_load(child.read_text())["dataset"] == [
        {"path": "org/a", "weight": 0.5},
        {"path": "org/b", "weight": 2},
    ]


def test_an_override_that_misses_a_source_writes_nothing(source: Path) -> None:
    assert "is no list" in refusal(source, "mine", ["dataset.0.weight=2"])
