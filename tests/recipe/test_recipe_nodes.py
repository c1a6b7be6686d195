"""Reading YAML: which scalars are what, where each value stands, and which files are refused."""

import math
import os
from pathlib import Path

import pytest

from lora_recipes.errors import EXIT_REFUSED, EXIT_USER
from lora_recipes.recipe import InvalidRecipe, Origin, Problem
from lora_recipes.recipe.nodes import MAX_BYTES, Node, parse_file, parse_override, parse_text


def value_of(text: str) -> object:
    node = parse_text(f"key: {text}\n", "r.yaml", [])
    assert node is not None
    return node.plain()["key"]


def parsed(folder: Path, content: str | bytes) -> Node:
    path = folder / "r.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return parse_file(path, [])


def refusal(folder: Path, content: str | bytes) -> InvalidRecipe:
    with pytest.raises(InvalidRecipe) as raised:
        parsed(folder, content)
    return raised.value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 0.0002),
        ("1e-4", 0.0001),
        ("2E+3", 2000.0),
        ("1.0e-3", 0.001),
        (".5", 0.5),
        ("1.", 1.0),
        ("-.5", -0.5),
        ("-.inf", -math.inf),
    ],
)
def test_a_float_is_a_float_with_or_without_a_point(text: str, value: float) -> None:
    assert value_of(text) == value
    assert isinstance(value_of(text), float)


def test_nan_is_a_float() -> None:
    assert math.isnan(value_of(".nan"))


@pytest.mark.parametrize(("text", "value"), [("0", 0), ("16", 16), ("-3", -3), ("+5", 5)])
def test_an_integer_is_an_integer(text: str, value: int) -> None:
    assert value_of(text) == value
    assert isinstance(value_of(text), int)


@pytest.mark.parametrize(
    "text", ["no", "yes", "on", "off", "y", "n", "012", "12:30", "1_000", "0x10", "2024-01-01", "e5", "1e", "NO"]
)
def test_these_stay_text(text: str) -> None:
    assert value_of(text) == text


@pytest.mark.parametrize("text", ["'5'", '"5"'])
def test_a_quoted_number_is_text(text: str) -> None:
    assert value_of(text) == "5"


@pytest.mark.parametrize("text", ["null", "Null", "NULL", "~", ""])
def test_null_has_four_spellings_and_an_empty_value(text: str) -> None:
    assert value_of(text) is None


@pytest.mark.parametrize(("text", "value"), [("true", True), ("True", True), ("false", False), ("FALSE", False)])
def test_only_true_and_false_are_booleans(text: str, value: bool) -> None:
    assert value_of(text) is value


def test_a_key_stays_text_whatever_it_looks_like(tmp_path: Path) -> None:
    assert parsed(tmp_path, "1: a\nno: b\n2e-4: c\nnull: d\n").plain() == {
        "1": "a",
        "no": "b",
        "2e-4": "c",
        "null": "d",
    }


def test_every_value_knows_the_line_and_column_of_its_key_and_of_itself(tmp_path: Path) -> None:
    root = parsed(tmp_path, "lora:\n  r: 16\n  target_modules: [q_proj, v_proj]\n")
    file = str(tmp_path / "r.yaml")
    assert root.value["lora"].key == Origin(file, 1, 1)
    assert root.value["lora"].origin == Origin(file, 2, 3)
    assert root.find(["lora", "r"]).key == Origin(file, 2, 3)
    assert root.find(["lora", "r"]).origin == Origin(file, 2, 6)
    assert root.find(["lora", "target_modules", 1]).origin == Origin(file, 3, 28)


def test_leaves_are_the_values_that_are_no_mappings_and_empty_mappings(tmp_path: Path) -> None:
    root = parsed(tmp_path, "lora: {r: 16, rank_pattern: {q: 8}, alpha_pattern: {}}\nmerge: null\n")
    assert [(key, node.plain()) for key, node in root.leaves()] == [
        ("lora.r", 16),
        ("lora.rank_pattern.q", 8),
        ("lora.alpha_pattern", {}),
        ("merge", None),
    ]


def test_leaves_and_entries_go_into_a_list_of_mappings(tmp_path: Path) -> None:
    root = parsed(tmp_path, "dataset:\n  - path: a\n    data_files: {train: b}\n  - path: c\nlora: [1, [2]]\nx: []\n")
    leaves = ["dataset.0.path", "dataset.0.data_files.train", "dataset.1.path", "lora", "x"]
    assert [key for key, _ in root.leaves()] == leaves
    assert {key for key, _ in root.entries()} - set(leaves) == {
        "dataset",
        "dataset.0",
        "dataset.0.data_files",
        "dataset.1",
    }


def test_a_duplicate_key_in_a_list_of_mappings_is_named_by_its_full_path(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("dataset:\n  - path: a\n  - path: b\n    path: c\n")
    problems: list[Problem] = []
    parse_file(tmp_path / "r.yaml", problems)
    assert [problem.key for problem in problems] == ["dataset.1.path"]


def test_an_origin_reads_file_and_line_and_a_whole_file_has_no_line() -> None:
    assert str(Origin("r.yaml", 3, 5)) == "r.yaml:3"
    assert str(Origin("r.yaml")) == "r.yaml"


def test_a_duplicate_key_names_both_lines(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("lora:\n  r: 16\n  lora_alpha: 32\n  r: 8\n")
    problems: list[Problem] = []
    parse_file(path, problems)
    [problem] = problems
    assert problem.origin == Origin(str(path), 4, 3)
    assert "line 2" in problem.message
    assert "`lora.r`" in str(problem)


def test_a_duplicate_key_is_named_by_its_full_path(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("lora:\n  r: 16\n  r: 8\n")
    problems: list[Problem] = []
    parse_file(path, problems)
    assert [problem.key for problem in problems] == ["lora.r"]


def test_a_tab_is_shown_with_its_place_and_a_caret(tmp_path: Path) -> None:
    error = refusal(tmp_path, "lora:\n\tr: 16\n")
    first, source, caret = str(error).splitlines()
    assert first.startswith(f"{tmp_path / 'r.yaml'}:2:1: a tab stands here")
    assert source.strip() == "→r: 16"
    assert caret.index("^") == source.index("→")
    assert error.exit_code == EXIT_USER


def test_broken_indentation_is_shown_with_its_place_and_a_caret(tmp_path: Path) -> None:
    error = refusal(tmp_path, "lora: 1\n  r: 16\n")
    first, source, caret = str(error).splitlines()
    assert first.startswith(f"{tmp_path / 'r.yaml'}:2:4: ")
    assert source.endswith("  r: 16")
    assert source[caret.index("^")] == ":"


@pytest.mark.parametrize("content", ["", "\n\n", "# nothing but a comment\n", "null\n", "---\n"])
def test_a_file_without_content_is_said_to_be_empty(tmp_path: Path, content: str) -> None:
    error = refusal(tmp_path, content)
    assert str(error).startswith(f"{tmp_path / 'r.yaml'}: the recipe is empty")
    assert error.exit_code == EXIT_USER


@pytest.mark.parametrize("content", ["- lora\n- training\n", "lora\n", "42\n"])
def test_the_top_of_a_recipe_is_a_mapping(tmp_path: Path, content: str) -> None:
    error = refusal(tmp_path, content)
    assert str(error).startswith(f"{tmp_path / 'r.yaml'}:1:1: a recipe must be a mapping of sections")
    assert error.exit_code == EXIT_USER


@pytest.mark.parametrize("content", [b"lora:\n  bias: \xff\n", b"a: 1\nlora: \xe4\n"])
def test_bytes_that_are_not_utf8_are_refused_with_their_line(tmp_path: Path, content: bytes) -> None:
    assert str(refusal(tmp_path, content)).startswith(f"{tmp_path / 'r.yaml'}:2: not UTF-8")


def test_utf16_is_refused_as_not_utf8(tmp_path: Path) -> None:
    assert "not UTF-8" in str(refusal(tmp_path, "lora: 1\n".encode("utf-16")))


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    assert parsed(tmp_path, b"\xef\xbb\xbflora: 1\n").plain() == {"lora": 1}


def test_windows_line_ends_change_nothing(tmp_path: Path) -> None:
    root = parsed(tmp_path, "lora:\r\n  r: 16\r\n")
    assert root.plain() == {"lora": {"r": 16}}
    assert root.find(["lora", "r"]).key.line == 2


@pytest.mark.parametrize("character", ["\x00", "\x07", "\x1b"])
def test_a_control_character_is_refused_with_its_line(tmp_path: Path, character: str) -> None:
    error = refusal(tmp_path, f"model: 日本\nlora: a{character}b\n")
    assert str(error).startswith(f"{tmp_path / 'r.yaml'}:2: control characters")
    assert error.exit_code == EXIT_USER


def test_more_than_the_largest_recipe_is_refused(tmp_path: Path) -> None:
    error = refusal(tmp_path, "# " + "x" * MAX_BYTES)
    assert error.exit_code == EXIT_REFUSED
    assert "1,000,000" in str(error)


def test_a_recipe_that_never_ends_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    for name in ("pipe.yaml", "zero.yaml"):
        with pytest.raises(InvalidRecipe, match=rf"{name}: is a pipe or a device") as raised:
            parse_file(tmp_path / name, [])
        assert raised.value.exit_code == EXIT_USER


def test_the_largest_recipe_itself_is_read(tmp_path: Path) -> None:
    text = "lora: 1\n# "
    assert parsed(tmp_path, text + "x" * (MAX_BYTES - len(text))).plain() == {"lora": 1}


@pytest.mark.parametrize(
    "value",
    ["!!python/object:os.system x", "!!python/object/apply:os.system [id]", "!!python/name:os.system ''", "!mine 1"],
)
def test_a_tag_is_refused(tmp_path: Path, value: str) -> None:
    error = refusal(tmp_path, f"lora:\n  r: {value}\n")
    assert str(error).startswith(f"{tmp_path / 'r.yaml'}:2:6: the tag")
    assert error.exit_code == EXIT_REFUSED


def test_a_tag_on_a_key_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, "!!python/object:os.system lora: 1\n").exit_code == EXIT_REFUSED


@pytest.mark.parametrize("value", ["!!int x", "!!int 0x10", "!!float x", "!!bool yes", "!!null x"])
def test_a_core_tag_on_a_text_that_does_not_fit_is_one_problem(tmp_path: Path, value: str) -> None:
    error = refusal(tmp_path, f"lora:\n  r: {value}\n")
    assert str(error).startswith(f"{tmp_path / 'r.yaml'}:2:6: ")


def test_an_alias_is_refused(tmp_path: Path) -> None:
    error = refusal(tmp_path, "lora: &shared {r: 16}\nmerge: *shared\n")
    assert str(error).startswith(f"{tmp_path / 'r.yaml'}:2:8: the alias `*shared` is refused")
    assert "extends" in str(error)
    assert error.exit_code == EXIT_REFUSED


def test_nested_aliases_are_refused_before_they_grow(tmp_path: Path) -> None:
    levels = "".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]\n" for n in range(1, 10))
    assert refusal(tmp_path, f"l0: &l0 x\n{levels}").exit_code == EXIT_REFUSED


@pytest.mark.parametrize("depth", [400, 3000])
def test_nesting_deeper_than_any_recipe_is_one_problem(tmp_path: Path, depth: int) -> None:
    error = refusal(tmp_path, f"lora: {'[' * depth}{']' * depth}\n")
    assert str(error).startswith(f"{tmp_path / 'r.yaml'}")


@pytest.mark.parametrize("digits", [41, 400, 5000])
def test_an_integer_too_long_to_read_is_one_problem(tmp_path: Path, digits: int) -> None:
    error = refusal(tmp_path, f"lora:\n  r: {'9' * digits}\n")
    assert str(error).startswith(f"{tmp_path / 'r.yaml'}:2:6: ")


def test_a_key_that_is_no_scalar_is_one_problem_without_the_parsers_insides(tmp_path: Path) -> None:
    error = refusal(tmp_path, "lora:\n  ? [a, b]\n  : 3\n")
    assert "ScalarNode" not in str(error)


def test_a_second_document_is_refused(tmp_path: Path) -> None:
    assert ":2:1: " in str(refusal(tmp_path, "lora: 1\n---\nlora: 2\n"))


def test_a_missing_file_suggests_the_names_that_are_near(tmp_path: Path) -> None:
    for name in ("smollm2-lora.yaml", "llama2-qlora.yaml"):
        (tmp_path / name).write_text("lora: 1\n")
    with pytest.raises(InvalidRecipe) as raised:
        parse_file(tmp_path / "smollm-lora.yaml", [])
    assert str(raised.value).startswith(f"{tmp_path / 'smollm-lora.yaml'}: no such file; did you mean ")
    assert str(tmp_path / "smollm2-lora.yaml") in str(raised.value)
    assert raised.value.exit_code == EXIT_USER


def test_a_missing_file_with_nothing_near_says_where_to_look(tmp_path: Path) -> None:
    with pytest.raises(InvalidRecipe, match="no such file") as raised:
        parse_file(tmp_path / "smollm2.yaml", [])
    assert f"`ls {tmp_path}`" in str(raised.value)


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(InvalidRecipe, match="is a folder; name a recipe file") as raised:
        parse_file(tmp_path, [])
    assert raised.value.exit_code == EXIT_USER


def test_a_loop_of_links_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.symlink_to(path)
    with pytest.raises(InvalidRecipe, match="cannot be read"):
        parse_file(path, [])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 0.0002),
        ("no", "no"),
        ("null", None),
        ("", None),
        ("[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("{train: a.jsonl}", {"train": "a.jsonl"}),
    ],
)
def test_an_override_is_read_by_the_rules_of_a_file(text: str, value: object) -> None:
    assert parse_override(text, "command line").plain() == value


def test_every_part_of_an_override_stands_on_the_command_line() -> None:
    node = parse_override("{train: [a, b]}", "command line (x)")
    for part in (node, node.find(["train"]), node.find(["train", 1])):
        assert part.origin == part.key == Origin("command line (x)")


def test_a_duplicate_key_in_an_override_is_a_problem() -> None:
    with pytest.raises(InvalidRecipe, match="already set"):
        parse_override("{r: 1, r: 2}", "command line")
