"""Files that cannot be read, D1, D12 to D15 and D28, and their harmless neighbours: named by file and line, exit code 2."""

import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_recipes.data.check import check_data
from lora_recipes.data.problems import RAW
from lora_recipes.errors import DataError
from lora_recipes.recipe import Recipe
from tests.data_room.rows import ANSWER, GOOD, Seen, chat, lines, refusal


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="D1"),
        pytest.param(b"\n  \n\t\n\r\n", id="D1-white-space"),
        pytest.param(b"\xef\xbb\xbf", id="D1-byte-order-mark"),
        pytest.param(b"[]", id="D1-array"),
        pytest.param(b" [\n]\n", id="D1-array-over-lines"),
    ],
)
def test_a_file_without_rows_is_named(recipe_of: Callable[..., Recipe], audit: Callable[..., Seen], content: bytes):
    recipe = recipe_of(content)
    assert "rows.jsonl: split `train` has no rows" in refusal(recipe)
    seen = audit(recipe)
    assert seen.code == 2 and seen.text == refusal(recipe)


# -- D12 to D15: broken files -----------------------------------------------------------------------------------------

GOOD_LINE = json.dumps(GOOD).encode()
BROKEN = [
    ("D12", b'{"messages": [}', r"^rows\.jsonl:3:15: broken JSON: Expecting value: …\{\"messages\": \[\}$"),
    ("D12-two-on-a-line", GOOD_LINE + GOOD_LINE, r"^rows\.jsonl:3:\d+: broken JSON: Extra data"),
    ("D12-single-quotes", b"{'text': 1}", r"^rows\.jsonl:3:2: broken JSON: Expecting property name"),
    ("D12-no-json", b"hello", r"^rows\.jsonl:3:1: broken JSON: Expecting value: …hello$"),
    ("D12-nan", b'{"messages": NaN}', r"^rows\.jsonl:3: broken JSON: NaN is no JSON$"),
    ("D12-infinity", b'{"messages": -Infinity}', r"^rows\.jsonl:3: broken JSON: -Infinity is no JSON$"),
    ("D12-deep", b"[" * 100_000 + b"]" * 100_000, r"^rows\.jsonl:3: broken JSON: it is nested too deep$"),
    ("D12-long-number", b'{"messages": ' + b"9" * 5000 + b"}", r"^rows\.jsonl:3: broken JSON: Exceeds the limit"),
    ("D12-raw-nul", b'{"messages": "\0"}', r"^rows\.jsonl:3:15: broken JSON: Invalid control character"),
    ("D12-escape-codes", b'{"messages": \x1b[31m}', "^rows\\.jsonl:3:14: broken JSON: Expecting value: …[^\\x1b]*$"),
    (
        "D14",
        b'{"messages": "caf\xe9 au"}',
        r"^rows\.jsonl:3: byte 0xE9 is not UTF-8; as Latin-1 .*café au",
    ),
    ("D14-gbk", '{"messages": "你好"}'.encode("gbk"), r"^rows\.jsonl:3: .* is not UTF-8; as GBK it reads .*你好"),
    ("D14-surrogate", b'{"messages": "\xed\xa0\xbd"}', r"^rows\.jsonl:3: holds half of a surrogate pair"),
    ("D14-utf-16-line", '{"messages": 1}'.encode("utf-16-be"), r"^rows\.jsonl:3:1: looks like UTF-16"),
    ("D15", GOOD_LINE[:40], r"^rows\.jsonl:3:\d+: broken JSON: the line ends mid-row"),
    ("D15-after-a-comma", GOOD_LINE[:-3], r"^rows\.jsonl:3:\d+: broken JSON: the line ends mid-row"),
]


@pytest.mark.parametrize(("line", "said"), [pytest.param(*case, id=name) for name, *case in BROKEN])
def test_a_broken_line_is_named_and_repeated_in_part(
    recipe_of: Callable[..., Recipe], audit: Callable[..., Seen], line: bytes, said: str
):
    recipe = recipe_of(b"\n".join([GOOD_LINE, GOOD_LINE, line]))
    with pytest.raises(DataError, match=said.replace("$", "\n")) as caught:
        check_data(recipe)
    assert len(str(caught.value).splitlines()[0].partition("…")[2]) <= 80
    assert "1 of 3 rows cannot be trained on" in str(caught.value)
    seen = audit(recipe)
    assert seen.code == 2 and seen.text == str(caught.value)
    rejected = json.loads(Path("outputs/tiny/rejected.jsonl").read_text())
    assert rejected["row"] == line.decode("utf-8", "replace")[:RAW]


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"\n\n" + GOOD_LINE + b"\n \n\n" + GOOD_LINE + b"\n\n", id="D13"),
        pytest.param(b"\xef\xbb\xbf" + GOOD_LINE + b"\n" + GOOD_LINE, id="D13-byte-order-mark"),
        pytest.param(b"\xef\xbb\xbf" + GOOD_LINE + b"\n\xef\xbb\xbf" + GOOD_LINE, id="D13-joined-files"),
        pytest.param(GOOD_LINE + b"\r\n\r\n" + GOOD_LINE + b"\r\n", id="D13-crlf"),
        pytest.param(b"[" + GOOD_LINE + b"," + GOOD_LINE + b"]", id="D13-array"),
        pytest.param(
            b"\xef\xbb\xbf \n" + json.dumps([GOOD, GOOD], indent=2).encode() + b"\r\n", id="D13-array-over-lines"
        ),
    ],
)
def test_harmless_forms_of_a_file_are_read(
    recipe_of: Callable[..., Recipe], audit: Callable[..., Seen], content: bytes
):
    seen = audit(recipe_of(content))
    assert seen.code == 0 and seen.report["rows"] == 2 and seen.report["duplicates"] == 1


FILES = [
    ("D14-utf-16", "rows.jsonl", json.dumps(GOOD).encode("utf-16"), r"^rows\.jsonl:1: looks like UTF-16"),
    ("D14-utf-16-be", "rows.jsonl", b"\xfe\xff" + GOOD_LINE.decode().encode("utf-16-be"), r"rows\.jsonl:1: .*UTF-16"),
    ("D14-utf-16-no-mark", "rows.jsonl", GOOD_LINE.decode().encode("utf-16-le"), r"^rows\.jsonl:1: .*UTF-16"),
    ("D14-utf-16-chinese", "rows.jsonl", ('{"text": "' + "你好" * 999 + '"}').encode("utf-16-be"), r":1: .*UTF-16"),
    ("D14-utf-16-csv", "rows.csv", "text\nhello\n".encode("utf-16"), r"^rows\.csv:1: looks like UTF-16"),
    ("D14-latin-csv", "rows.csv", b"text,b\nok,1\ncaf\xe9,2\n", r"^rows\.csv:3: byte 0xE9"),
    ("D14-latin-names", "rows.csv", b"text,\xe9\nok,1\n", r"^rows\.csv:1: byte 0xE9"),
    (
        "D14-latin-array",
        "rows.json",
        b'[\n{"text": "a"},\n{"text": "\xe9"}\n]',
        r"^rows\.json:3: byte 0xE9",
    ),
    ("D14-latin-text", "rows.txt", b"ok\n\ncaf\xe9\n", r"^rows\.txt:3: byte 0xE9"),
    (
        "D15-array",
        "rows.json",
        json.dumps([GOOD] * 3, indent=1).encode()[:-30],
        r"^rows\.json:3\d: the file ends mid-row",
    ),
    ("D15-array-open", "rows.json", b"[" + GOOD_LINE + b"\n,", r"^rows\.json:2: the file ends mid-row"),
    (
        "D15-array-no-end",
        "rows.json",
        b"[" + GOOD_LINE + b"\n",
        r"^rows\.json:2: the file ends mid-row: its JSON array",
    ),
    (
        "D15-gzip",
        "rows.jsonl.gz",
        gzip.compress(lines(*[GOOD] * 9000))[:-200],
        r"^rows\.jsonl\.gz:\d+: the file ends mid-row",
    ),
    ("D15-short-gzip", "rows.jsonl.gz", gzip.compress(GOOD_LINE)[:40], r"^rows\.jsonl\.gz:1: the file ends mid-row"),
    ("D15-no-gzip", "rows.jsonl.gz", GOOD_LINE, r"^rows\.jsonl\.gz:1: the file ends mid-row or is damaged here"),
    (
        "D15-damaged-gzip",
        "rows.jsonl.gz",
        gzip.compress(GOOD_LINE * 9)[:20] + b"\0" * 60,
        r"rows\.jsonl\.gz:1: .* damaged",
    ),
    (
        "D15-xz",
        "rows.json.xz",
        lzma.compress(b"[" + GOOD_LINE + b"]")[:-50],
        r"^rows\.json\.xz:1: the file ends mid-row",
    ),
    ("D15-no-bzip2", "rows.csv.bz2", b"text\nhello\n", r"^rows\.csv\.bz2:1: the file ends mid-row or is damaged here"),
    ("D15-csv-quote", "rows.csv", b'text,b\nok,1\n"begun,2\nmore,3\n', r"^rows\.csv:3: the file ends mid-row: a quote"),
    ("D12-csv-quote", "rows.csv", b'text,b\n"a"b,1\n', r"^rows\.csv:2: broken CSV"),
    ("D12-csv-names", "rows.csv", b"text,text\na,b\n", r"^rows\.csv:1: the column `text` is there twice"),
    ("D12-csv-cells", "rows.csv", b"text,b\nok,1\nonly\n", r"^rows\.csv:3: has 1 cells for 2 columns"),
    (
        "D12-array",
        "rows.json",
        b'[{"text": "a"},\n{"text" "b"}]',
        r"^rows\.json:2:9: broken JSON: Expecting ':' delimiter",
    ),
    (
        "D12-array-comma",
        "rows.json",
        b'[{"text": "a"}\n{"text": "b"}]',
        r"^rows\.json:2:1: broken JSON: `,` expected, found",
    ),
    (
        "D12-array-after",
        "rows.json",
        b'[{"text": "a"}]\n{"text": "b"}',
        r"^rows\.json:2: text after the end of the JSON array",
    ),
    ("D12-array-deep", "rows.json", b"[\n" + b"[" * 100_000, r"^rows\.json:2: broken JSON: it is nested too deep"),
    ("D12-array-nan", "rows.json", b'[\n{"text": NaN}]', r"^rows\.json:2: broken JSON: NaN is no JSON"),
    (
        "D12-array-scalars",
        "rows.json",
        b'[1,\n"a"]',
        r"^rows\.json:1: a row must be an object with named fields, found a number",
    ),
    (
        "D12-pretty-object",
        "rows.json",
        json.dumps(GOOD, indent=1).encode(),
        r"^rows\.json:1:2: .*a row must be one line",
    ),
    (
        "D12-scalars",
        "rows.jsonl",
        b"5\n6\n",
        r"^rows\.jsonl:1: a row must be an object with named fields, found a number",
    ),
    ("D12-gzip-inside", "rows.jsonl", gzip.compress(GOOD_LINE), r"^rows\.jsonl: is gzip, not json"),
    ("D12-parquet-inside", "rows.jsonl", b"PAR1\x15\x04", r"^rows\.jsonl: is Parquet, not json"),
    ("D28-zip-inside", "rows.jsonl", b"PK\x03\x04\x14\x00", r"^rows\.jsonl: is a zip archive, not json"),
]


@pytest.mark.parametrize(("name", "content", "said"), [pytest.param(*case, id=key) for key, *case in FILES])
def test_a_broken_file_is_named(
    recipe_of: Callable[..., Recipe], audit: Callable[..., Seen], name: str, content: bytes, said: str
):
    path = {".csv": "csv", ".txt": "text"}.get(Path(name.removesuffix(".bz2")).suffix, "json")
    recipe = recipe_of(content, name, path=path, training={"assistant_only_loss": False})
    seen = audit(recipe)
    with pytest.raises(DataError, match=said):
        check_data(recipe)
    assert seen.code == 2 and seen.text == refusal(recipe)


def test_d15_a_truncated_gzip_file_is_named_with_the_line_it_breaks_off_in(
    recipe_of: Callable[..., Recipe], workdir: Path
):
    rows = [json.dumps(chat({"role": "user", "content": os.urandom(99).hex()}, ANSWER)) for _ in range(5000)]
    content = gzip.compress(("\n".join(rows) + "\n").encode())
    message = refusal(recipe_of(content[: len(content) // 2], "rows.jsonl.gz"))
    line = int(message.split(":")[1])
    assert 2000 < line < 3000


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_d15_a_truncated_table_is_named(
    recipe_of: Callable[..., Recipe], audit: Callable[..., Seen], workdir: Path, kind: str
):
    import datasets

    rows = datasets.Dataset.from_list([GOOD] * 2000)
    if kind == "parquet":
        rows.to_parquet(workdir / "whole")
    else:
        rows.save_to_disk(workdir / "saved")
        next((workdir / "saved").glob("*.arrow")).rename(workdir / "whole")
    content = (workdir / "whole").read_bytes()
    recipe = recipe_of(content[: len(content) // 2], f"rows.{kind}", path=kind)
    assert refusal(recipe).startswith(f"rows.{kind}: is no whole {kind} file (cut off, damaged or of another kind)")
    assert audit(recipe).code == 2
    recipe = recipe_of(b"hello", f"rows.{kind}", path=kind)
    assert refusal(recipe).startswith(f"rows.{kind}: is no whole {kind} file (cut off, damaged or of another kind)")
