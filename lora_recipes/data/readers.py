"""Files become chunks of rows, each row with its true place; a broken row is kept, with what is wrong with it.

JSON and CSV are read here, line by line: `datasets` gives no line numbers, fills absent keys with nulls, and reads the
text "007" of a CSV file as a number. Parquet, Arrow and the hub are read by `datasets`.
"""

import csv
import io
import json
import re
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE, getincrementaldecoder
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from lora_recipes.data.files import COMPRESSED, DataFile, Source, local_files
from lora_recipes.data.formats import BadRow
from lora_recipes.errors import DataError, MachineError, RefusedError

CHUNK_BYTES = 1 << 20  # of JSON lines
CHUNK_ROWS = 1000
LONGEST_ROW = 1 << 27  # bytes; a JSON array is read through a window of at most this size
EXCERPT = 80  # characters of a broken line that a message repeats
SPACE = re.compile(r"\s*")


@dataclass(frozen=True)
class Chunk:
    """Some rows in file order: either whole lines of JSON (`lines`), or rows that are parsed (`rows`).

    Attributes:
        file: as the recipe names it.
        first: number of the first line, from 1.
        unit: "line" or "row", what the numbers count.
    """

    file: str
    unit: str
    first: int = 1
    lines: bytes = b""
    rows: list[tuple[int, Any]] = field(default_factory=list)

    def place(self, number: int) -> str:
        """`file:line`, or `file row N` where rows are not lines."""
        return f"{self.file}:{number}" if self.unit == "line" else f"{self.file} row {number}"


def rows_of(chunk: Chunk) -> Iterator[tuple[int, Any]]:
    """(number, row) of a chunk; a BadRow in the row's place when it is broken."""
    if not chunk.lines:
        yield from chunk.rows
        return
    for number, line in enumerate(chunk.lines.split(b"\n"), start=chunk.first):
        if line and not line.isspace():
            yield number, _parsed(line)


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except UnicodeDecodeError as error:
        return BadRow("encoding", "", not_utf8(line, error))
    except json.JSONDecodeError as error:
        return BadRow("broken_json", f"column {error.colno}", _said(error))
    except RecursionError:
        return BadRow("broken_json", "", "is nested too deep to be read")


def _said(error: json.JSONDecodeError) -> str:
    start = max(0, error.pos - EXCERPT // 2)
    excerpt = " ".join(error.doc[start : start + EXCERPT].split())
    return f"broken JSON: {error.msg}: …{excerpt}"


def not_utf8(line: bytes, error: UnicodeDecodeError) -> str:
    """What is wrong with bytes that are no UTF-8, and what they may be."""
    if line.count(b"\0") > len(line) // 4:
        return "looks like UTF-16; save the file as UTF-8"
    around = line[max(0, error.start - 10) : error.start + 10].decode("latin-1").strip()
    return (
        f"byte {error.start + 1} of the line (0x{line[error.start]:02X}) is not UTF-8; as Latin-1 it reads “{around}”: "
        "save the file as UTF-8"
    )


def read_split(source: Source, split: str) -> Iterator[Chunk]:
    """The chunks of a split, whole: a slice in brackets is for the caller.

    Raises:
        DataError: a file that is missing, damaged, or of another kind.
        MachineError: a file that may not be read, a hub data set that cannot be reached.
    """
    if source.is_hub():
        yield from _hub_chunks(source, split.split("[")[0])
        return
    for file in local_files(source, split):
        try:
            yield from READERS[file.kind](file)
        except UnicodeDecodeError as error:
            raise DataError(f"{file.path}: {not_utf8(error.object, error)}") from None
        except EOFError:
            raise DataError(f"{file.path}: the file ends too early: it was cut off while it was written") from None
        except PermissionError:
            raise MachineError(f"{file.path} may not be read by this user; change the permission") from None


def open_bytes(path: Path) -> BinaryIO:
    """The file's bytes, uncompressed."""
    if path.suffix not in COMPRESSED:
        return path.open("rb")
    import fsspec

    try:
        return fsspec.open(str(path), "rb", compression="infer").open()
    except ValueError as error:  # a codec that is not installed
        raise MachineError(f"{path}: cannot be uncompressed here: {error}; uncompress it, or use gzip") from None


def _json_chunks(file: DataFile) -> Iterator[Chunk]:
    """JSON lines, or one JSON array of rows."""
    with _wrapped(file.path) as stream:
        head = stream.read(1 << 12)
        _refuse_utf16(file.path, head)
        stream.seek(0)
        if head.startswith(BOM_UTF8):
            stream.read(len(BOM_UTF8))
        if head.removeprefix(BOM_UTF8).lstrip()[:1] == b"[":
            yield from _array_chunks(file.path, stream)
        else:
            yield from _line_chunks(file.path, stream)


def _wrapped(path: Path) -> Any:
    stream = open_bytes(path)
    return io.BufferedReader(stream, CHUNK_BYTES) if path.suffix in COMPRESSED else stream


def _refuse_utf16(path: Path, head: bytes) -> None:
    if head.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) or (head and head.count(b"\0") > len(head) // 4):
        raise DataError(f"{path}:1: the file looks like UTF-16; save it as UTF-8")


def _line_chunks(path: Path, stream: BinaryIO) -> Iterator[Chunk]:
    first, rest = 1, b""
    for block in _blocks(path, stream, first):
        cut = block.rfind(b"\n") + 1
        if not cut:
            rest += block
            continue
        lines, rest = rest + block[:cut], block[cut:]
        yield Chunk(str(path), "line", first, lines=lines)
        first += lines.count(b"\n")
    if rest.strip():
        yield Chunk(str(path), "line", first, lines=rest)


def _blocks(path: Path, stream: BinaryIO, first: int) -> Iterator[bytes]:
    """Blocks of bytes; a compressed file that breaks off is named with the last line that came out of it."""
    line = first
    try:
        while block := stream.read(CHUNK_BYTES):
            yield block
            line += block.count(b"\n")
    except (EOFError, OSError) as error:
        if path.suffix not in COMPRESSED:
            raise
        raise DataError(f"{path}:{line}: the file ends mid-row or is damaged after this line: {error}") from None


def _array_chunks(path: Path, stream: BinaryIO) -> Iterator[Chunk]:
    rows = _array_rows(path, stream)
    while batch := list(islice(rows, CHUNK_ROWS)):
        yield Chunk(str(path), "line", batch[0][0], rows=batch)


def _array_rows(path: Path, stream: BinaryIO) -> Iterator[tuple[int, Any]]:
    """(line, row) of one JSON array."""
    window = _Window(path, stream)
    window.take("[")
    if window.peek() == "]":
        return
    while True:
        yield window.value()
        if window.peek() == "]":
            break
        window.take(",")
    window.take("]")
    if window.peek():
        raise DataError(f"{path}:{window.line}: text after the end of the JSON array")


class _Window:
    """A window of text that slides over a JSON file, so that the file need not fit in memory."""

    def __init__(self, path: Path, stream: BinaryIO) -> None:
        self.path, self.stream = path, stream
        self.decoder = getincrementaldecoder("utf-8")()
        self.text, self.at, self.line = "", 0, 1

    def peek(self) -> str:
        """The next character that is no white space; "" at the end of the file."""
        while True:
            end = SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
            self.line += self.text.count("\n", self.at, end)
            self.at = end
            if end < len(self.text):
                return self.text[end]
            if not self._grow():
                return ""

    def take(self, expected: str) -> None:
        """Step over one character of punctuation."""
        found = self.peek()
        if not found:
            raise DataError(f"{self.path}:{self.line}: the file ends mid-row: its JSON array is not closed")
        if found != expected:
            column = self.at - self.text.rfind("\n", 0, self.at)
            raise DataError(f"{self.path}:{self.line}:{column}: broken JSON: `{expected}` expected, found {found!r}")
        self.at += 1

    def value(self) -> tuple[int, Any]:
        """(line, value) of the JSON value that comes next."""
        if not self.peek():
            raise DataError(f"{self.path}:{self.line}: the file ends mid-row: its JSON array is not closed")
        while True:
            try:
                found, end = json.JSONDecoder().raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                if len(self.text) - self.at < LONGEST_ROW and self._grow():
                    continue
                raise DataError(self._broken(error)) from None
            line = self.line
            self.line += self.text.count("\n", self.at, end)
            self.at = end
            return line, found

    def _grow(self) -> bool:
        """Read on, keeping what is not used yet; False at the end of the file."""
        block = self.stream.read(max(CHUNK_BYTES, len(self.text) - self.at))
        if not block and not self.decoder.getstate()[0]:
            return False
        try:
            self.text = self.text[self.at :] + self.decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self.path}:{self.line}: in or after this line: {not_utf8(error.object, error)}"
            ) from None
        self.at = 0
        return bool(block)

    def _broken(self, error: json.JSONDecodeError) -> str:
        line = self.line + self.text.count("\n", self.at, error.pos)
        if error.msg.startswith("Unterminated string") or not self.text[error.pos :].strip():
            return f"{self.path}:{line}: the file ends mid-row (the row begins in line {self.line})"
        column = error.pos - self.text.rfind("\n", 0, error.pos)
        return f"{self.path}:{line}:{column}: {_said(error)}"


def _csv_chunks(file: DataFile) -> Iterator[Chunk]:
    """Every cell is text, as it is written. The number is that of the line on which a row begins."""
    csv.field_size_limit(2**31 - 1)
    delimiter = "\t" if ".tsv" in file.path.suffixes else ","
    with _wrapped(file.path) as raw:
        _refuse_utf16(file.path, raw.peek(1 << 12)[: 1 << 12])
        rows = _csv_rows(file.path, csv.reader(io.TextIOWrapper(raw, "utf-8-sig", newline=""), delimiter=delimiter))
        while batch := list(islice(rows, CHUNK_ROWS)):
            yield Chunk(str(file.path), "line", batch[0][0], rows=batch)


def _csv_rows(path: Path, reader: Any) -> Iterator[tuple[int, Any]]:
    names: list[str] = []
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{path}:{number}: broken CSV: {error}") from None
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:{number}: in or after this line: {not_utf8(error.object, error)}") from None
        if not cells:
            continue  # a blank line
        if not names:
            names = cells
        elif len(cells) == len(names):
            yield number, dict(zip(names, cells, strict=True))
        else:
            yield number, BadRow("columns", "", f"has {len(cells)} cells for {len(names)} columns")


def _text_chunks(file: DataFile) -> Iterator[Chunk]:
    """One row a line, as the field `text`."""
    with _wrapped(file.path) as stream:
        _refuse_utf16(file.path, stream.peek(1 << 12)[: 1 << 12])
        rows = (
            (number, _text_row(line.rstrip(b"\r\n"))) for number, line in enumerate(stream, start=1) if line.strip()
        )
        while batch := list(islice(rows, CHUNK_ROWS)):
            yield Chunk(str(file.path), "line", batch[0][0], rows=batch)


def _text_row(line: bytes) -> Any:
    try:
        return {"text": line.decode("utf-8-sig")}
    except UnicodeDecodeError as error:
        return BadRow("encoding", "", not_utf8(line, error))


def _table_chunks(file: DataFile) -> Iterator[Chunk]:
    """Parquet and Arrow. Their cells have one type a column, so a key that is null may be one that was never there."""
    import datasets
    import pyarrow

    try:
        rows = datasets.load_dataset(file.kind, data_files=[str(file.path)], split="train", streaming=True)
        yield from _batches(rows, str(file.path))
    except (pyarrow.ArrowInvalid, pyarrow.ArrowException, OSError, ValueError, StopIteration) as error:
        if isinstance(error, PermissionError):
            raise
        raise DataError(
            f"{file.path}: is no whole {file.kind} file (cut off, damaged or of another kind): {error}"
        ) from None


def _hub_chunks(source: Source, split: str) -> Iterator[Chunk]:
    rows = load_hub(source, split)
    yield from _batches(rows, f"{source.keys['path']} {split}")


def load_hub(source: Source, split: str) -> Any:
    """A hub data set as `datasets` gives it: mapped from its cache, or read as it comes with `streaming`.

    Raises:
        MachineError: it cannot be reached.
        DataError: it has no such split or configuration.
        RefusedError: it wants to run code.
    """
    import datasets

    names = ("path", "name", "data_dir", "data_files", "cache_dir", "revision", "streaming")
    keywords = {key: source.keys[key] for key in names if source.keys.get(key) is not None}
    where = source.where("path")
    try:
        return datasets.load_dataset(**keywords, split=split)
    except ConnectionError as error:
        raise MachineError(f"{where}: cannot reach the data set {keywords['path']!r}: {error}") from None
    except (datasets.exceptions.DatasetNotFoundError, FileNotFoundError) as error:
        raise DataError(
            f"{where}: {keywords['path']!r} is neither a builder (json, csv, parquet, arrow, text), nor a folder here, nor "
            f"a data set on the hub that can be read: {error}"
        ) from None
    except RuntimeError as error:
        if "script" not in str(error):
            raise
        raise RefusedError(
            f"{where}: {keywords['path']!r} runs a script to load its rows; use its Parquet form"
        ) from None
    except ValueError as error:
        raise DataError(f"{where}: the data cannot be read: {error}") from None


def _batches(rows: Any, name: str) -> Iterator[Chunk]:
    numbered = (
        (number, {name: _without_fill(value) for name, value in row.items()})
        for number, row in enumerate(rows, start=1)
    )
    while batch := list(islice(numbered, CHUNK_ROWS)):
        yield Chunk(name, "row", batch[0][0], rows=batch)


def _without_fill(value: Any) -> Any:
    """Nulls out of nested structures: Arrow fills each key that another row has."""
    if isinstance(value, dict):
        return {key: _without_fill(child) for key, child in value.items() if child is not None}
    return [_without_fill(child) for child in value] if isinstance(value, list) else value


READERS = {
    "json": _json_chunks,
    "csv": _csv_chunks,
    "text": _text_chunks,
    "parquet": _table_chunks,
    "arrow": _table_chunks,
}
