"""The check: every mistake is named at its file, line and column, with what to write instead."""

import re
from pathlib import Path

import pytest

from lora_recipes.errors import EXIT_REFUSED, EXIT_USER
from lora_recipes.recipe import InvalidRecipe, load_recipe
from lora_recipes.recipe.check import schema, section_keys
from lora_recipes.recipe.refused import REFUSED, RENAMED
from lora_recipes.recipe.vocabulary import OWNERS
from tests.recipe.refusals import BASE, refusal, write

SECRET = "hf_" + "abcdefghijklmnopqrstuvwxyzABCD"


def only_message(folder: Path, text: str, *overrides: str) -> str:
    """The text of the one problem there is, without the folder."""
    error = refusal(folder, text, *overrides)
    assert len(error.problems) == 1, str(error)
    assert error.exit_code == EXIT_USER
    return str(error).removeprefix(f"{folder}/")


def test_the_base_of_these_tests_is_a_good_recipe(tmp_path: Path) -> None:
    load_recipe(write(tmp_path, ""))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "training:\n  learning_rat: 1e-4",
            "r.yaml:3:3: `training.learning_rat` is not a field of trl.SFTConfig; did you mean `learning_rate`?",
        ),
        (
            "lora:\n  target_module: all-linear",
            "r.yaml:3:3: `lora.target_module` is not a field of peft.LoraConfig; did you mean `target_modules`?",
        ),
        (
            "\ngeneration: {max_new_tokens: 4,\n  max_new_token: 4}",
            "r.yaml:4:3: `generation.max_new_token` is not a field of transformers.GenerationConfig; "
            "did you mean `max_new_tokens`?",
        ),
        ("lorra:\n  r: 8", "r.yaml:2:1: `lorra` is not a section of a recipe; did you mean `lora`?"),
        ("extend: a.yaml", "r.yaml:2:1: `extend` is not a section of a recipe; did you mean `extends` or `export`?"),
    ],
)
def test_a_misspelt_key_is_told_the_right_name(tmp_path: Path, text: str, expected: str) -> None:
    assert only_message(tmp_path, text) == expected


@pytest.mark.parametrize("text", ["lorra: null", "lorra:", "lora_r:", "learning_rate: ~"])
def test_an_unknown_section_is_refused_even_when_it_is_null(tmp_path: Path, text: str) -> None:
    assert only_message(tmp_path, text).startswith("r.yaml:2:1: `")


def test_an_unknown_key_with_nothing_near_is_refused(tmp_path: Path) -> None:
    expected = "r.yaml:3:3: `training.qqqqqqqq` is not a field of trl.SFTConfig"
    assert only_message(tmp_path, "training:\n  qqqqqqqq: 1").startswith(expected)


def test_a_section_with_nothing_near_is_told_all_sections(tmp_path: Path) -> None:
    message = only_message(tmp_path, "zzz: 1")
    assert message.endswith(f"known: extends, {', '.join(OWNERS)}")


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("max_seq_length", "training.max_length"),
        ("torch_dtype", "model.dtype"),
        ("warmup_ratio", "training.warmup_steps (a value below 1 is a share of all steps)"),
        ("evaluation_strategy", "training.eval_strategy"),
        ("lora_r", "lora.r"),
        ("load_in_4bit", "quantization.load_in_4bit"),
    ],
)
@pytest.mark.parametrize("section", ["", "training"])
def test_an_old_name_is_told_the_new_one(tmp_path: Path, section: str, name: str, instead: str) -> None:
    text, place = (
        (f"{section}:\n  {name}: 1", f"3:3: `{section}.{name}`") if section else (f"{name}: 1", f"2:1: `{name}`")
    )
    message = only_message(tmp_path, text)
    assert message.startswith(f"r.yaml:{place} is not a ")
    assert message.endswith(f"; write {instead}")


def test_an_old_name_in_its_own_section_is_told_the_new_one(tmp_path: Path) -> None:
    assert only_message(tmp_path, "lora:\n  lora_r: 8").endswith("; write lora.r")
    assert only_message(tmp_path, "model:\n  torch_dtype: bfloat16").endswith("; write model.dtype")


@pytest.mark.parametrize(
    ("section", "key", "home"),
    [
        ("lora", "learning_rate", "training"),
        ("training", "r", "lora"),
        ("training", "eval_split", "dataset"),
        ("dataset", "eval_steps", "training"),
        ("training", "eos_token_id", "generation"),
        ("lora", "base", "merge"),
        ("merge", "bnb_4bit_quant_type", "quantization"),
    ],
)
def test_a_key_in_the_wrong_section_is_told_the_right_one(tmp_path: Path, section: str, key: str, home: str) -> None:
    message = only_message(tmp_path, f"{section}:\n  {key}: 1")
    assert message.startswith(f"r.yaml:3:3: `{section}.{key}` is not a field of {OWNERS[section]}")
    assert message.endswith(f"; it belongs to `{home}`")


def test_a_key_outside_its_section_is_told_the_section(tmp_path: Path) -> None:
    message = only_message(tmp_path, "learning_rate: 1e-4")
    assert message.startswith("r.yaml:2:1: `learning_rate` is not a section; ")
    assert message.endswith("write training.learning_rate")


@pytest.mark.parametrize(
    ("section", "key"), [(section, key) for section in REFUSED for key in REFUSED[section] if "token" not in key]
)
def test_a_field_that_cannot_be_set_is_refused_with_the_reason(tmp_path: Path, section: str, key: str) -> None:
    message = only_message(tmp_path, f"{section}:\n  {key}: 1")
    assert message == f"r.yaml:3:3: `{section}.{key}` cannot be set: it {REFUSED[section][key]}"


@pytest.mark.parametrize("key", ["model.token", "model.use_auth_token", "dataset.token", "training.hub_token"])
def test_a_secret_field_is_refused_and_its_value_not_repeated(tmp_path: Path, key: str) -> None:
    section, _, name = key.partition(".")
    error = refusal(tmp_path, f"{section}:\n  {name}: letmein")
    assert str(error).startswith(f"{tmp_path / 'r.yaml'}:3:3: `{key}` looks like a secret")
    assert len(error.problems) == 1
    assert error.exit_code == EXIT_REFUSED
    assert "letmein" not in str(error)
    assert "hf auth login" in str(error)


@pytest.mark.parametrize(
    "text",
    [
        f"model:\n  revision: {SECRET}",
        f"training:\n  run_name: run with {SECRET} in it",
        f"dataset:\n  data_files: {{train: {SECRET}}}",
        f"dataset:\n  data_files: [{SECRET}]",
        f"generation:\n  max_new_tokens: 4\n  prompts: [hello, {SECRET}]",
        f"lora:\n  rank_pattern: {{{SECRET}: 8}}",
        f"lora:\n  r: {SECRET}",
        f"lora:\n  modules_to_save: [[{SECRET}]]",
        f"training:\n  nonsense: {SECRET}",
        f"nonsense: {SECRET}",
        f"{SECRET}: 1",
    ],
    ids=lambda text: text.replace(SECRET, "SECRET").replace("\n", " "),
)
def test_a_secret_anywhere_is_refused_and_never_repeated(tmp_path: Path, text: str) -> None:
    error = refusal(tmp_path, text)
    assert error.exit_code == EXIT_REFUSED
    assert SECRET not in str(error)
    assert SECRET not in str([problem.as_json() for problem in error.problems])


@pytest.mark.parametrize(
    "override",
    [
        f"training.hub_token={SECRET}",
        f"model.revision={SECRET}",
        f"generation.prompts=[{SECRET}]",
        f"training.hub_token=[{SECRET}",
        f"{SECRET}",
    ],
    ids=lambda override: override.replace(SECRET, "SECRET"),
)
def test_a_secret_in_an_override_is_never_repeated(tmp_path: Path, override: str) -> None:
    error = refusal(tmp_path, "", override)
    assert SECRET not in str(error)
    assert SECRET not in str([problem.as_json() for problem in error.problems])


@pytest.mark.parametrize(
    "text",
    [f"training:\n\thub_token: {SECRET}", f"model: {{revision: {SECRET}", f"extends: {SECRET}"],
    ids=lambda text: text.replace(SECRET, "SECRET").replace("\n", " "),
)
def test_a_secret_in_broken_yaml_is_never_repeated(tmp_path: Path, text: str) -> None:
    assert SECRET not in str(refusal(tmp_path, text))


def test_a_secret_in_the_parent_is_refused_at_the_parents_line(tmp_path: Path) -> None:
    write(tmp_path, "")
    (tmp_path / "base.yaml").write_text(f"{BASE}training:\n  run_name: {SECRET}\n")
    with pytest.raises(InvalidRecipe) as raised:
        load_recipe(tmp_path / "r.yaml")
    assert str(raised.value).startswith(f"{tmp_path / 'base.yaml'}:9:3: `training.run_name` looks like a secret")
    assert raised.value.exit_code == EXIT_REFUSED


def test_a_secret_is_named_with_its_whole_file_name(tmp_path: Path) -> None:
    folder = tmp_path / "recipes (copy)"
    folder.mkdir()
    error = refusal(folder, "training:\n  hub_token: letmein")
    assert str(error).startswith(f"{folder / 'r.yaml'}:3:3: ")


def test_a_special_token_is_no_secret(tmp_path: Path) -> None:
    load_recipe(write(tmp_path, "training:\n  eos_token: <|im_end|>"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lora:\n  r: sixteen", "3:6: `lora.r` must be an integer, found the text 'sixteen'"),
        ("lora:\n  r: 16.0", "3:6: `lora.r` must be an integer, found 16.0"),
        ("lora:\n  r: true", "3:6: `lora.r` must be an integer, found true"),
        ("lora:\n  r: null", "3:6: `lora.r` must be an integer, found null"),
        ("lora:\n  r: '16'", "3:6: `lora.r` must be an integer, found the text '16'"),
        ("lora:\n  r: 012", "3:6: `lora.r` must be an integer, found the text '012'"),
        ("lora:\n  r: {q_proj: 8}", "3:6: `lora.r` must be an integer, found a mapping"),
        (
            "training:\n  per_device_train_batch_size: 2.5",
            "3:32: `training.per_device_train_batch_size` must be an integer, found 2.5",
        ),
        ("training:\n  max_steps: 1e3", "3:14: `training.max_steps` must be an integer, found 1000.0"),
        (
            "training:\n  num_train_epochs: [1]",
            "3:21: `training.num_train_epochs` must be a finite number, found a list",
        ),
        ("training:\n  learning_rate: true", "3:18: `training.learning_rate` must be a finite number, found true"),
        (
            "training:\n  learning_rate: 1e-4x",
            "3:18: `training.learning_rate` must be a finite number, found the text '1e-4x'",
        ),
        (
            "training:\n  packing: yes",
            "3:12: `training.packing` must be true or false, found the text 'yes'; write true or false",
        ),
        ("training:\n  packing: 1", "3:12: `training.packing` must be true or false, found 1"),
        ("lora: 16", "2:7: `lora` must be a mapping or null, found 16"),
        ("lora: [r]", "2:7: `lora` must be a mapping or null, found a list"),
        (
            "model:\n  pretrained_model_name_or_path: ''",
            "3:34: `model.pretrained_model_name_or_path` must not be empty",
        ),
    ],
)
def test_a_wrong_type_is_said_at_the_value(tmp_path: Path, text: str, expected: str) -> None:
    assert only_message(tmp_path, text) == f"r.yaml:{expected}"


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("lora:\n  modules_to_save: [a, 2]", "3:24: `lora.modules_to_save.1`"),
        ("lora:\n  target_modules: [a, 2]", "3:23: `lora.target_modules.1`"),
        ("dataset:\n  data_files: [a, 2]", "3:19: `dataset.data_files.1`"),
        ("dataset:\n  data_files: {train: [a, 2]}", "3:27: `dataset.data_files.train.1`"),
        ("dataset:\n  data_files:\n    train: 2", "4:12: `dataset.data_files.train`"),
    ],
)
def test_a_wrong_item_is_said_at_the_item(tmp_path: Path, text: str, place: str) -> None:
    message = only_message(tmp_path, text)
    assert message.startswith(f"r.yaml:{place} must be ")
    assert message.endswith("found 2")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "lora:\n  bias: non",
            "3:9: `lora.bias` must be one of none, all, lora_only; found the text 'non'; did you mean `none`?",
        ),
        (
            "training:\n  eval_strategy: step",
            "3:18: `training.eval_strategy` must be one of no, steps, epoch; found the text 'step'; did you mean `steps`?",
        ),
        (
            "merge:\n  base: dequantised",
            "3:9: `merge.base` must be one of original, dequantized; found the text 'dequantised'; "
            "did you mean `dequantized`?",
        ),
        ("merge:\n  base: 5", "3:9: `merge.base` must be one of original, dequantized; found 5"),
    ],
)
def test_a_wrong_choice_is_told_the_choices(tmp_path: Path, text: str, expected: str) -> None:
    assert only_message(tmp_path, text) == f"r.yaml:{expected}"


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("training.learning_rate", "0", "must be more than 0, found 0"),
        ("training.learning_rate", "-1", "must be more than 0, found -1"),
        ("training.learning_rate", "5", "must be at most 1, found 5"),
        ("training.learning_rate", ".nan", "must be a finite number, found nan"),
        ("training.learning_rate", ".inf", "must be a finite number, found inf"),
        ("training.learning_rate", "-.inf", "must be a finite number, found -inf"),
        ("training.learning_rate", "1e400", "must be a finite number, found inf"),
        ("training.max_length", "1", "must be at least 2, found 1"),
        ("training.max_steps", "-2", "must be at least -1, found -2"),
        ("lora.r", "0", "must be at least 1, found 0"),
        ("lora.r", "5000", "must be at most 1024, found 5000"),
        ("lora.lora_dropout", "1.0", "must be less than 1, found 1.0"),
        ("lora.lora_dropout", "-0.1", "must be at least 0, found -0.1"),
    ],
)
def test_a_value_out_of_range_is_told_the_limit(tmp_path: Path, key: str, value: str, expected: str) -> None:
    section, _, name = key.partition(".")
    column = len(name) + 5
    assert only_message(tmp_path, f"{section}:\n  {name}: {value}") == f"r.yaml:3:{column}: `{key}` {expected}"


@pytest.mark.parametrize(
    "word",
    [
        "training.learning_rate=1",
        "training.max_steps=-1",
        "training.max_length=2",
        "training.max_length=null",
        "training.weight_decay=0",
        "lora.r=1",
        "lora.r=1024",
        "lora.lora_dropout=0",
        "lora.lora_dropout=0.999",
    ],
)
def test_a_value_on_the_limit_is_good(tmp_path: Path, word: str) -> None:
    load_recipe(write(tmp_path, ""), [word])


@pytest.mark.parametrize("value", ["data/a.jsonl", "[a.jsonl, b.jsonl]", "{train: a.jsonl, test: [b.jsonl]}", "null"])
def test_data_files_take_what_load_dataset_takes(tmp_path: Path, value: str) -> None:
    load_recipe(write(tmp_path, f"dataset:\n  data_files: {value}"))


def test_all_problems_come_in_one_message_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = """\
training:
  learning_rat: 1
  max_steps: 2.5
  output_dir: here
zzz: 1
lora:
  r: 0
  bias: some
lora_r: 8"""
    error = refusal(tmp_path, text)
    places = [(problem.origin.line, problem.key) for problem in error.problems]
    assert places == [
        (3, "training.learning_rat"),
        (4, "training.max_steps"),
        (5, "training.output_dir"),
        (6, "zzz"),
        (8, "lora.r"),
        (9, "lora.bias"),
        (10, "lora_r"),
    ]
    assert [line.split(" ")[0] for line in str(error).splitlines()] == [
        f"{tmp_path / 'r.yaml'}:{problem.origin.line}:{problem.origin.column}:" for problem in error.problems
    ]


def test_a_duplicate_key_stands_in_its_place_among_the_others(tmp_path: Path) -> None:
    error = refusal(tmp_path, "lora:\n  rr: 1\ntraining:\n  seed: 1\n  seed: 2\n  max_step: 1")
    assert [problem.origin.line for problem in error.problems] == [3, 6, 7]


def test_no_problem_is_said_twice(tmp_path: Path) -> None:
    error = refusal(tmp_path, "training:\n  learning_rate: .nan\n  seed: -1\nlora: {r: 0}")
    assert len({problem.key for problem in error.problems}) == len(error.problems) == 3


def test_one_secret_makes_the_whole_message_a_refusal(tmp_path: Path) -> None:
    error = refusal(tmp_path, "training:\n  learning_rat: 1\n  hub_token: letmein")
    assert len(error.problems) == 2
    assert error.exit_code == EXIT_REFUSED


def test_a_mistake_in_the_parent_is_reported_in_the_parent(tmp_path: Path) -> None:
    path = write(tmp_path, "training:\n  max_step: 1")
    (tmp_path / "base.yaml").write_text(f"{BASE}training:\n  learning_rat: 1\n  fp16: true\n")
    with pytest.raises(InvalidRecipe) as raised:
        load_recipe(path)
    assert [str(problem).split(" ")[0] for problem in raised.value.problems] == [
        f"{tmp_path / 'base.yaml'}:9:3:",
        f"{path}:3:3:",
    ]


def test_a_conflict_is_reported_where_its_key_was_set(tmp_path: Path) -> None:
    path = write(tmp_path, "training:\n  bf16: true")
    (tmp_path / "base.yaml").write_text(f"{BASE}training:\n  fp16: true\n")
    with pytest.raises(InvalidRecipe) as raised:
        load_recipe(path)
    assert str(raised.value).startswith(f"{tmp_path / 'base.yaml'}:9:3: `training.fp16` and `training.bf16`")


def test_a_problem_as_json_says_what_its_text_says(tmp_path: Path) -> None:
    [problem] = refusal(tmp_path, "training:\n  learning_rat: 1").problems
    assert problem.as_json() == {
        "file": str(tmp_path / "r.yaml"),
        "line": 3,
        "column": 3,
        "key": "training.learning_rat",
        "message": "is not a field of trl.SFTConfig",
        "hint": "did you mean `learning_rate`?",
    }


LISTED = "dataset:\n  - path: org/a\n  - path: org/b\n    "  # what follows stands in line 5, column 5


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("pth: x", "5:5: `dataset.1.pth` is not a field of datasets.load_dataset; did you mean `path`?"),
        (
            "learning_rate: 1",
            "5:5: `dataset.1.learning_rate` is not a field of datasets.load_dataset; it belongs to `training`",
        ),
        (
            "val_set_size: 1",
            "5:5: `dataset.1.val_set_size` is not a field of datasets.load_dataset; write dataset.eval_split",
        ),
        (
            "num_proc: 2",
            "5:5: `dataset.1.num_proc` cannot be set: it is `training.dataset_num_proc`, the number of processes that "
            "prepare rows",
        ),
        ("weight: 0", "5:13: `dataset.1.weight` must be more than 0, found 0"),
        ("weight: two", "5:13: `dataset.1.weight` must be a finite number, found the text 'two'"),
        ("eval_split: 1.5", "5:17: `dataset.1.eval_split` must be less than 1, found 1.5"),
        ("eval_split: 0", "5:17: `dataset.1.eval_split` must be more than 0, found 0"),
        ("eval_split: ''", "5:17: `dataset.1.eval_split` must not be empty"),
        ("eval_split: [a]", "5:17: `dataset.1.eval_split` must be text or a finite number or null, found a list"),
        (
            "bad_rows: drop",
            "5:15: `dataset.1.bad_rows` must be one of error, skip; found the text 'drop'",
        ),
        ("columns: {prompt: ''}", "5:23: `dataset.1.columns.prompt` must not be empty"),
        ("data_files: [a, 2]", "5:21: `dataset.1.data_files.1` must be text, found 2"),
        ("path: org/c", "5:5: `dataset.1.path` is already set in line 4; keep one of the two"),
        ("control_tokens: keep", "5:5: `dataset.1.control_tokens` is `keep`, with which"),
    ],
)
def test_a_mistake_in_a_listed_source_is_told_as_in_a_single_one(tmp_path: Path, line: str, expected: str) -> None:
    assert only_message(tmp_path, LISTED + line).startswith(f"r.yaml:{expected}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dataset: 5", "2:10: `dataset` must be a mapping or a list of mappings or null, found 5"),
        ("dataset: []", "2:10: `dataset` must not be empty"),
        ("dataset: [{path: org/a}, 5]", "2:26: `dataset.1` must be a mapping, found 5"),
        ("dataset:\n  -\n  - path: org/a", "3:4: `dataset.0` must be a mapping, found null"),
        ("dataset: [[{path: org/a}]]", "2:11: `dataset.0` must be a mapping, found a list"),
        ("dataset:\n  - path: org/a\n  - split: test", "4:5: `dataset.1.path` is missing"),
    ],
)
def test_the_shape_of_the_dataset_section_is_one_mapping_or_a_list(tmp_path: Path, text: str, expected: str) -> None:
    assert only_message(tmp_path, text).startswith(f"r.yaml:{expected}")


def test_a_secret_in_a_listed_source_is_refused(tmp_path: Path) -> None:
    error = refusal(tmp_path, f"{LISTED}token: letmein")
    assert error.exit_code == EXIT_REFUSED
    assert str(error).startswith(f"{tmp_path / 'r.yaml'}:5:5: `dataset.1.token` looks like a secret")
    for word in ("dataset.1.token=letmein", "dataset.token=letmein"):
        assert "letmein" not in str(refusal(tmp_path, LISTED, word))


@pytest.mark.parametrize("name", ["datasets", "dataset_mixer"])
def test_a_mixture_of_another_tool_is_told_the_list(tmp_path: Path, name: str) -> None:
    assert (
        only_message(tmp_path, f"{name}: [a]") == f"r.yaml:2:1: `{name}` is not a section; write a list under `dataset`"
    )


def test_what_is_missing_is_said_of_the_recipe_that_was_named(tmp_path: Path) -> None:
    error = refusal(tmp_path, "model: null\nlora: null")
    assert {str(problem).partition(": ")[0] for problem in error.problems} == {str(tmp_path / "r.yaml")}


@pytest.mark.parametrize("section", OWNERS)
def test_what_cannot_be_set_is_not_in_the_schema(section: str) -> None:
    assert set(REFUSED[section]).isdisjoint(section_keys(section))


def test_the_schema_has_the_sections_that_have_an_owner() -> None:
    assert list(schema()["properties"]) == ["extends", *OWNERS]
    assert set(REFUSED) == set(OWNERS)


@pytest.mark.parametrize(("old", "instead"), RENAMED.items())
def test_a_renamed_key_leads_to_a_key_that_exists(old: str, instead: str) -> None:
    if target := re.match(r"(\w+)\.(\w+)", instead):
        section, key = target.groups()
        assert key in section_keys(section)
        assert old == key or old not in section_keys(section)


@pytest.mark.parametrize("old", RENAMED)
def test_a_renamed_key_is_no_section(old: str) -> None:
    assert old not in OWNERS
