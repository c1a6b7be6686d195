"""The same rows from every kind of file, each with the number it has in its file, however the file is cut into chunks."""

import bz2
import csv
import gzip
import importlib.util
import json
import lzma
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_recipes.data import readers, scan
from lora_recipes.data.check import Checking, check_data
from lora_recipes.data.files import Source, sources
from lora_recipes.data.formats import BadRow, RowSettings
from lora_recipes.data.forms import settings_of
from lora_recipes.data.problems import excerpt_of, problem_of
from lora_recipes.data.readers import read_split, rows_of
from lora_recipes.errors import DataError, MachineError
from lora_recipes.recipe import Recipe, load_recipe

Recipes = Callable[..., Recipe]
Numbered = list[tuple[str, Any]]

ROWS = [
    {"prompt": f"question {number}, with a comma", "completion": f'answer "{number}"\nin two lines — 中文 é 👍'}
    for number in range(7)
] + [{"prompt": "007", "completion": "1.50"}, {"prompt": " null ", "completion": "true"}]


@pytest.fixture
def on(write_recipe: Callable[..., Path]) -> Recipes:
    """A recipe on what `dataset` names; the rows are read for training, and nothing is held out."""

    def build(
        data_files: Any = None, path: str = "json", training: dict[str, Any] | None = None, **keys: Any
    ) -> Recipe:
        dataset = {"path": path, "data_files": data_files, "eval_split": None, **keys}
        return load_recipe(write_recipe(dataset=dataset, training=training or {}))

    return build


def source_of(recipe: Recipe) -> Source:
    return sources(recipe)[0]


def read(recipe: Recipe, split: str = "train") -> Numbered:
    """(place, row) of every row of a split."""
    chunks = read_split(source_of(recipe), split)
    return [(chunk.place(number), row) for chunk in chunks for number, row in rows_of(chunk)]


def rows(recipe: Recipe, split: str = "train") -> list[Any]:
    return [row for _, row in read(recipe, split)]


def places(recipe: Recipe, split: str = "train") -> list[str]:
    return [place for place, _ in read(recipe, split)]


def jsonl(given: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in given)


def separated(path: Path, given: list[dict[str, Any]], delimiter: str = ",") -> None:
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(given[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(given)


def write(name: str, given: list[Any] | None = None) -> str:
    """A file in the form that its name says; returns the builder that reads it."""
    import datasets

    path, given = Path(name), given or ROWS
    path.parent.mkdir(parents=True, exist_ok=True)
    text = jsonl(given)
    if path.suffix in (".gz", ".bz2", ".xz"):
        path.write_bytes({".gz": gzip, ".bz2": bz2, ".xz": lzma}[path.suffix].compress(text.encode()))
    elif path.suffix in (".jsonl", ".ndjson"):
        path.write_text(text, encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(given, ensure_ascii=False), encoding="utf-8")
    elif path.suffix in (".csv", ".tsv"):
        separated(path, given, "\t" if path.suffix == ".tsv" else ",")
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(given).to_parquet(path)
    elif path.suffix == ".arrow":
        datasets.Dataset.from_list(given).save_to_disk(path.with_suffix(""))
        next(path.with_suffix("").glob("*.arrow")).rename(path)
    elif path.suffix == ".file":
        import pyarrow

        table = pyarrow.Table.from_pylist(given)
        with pyarrow.ipc.new_file(str(path), table.schema) as sink:
            sink.write_table(table, max_chunksize=2)
    return {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow", ".file": "arrow"}.get(
        path.suffix, "json"
    )


NAMES = (
    "a.jsonl",
    "a.ndjson",
    "a.json",
    "a.csv",
    "a.tsv",
    "a.parquet",
    "a.arrow",
    "a.file",
    "a.jsonl.gz",
    "a.jsonl.bz2",
    "a.jsonl.xz",
)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_rows_come_from_every_kind_of_file(on: Recipes, name: str):
    recipe = on(name, write(name))
    assert rows(recipe) == ROWS
    check_data(recipe)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv.gz", b"prompt,completion\r\na,b\r\n"),
        ("a.tsv.xz", b"prompt\tcompletion\na\tb\n"),
        ("a.json.bz2", b'[{"prompt": "a", "completion": "b"}]'),
    ],
)
def test_compressed_files_of_other_kinds(on: Recipes, name: str, content: bytes):
    Path(name).write_bytes({"gz": gzip, "xz": lzma, "bz2": bz2}[name.split(".")[-1]].compress(content))
    assert rows(on(name, "json" if "json" in name else "csv")) == [{"prompt": "a", "completion": "b"}]


def test_a_compression_that_is_not_installed_is_named_with_a_way_out(on: Recipes, workdir: Path):
    Path("a.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    if importlib.util.find_spec("zstandard"):
        import zstandard

        Path("a.jsonl.zst").write_bytes(zstandard.compress(jsonl(ROWS).encode()))
        assert rows(on("a.jsonl.zst")) == ROWS
    else:
        with pytest.raises(
            MachineError, match=r"^a\.jsonl\.zst: cannot be uncompressed here: .*; uncompress it, or use"
        ):
            rows(on("a.jsonl.zst"))


def test_every_line_of_a_text_file_is_a_row(on: Recipes):
    Path("a.txt").write_bytes("\ufefffirst\r\n\n  \nsecond — 中文 \n\ufeffthird, \x0bno end".encode())
    assert read(on("a.txt", "text")) == [
        ("a.txt:1", {"text": "first"}),
        ("a.txt:4", {"text": "second — 中文 "}),
        ("a.txt:5", {"text": "third, \x0bno end"}),
    ]


def test_cells_of_a_csv_file_stay_text_as_it_is_written(on: Recipes):
    Path("a.csv").write_bytes('\ufeffid,text,"a, b"\n007,1.50,\n,"NA, ""x""",null\n'.encode())
    assert rows(on("a.csv", "csv")) == [
        {"id": "007", "text": "1.50", "a, b": ""},
        {"id": "", "text": 'NA, "x"', "a, b": "null"},
    ]


# -- numbers ----------------------------------------------------------------------------------------------------------


def test_rows_have_the_number_of_the_line_they_begin_in(on: Recipes):
    Path("a.csv").write_bytes(b'text\n\nfirst\n"second\nover\r\n\nlines"\nthird\n')
    assert places(on("a.csv", "csv")) == ["a.csv:3", "a.csv:4", "a.csv:8"]
    Path("a.jsonl").write_bytes(b'\n{"text": 1}\n\n \r\n{"text": 2}\r\n{"text": 3}')
    assert places(on("a.jsonl")) == ["a.jsonl:2", "a.jsonl:5", "a.jsonl:6"]
    Path("a.json").write_text("\n" + json.dumps([{"text": "a\n"}, {"text": ["b", "c"]}, {"text": "d"}], indent=2))
    assert places(on("a.json")) == ["a.json:3", "a.json:6", "a.json:12"]
    Path("b.json").write_text('[{"text": 1}, {"text": 2},\n\n\n{"text": 3}\n,{"text": 4}]')
    assert places(on("b.json")) == ["b.json:1", "b.json:1", "b.json:4", "b.json:5"]


def test_rows_of_tables_are_counted_from_one(on: Recipes):
    for name in ("a.parquet", "a.arrow", "a.file"):
        kind = write(name, [{"text": str(number)} for number in range(2500)])
        assert places(on(name, kind)) == [f"{name} row {number}" for number in range(1, 2501)]


@pytest.mark.parametrize("size", [1, 2, 7, 64, 1000])
@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "pretty.json", "a.jsonl.gz", "crlf.jsonl", "no-end.jsonl", "a.csv"]
)
def test_rows_and_numbers_do_not_depend_on_where_chunks_end(
    on: Recipes, monkeypatch: pytest.MonkeyPatch, name: str, size: int
):
    given = [{"text": f"{number} 中文 👍 " + "x" * (number % 13)} for number in range(40)]
    text = {
        "pretty.json": lambda: json.dumps(given, indent=1, ensure_ascii=False),
        "crlf.jsonl": lambda: jsonl(given).replace("\n", "\r\n\r\n"),
        "no-end.jsonl": lambda: jsonl(given).rstrip("\n"),
    }
    kind = "json"
    if name in text:
        Path(name).write_bytes(text[name]().encode())
    else:
        kind = write(name, given)
    whole = read(on(name, kind))
    assert [row for _, row in whole] == given
    monkeypatch.setattr(readers, "CHUNK_BYTES", size)
    monkeypatch.setattr(readers, "CHUNK_ROWS", max(1, size // 10))
    assert read(on(name, kind)) == whole


@pytest.mark.parametrize("size", [1, 5, 50, 1 << 20])
def test_broken_lines_are_found_across_chunks(on: Recipes, monkeypatch: pytest.MonkeyPatch, size: int):
    monkeypatch.setattr(readers, "CHUNK_BYTES", size)
    Path("a.jsonl").write_bytes(b'{"text": "a"}\n{"text" "b"}\n\n{"text": "\xe9"}\n{"text": "c"}\n{"te')
    found = read(on("a.jsonl"))
    kinds = [row.kind if isinstance(row, BadRow) else row["text"] for _, row in found]
    assert kinds == ["a", "broken_json", "encoding", "c", "broken_json"]
    assert [place for place, _ in found] == [f"a.jsonl:{line}" for line in (1, 2, 4, 5, 6)]
    Path("a.json").write_bytes(b'[{"text": "a"},\n{"text": "b"},\n{"text" "c"}]')
    with pytest.raises(DataError, match=r"^a\.json:3:9: broken JSON: Expecting ':' delimiter"):
        read(on("a.json"))
    Path("a.json").write_bytes('[{"text": "a 中文"},\n{"text": "b"},\n{"text": "中文'.encode() + b'\xe9"}]')
    with pytest.raises(DataError, match=r"^a\.json:3: byte 0xE9 is not UTF-8"):
        read(on("a.json"))


def test_a_line_without_end_is_refused_before_memory_is_full(on: Recipes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(readers, "CHUNK_BYTES", 100)
    monkeypatch.setattr(readers, "LONGEST_ROW", 1000)
    Path("a.jsonl").write_text('{"text": "a"}\n' + '{"text": "' + "b" * 5000 + '"}\n')
    with pytest.raises(DataError, match=r"^a\.jsonl:2: the line is longer than"):
        read(on("a.jsonl"))
    Path("a.json").write_text('[{"text": "a"},\n{"text": "' + "b" * 5000)
    with pytest.raises(DataError, match=r"^a\.json:2: "):
        read(on("a.json"))


# -- rows that JSON itself lets through --------------------------------------------------------------------------------


def nested(levels: int) -> str:
    return '{"prompt": "q", "completion": "a", "more": ' + "[" * levels + "]" * levels + "}"


@pytest.mark.parametrize("levels", [400, 700])
def test_a_row_that_is_nested_deep_is_one_row_in_an_array_as_in_lines(
    on: Recipes, monkeypatch: pytest.MonkeyPatch, levels: int
):
    plain = [json.dumps(conversation(number)) for number in range(20)]
    plain[7] = nested(levels)
    Path("a.jsonl").write_text("\n".join(plain))
    Path("a.json").write_text("[" + ",\n".join(plain) + "]")
    monkeypatch.setattr(scan, "SMALL", 0)
    monkeypatch.setattr(readers, "CHUNK_ROWS", 5)
    monkeypatch.setattr(readers, "CHUNK_BYTES", 200)
    expected = [problem for _, (_, problems) in scanned(on("a.jsonl"), 2) for problem in problems]
    for processes in (1, 2):
        found = scanned(on("a.json"), processes)
        assert sum(count for _, (count, _) in found) == 20
        problems = [problem for _, (_, problems) in found for problem in problems]
        assert [(problem.number, problem.kind) for problem in problems] == [
            (problem.number, problem.kind) for problem in expected
        ]


@pytest.mark.parametrize(
    ("row", "key"),
    [
        ('{"prompt": "a", "completion": "b", "prompt": "c"}', "prompt"),
        ('{"prompt" : "a", "prompt"\t:{"prompt": "c"}}', "prompt"),
        ('{"问题": 1, "b": {"问题": 1}, "问题": 2}', "问题"),
        (r'{"\u95ee": 1, "\u95ee": 2}', "问"),
        (r'{"a\"b": 1, "a\"b": 2}', 'a"b'),
        ('{"": 1, "": 2}', ""),
    ],
)
def test_a_key_that_a_row_has_twice_is_a_broken_row(on: Recipes, row: str, key: str):
    good = '{"prompt": "a \\"prompt\\": b", "more": {"prompt": ["prompt", {"more": "prompt"}]}, "\\u95ee": "\\u95ee"}'
    Path("a.jsonl").write_text(f"{good}\n{row}\n{good}\n", encoding="utf-8")
    Path("a.json").write_text(f"[{good},\n{row},\n{good}]\n", encoding="utf-8")
    for name in ("a.jsonl", "a.json"):
        first, bad, last = rows(on(name))
        assert first == last == json.loads(good)
        assert isinstance(bad, BadRow) and bad.kind == "broken_json" and bad.raw == row
        assert bad.message == f"broken JSON: has the key `{key}` twice"


def test_what_is_said_of_a_row_holds_nothing_that_a_terminal_obeys():
    chunk = readers.Chunk("a.jsonl", "line")
    bad = BadRow(
        "unknown_role", "messages[0].\x1b[2J", "role \x9b31m\r\n\u202e\u2028\ud800 中文 👨‍👩‍👧 \u3000 is unknown"
    )
    problem = problem_of(bad, 0, 1, chunk)
    assert problem.field == r"messages[0].\x1b[2J"
    assert problem.message == r"role \x9b31m\r\n\u202e\u2028\ud800 中文 👨‍👩‍👧 " + "\u3000 is unknown"


def test_a_row_that_can_only_just_be_parsed_is_not_repeated():
    row: Any = {}
    for _ in range(5000):
        row = [row]
    assert excerpt_of({"text": row}) == ""


@pytest.mark.parametrize("content", [b'text,b\nok,1\n"begun,2\nmore,3\n', b'text,b\n"a"b,1\n'])
def test_a_csv_row_after_which_no_row_can_be_told_apart_says_that_skipping_is_no_help(on: Recipes, content: bytes):
    Path("a.csv").write_bytes(content)
    with pytest.raises(DataError, match=r"^a\.csv:[23]: .*; mend it: .*told apart.*`bad_rows: skip` cannot skip it"):
        rows(on("a.csv", "csv", bad_rows="skip"))


# -- which files ------------------------------------------------------------------------------------------------------

PARTS = [[{"text": f"{part} {number}"} for number in range(3)] for part in range(3)]


@pytest.fixture
def parts(workdir: Path) -> Path:
    """Three files in a folder, and one of another kind."""
    for number, given in enumerate(PARTS):
        write(f"parts/part-{number}.jsonl", given)
    Path("parts/notes.md").write_text("no data")
    write("parts/deeper/part-9.jsonl.gz", [{"text": "deeper"}])
    return workdir / "parts"


@pytest.mark.usefixtures("parts")
def test_files_may_be_listed_matched_or_gathered_from_a_folder(on: Recipes):
    everything = [row for part in PARTS for row in part]
    assert rows(on("parts/part-*.jsonl")) == everything
    assert rows(on({"train": ["parts/part-2.jsonl", "parts/part-0.jsonl"]})) == PARTS[2] + PARTS[0]
    assert rows(on(["parts/part-1.jsonl", "parts/part-*.jsonl"])) == PARTS[1] + PARTS[0] + PARTS[2]
    assert rows(on("part-1.jsonl", data_dir="parts")) == PARTS[1]
    assert rows(on("parts")) == [{"text": "deeper"}, *everything]
    assert rows(on("parts/**/*.gz")) == [{"text": "deeper"}]
    assert rows(on(str(Path("parts/part-?.jsonl").absolute()))) == everything
    assert (
        places(on({"train": "parts/part-0.jsonl", "held": "parts/part-1.jsonl"}), "held")[0] == "parts/part-1.jsonl:1"
    )


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"data_files": "gone.jsonl"}, r"no such data file: gone\.jsonl \(seen from "),
        ({"data_files": "gone-*.jsonl"}, r"no file matches gone-\*\.jsonl \(seen from "),
        ({"data_files": "parts", "path": "parquet"}, r"no parquet file \(\.parquet\) in the folder parts"),
        ({"data_files": {"held": "parts"}}, r"there is no split `train`; splits: held"),
        ({"data_files": None, "path": "parts/deeper/none"}, r"'parts/deeper/none' is neither a builder \(json, csv"),
    ],
)
def test_files_that_are_not_there_are_named_with_the_line_of_the_recipe(on: Recipes, keys: dict[str, Any], said: str):
    with pytest.raises((DataError, MachineError), match=r"tiny\.yaml:\d+: " + said):
        read(on(**keys))


def test_a_file_that_may_not_be_read_is_the_machines_fault(on: Recipes, monkeypatch: pytest.MonkeyPatch):
    write("a.jsonl")
    source = source_of(on("a.jsonl"))

    def closed(*args: Any, **keywords: Any) -> Any:
        raise PermissionError(13, "Permission denied", "a.jsonl")

    monkeypatch.setattr(Path, "open", closed)
    with pytest.raises(MachineError, match=r"^a\.jsonl may not be read by this user; change the permission"):
        list(read_split(source, "train"))


def test_a_folder_may_be_a_data_set_whose_file_names_say_the_split(on: Recipes):
    write("set/train-00000-of-00002.jsonl", PARTS[0])
    write("set/train-00001-of-00002.jsonl", PARTS[1])
    write("set/test.jsonl", PARTS[2])
    Path("set/README.md").write_text("# about")
    recipe = on(None, "set", training={"assistant_only_loss": False})
    assert rows(recipe) == PARTS[0] + PARTS[1] and rows(recipe, "test") == PARTS[2]
    assert places(recipe, "test")[1] == "set/test.jsonl:2"
    check_data(recipe)
    with pytest.raises(DataError, match=r"tiny\.yaml:\d+: the folder set has no split `held`; splits found: t"):
        rows(recipe, "held")
    write("sets/one/data/train.csv", PARTS[0])
    assert rows(on(None, "sets", data_dir="one")) == PARTS[0]
    Path("empty").mkdir()
    with pytest.raises(DataError, match=r"tiny\.yaml:\d+: no data files in the folder empty"):
        rows(on(None, "empty"))


def test_a_folder_that_datasets_saved_is_read(on: Recipes):
    import datasets

    datasets.Dataset.from_list(PARTS[0] * 2).save_to_disk("saved", num_shards=2)
    assert rows(on("saved/*.arrow", "arrow")) == PARTS[0] * 2
    assert rows(on("saved", "arrow")) == PARTS[0] * 2
    assert rows(on(None, "saved")) == PARTS[0] * 2
    assert places(on(None, "saved"))[3] == "saved/data-00001-of-00002.arrow row 1"
    splits = {"train": datasets.Dataset.from_list(PARTS[0]), "test": datasets.Dataset.from_list(PARTS[1])}
    datasets.DatasetDict(splits).save_to_disk("both")
    assert rows(on(None, "both")) == PARTS[0] and rows(on(None, "both"), "test") == PARTS[1]


# -- tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_keys_that_arrow_fills_in_are_left_out_again(on: Recipes, name: str):
    given = [
        {
            "messages": [{"role": "user", "content": "a", "name": None}, {"role": "assistant", "content": "b"}],
            "note": None,
        },
        {"messages": [{"role": "user", "content": "c", "name": "d"}], "note": "e"},
    ]
    found = rows(on(name, write(name, given)))
    assert found[0]["messages"] == [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert found[0]["note"] is None and found[1] == given[1]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_objects_of_many_shapes_that_datasets_keeps_as_json_text_are_objects(on: Recipes, kind: str):
    import datasets

    given = [
        {
            "tools": [{"name": "f", "parameters": parameters}],
            "text": "{}",
            "more": None if number else {"a": {"b": None}},
        }
        for number, parameters in enumerate(({"a": None, "b": 1.0}, {"a": "x", "c": [{}]}))
    ]
    made = datasets.Dataset.from_list(given, on_mixed_types="use_json")
    if kind == "parquet":
        made.to_parquet("a.parquet")
    else:
        made.save_to_disk("saved")
    found = rows(on("a.parquet" if kind == "parquet" else "saved", kind))
    assert [row["tools"] for row in found] == [row["tools"] for row in given]
    assert [row["text"] for row in found] == ["{}", "{}"]


# -- slices, and many processes ---------------------------------------------------------------------------------------


def conversation(number: int) -> dict[str, Any]:
    return {"prompt": f"question {number}", "completion": f"answer {number}"}


def test_only_the_rows_of_a_slice_count(on: Recipes):
    given: list[Any] = [conversation(number) for number in range(20)]
    given[3], given[15] = {"prompt": None, "completion": "x"}, {"prompt": "x"}
    write("a.jsonl", given)
    check_data(on("a.jsonl", split="train[4:15]"))
    check_data(on("a.jsonl", split="train[:10%]"))
    with pytest.raises(DataError, match=r"^a\.jsonl:4: `prompt` is null.*\n1 of 3 rows"):
        check_data(on("a.jsonl", split="train[2:5]"))
    with pytest.raises(DataError, match=r"^a\.jsonl:16: `completion` is missing.*\n1 of 10 rows"):
        check_data(on("a.jsonl", split="train[50%:]"))
    for split in ("train[20:]", "train[5:2]"):
        with pytest.raises(DataError, match=r"tiny\.yaml:\d+: split `train\[.*\]` of a\.jsonl has no rows"):
            check_data(on("a.jsonl", split=split))
    with pytest.raises(DataError, match=r"tiny\.yaml:\d+: 'train\[x\]' is no split with a slice"):
        check_data(on("a.jsonl", split="train[x]"))


def scanned(recipe: Recipe, processes: int) -> list[Any]:
    source = source_of(recipe)
    settings = settings_of(source)
    return [(chunk.first, done) for chunk, done in scan.scan(source, "train", Checking(settings), processes)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_many_processes_find_the_same_in_the_same_order(on: Recipes, monkeypatch: pytest.MonkeyPatch, name: str):
    given = [conversation(number) | ({"prompt": ""} if number % 50 == 7 else {}) for number in range(600)]
    kind = write(name, given)
    monkeypatch.setattr(readers, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(readers, "CHUNK_ROWS", 17)
    alone = scanned(on(name, kind), 1)
    assert len(alone) > 20 and sum(count for _, (count, _) in alone) == 600
    with pytest.raises(DataError) as before:
        check_data(on(name, kind, training={"dataset_num_proc": 1}))
    monkeypatch.setattr(scan, "SMALL", 0)
    assert scanned(on(name, kind), 2) == alone
    with pytest.raises(DataError) as after:
        check_data(on(name, kind, training={"dataset_num_proc": 2}))
    assert str(after.value) == str(before.value) and "12 of 600 rows" in str(after.value)


class Killed:
    def __call__(self, chunk: Any) -> Any:
        import os

        os._exit(9)


def test_a_process_that_is_killed_is_the_machines_fault(on: Recipes, monkeypatch: pytest.MonkeyPatch):
    write("a.jsonl")
    monkeypatch.setattr(scan, "SMALL", 0)
    with pytest.raises(MachineError, match=r"was killed, most likely for memory; set training\.dataset_num_proc=1"):
        list(scan.scan(source_of(on("a.jsonl")), "train", Killed(), 2))


def test_a_broken_file_is_named_from_many_processes_too(on: Recipes, monkeypatch: pytest.MonkeyPatch):
    Path("a.json").write_text(json.dumps([conversation(number) for number in range(50)])[:-9])
    monkeypatch.setattr(scan, "SMALL", 0)
    monkeypatch.setattr(readers, "CHUNK_ROWS", 5)
    source = source_of(on("a.json"))
    with pytest.raises(DataError, match=r"^a\.json:1: the file ends mid-row"):
        list(scan.scan(source, "train", Checking(RowSettings("prompt_completion", {})), 2))


def test_what_is_kept_of_a_sound_file_is_no_row(on: Recipes, tmp_path: Path):
    write("a.jsonl")
    check_data(on("a.jsonl"))
    (kept,) = (tmp_path / "cache").rglob("*.sound.json")
    assert json.loads(kept.read_text()) == {"rows": len(ROWS)} and stat.S_ISREG(kept.stat().st_mode)
