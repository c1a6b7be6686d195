"""Files become chunks of rows, each row with its true place; a broken row is kept, with what is wrong with it.

JSON and CSV are read here, line by line: `datasets` gives no line numbers, fills absent keys with nulls, and reads the
text "007" of a CSV file as a number. Parquet and Arrow are read by pyarrow, the hub by `datasets`.
"""

import csv
import io
import json
import re
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE, getincrementaldecoder
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from lora_recipes.data.files import COMPRESSED, DataFile, Source, local_files
from lora_recipes.data.formats import JSON, BadRow
from lora_recipes.errors import DataError, MachineError, RefusedError

CHUNK_BYTES = 1 << 20  # of JSON lines
CHUNK_ROWS = 1000
LONGEST_ROW = 1 << 27  # bytes of a line, or characters of the window through which a JSON array is read
EXCERPT = 80  # characters of a broken line that a message repeats
ARROW_FILE = b"ARROW1"
SPACE = re.compile(r"\s*")
PAIRS = json.JSONDecoder(object_pairs_hook=list)
UTF16 = "looks like UTF-16; save the file as UTF-8"
GBK = re.compile(rb"(?:[\x00-\x7f]|[\xa1-\xf7][\xa1-\xfe])*")  # Chinese in pairs of bytes; Latin-1 has them singly
# How files begin that are no text, whatever they are called.
BINARY = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstandard",
    b"PK\x03\x04": "a zip archive",
    b"PAR1": "Parquet",
    ARROW_FILE: "Arrow",
}


@dataclass(frozen=True)
class Chunk:
    """Some rows in file order: whole lines of JSON (`lines`), rows as JSON text (`texts`), or rows that are parsed (`rows`).

    Attributes:
        file: as the recipe names it.
        first: number of the first line, from 1.
        unit: "line" or "row", what the numbers count.
    """

    file: str
    unit: str
    first: int = 1
    lines: bytes = b""
    texts: list[tuple[int, str]] = field(default_factory=list)
    rows: list[tuple[int, Any]] = field(default_factory=list)

    def place(self, number: int) -> str:
        """`file:line`, or `file row N` where rows are not lines."""
        return f"{self.file}:{number}" if self.unit == "line" else f"{self.file} row {number}"


def rows_of(chunk: Chunk) -> Iterator[tuple[int, Any]]:
    """(number, row) of a chunk; a BadRow in the row's place when it is broken."""
    if chunk.lines:
        for number, line in enumerate(chunk.lines.split(b"\n"), start=chunk.first):
            if line and not line.isspace():
                yield number, _parsed_line(line)
    for number, text in chunk.texts:
        yield number, _parsed(text)
    yield from chunk.rows


def _parsed_line(line: bytes) -> Any:
    try:
        return _parsed(line.removeprefix(BOM_UTF8).decode())
    except UnicodeDecodeError as error:
        return BadRow("encoding", "", not_utf8(error.object, error.start), _raw(line))


def _parsed(text: str) -> Any:
    try:
        row = JSON.decode(text)
        if isinstance(row, dict) and (key := _twice(text, row)) is not None:
            return BadRow("broken_json", "", f"broken JSON: has the key `{key}` twice", text)
        return row
    except json.JSONDecodeError as error:
        return BadRow("broken_json", f"column {error.colno}", _said(error), text)
    except (ValueError, RecursionError) as error:
        return BadRow("broken_json", "", _unreadable(error), text)


def _twice(text: str, row: dict[str, Any]) -> str | None:
    """A key that the row has twice, of which `json` keeps the last in silence.

    Counting takes a fraction of the time of parsing, so only a row whose text has a key again, perhaps deeper down, is
    parsed in pairs.
    """
    for key in row:
        if text.count(f'"{key}"') != 1:
            break
    else:
        return None
    names = [name for name, _ in PAIRS.decode(text)]
    return next((name for name in names if names.count(name) > 1), None) if len(names) > len(row) else None


def _raw(line: bytes) -> str:
    return line.decode("utf-8", "replace")


def _said(error: json.JSONDecodeError) -> str:
    if error.doc.count("\0") > len(error.doc) // 4:
        return UTF16
    if _ends_early(error):
        return (
            "broken JSON: the line ends mid-row (cut off here, or the row goes on in the next line, but a row must be one "
            f"line): …{_printable(error.doc[-EXCERPT:])}"
        )
    start = max(0, error.pos - EXCERPT // 2)
    return f"broken JSON: {error.msg}: …{_printable(error.doc[start : start + EXCERPT])}"


def _ends_early(error: json.JSONDecodeError) -> bool:
    return error.msg.startswith("Unterminated string") or not error.doc[error.pos :].strip()


def _unreadable(error: Exception) -> str:
    """Of JSON that is whole and cannot be held all the same."""
    return "broken JSON: " + ("it is nested too deep" if isinstance(error, RecursionError) else str(error))


def _printable(text: str) -> str:
    """On one line, and nothing in it that a terminal would obey."""
    return "".join(sign if sign.isprintable() else "\ufffd" for sign in " ".join(text.split()))


def not_utf8(line: bytes, at: int) -> str:
    """What is wrong with a line that is no UTF-8 from the byte `at` on, and what it may be."""
    if line.count(b"\0") > len(line) // 4:
        return UTF16
    if line[at] == 0xED:  # the only sequence of UTF-8's form that begins so and is refused
        return "holds half of a surrogate pair; write the character itself"
    name, codec = ("GBK", "gb18030") if GBK.fullmatch(line) else ("Latin-1", "latin-1")
    around = line[:at].decode("utf-8", "replace")[-10:] + line[at : at + 20].decode(codec, "replace")[:10]
    return f"byte 0x{line[at]:02X} is not UTF-8; as {name} it reads “{_printable(around)}”: save the file as UTF-8"


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
        except PermissionError:
            raise MachineError(f"{file.path} may not be read by this user; change the permission") from None


@contextmanager
def _opened(file: DataFile) -> Iterator[io.BufferedReader]:
    """The file's bytes, uncompressed, after its byte order mark.

    Raises:
        DataError: it is no UTF-8 text at all.
    """
    path = file.path
    with _uncompressed(path) if path.suffix in COMPRESSED else path.open("rb") as stream:
        head = stream.peek(1 << 12)[: 1 << 12]
        for mark, name in BINARY.items():
            if head.startswith(mark):
                raise DataError(
                    f"{path}: is {name}, not {file.kind}; give it its own ending and dataset.path, or unpack it"
                )
        # JSON begins with two ASCII characters; elsewhere a share of zeros tells.
        zeros = b"\0" in head[:4] if file.kind == "json" else head.count(b"\0") > len(head) // 4
        if head.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) or zeros:
            raise DataError(f"{path}:1: {UTF16}")
        stream.read(len(BOM_UTF8) if head.startswith(BOM_UTF8) else 0)
        yield stream


def _uncompressed(path: Path) -> io.BufferedReader:
    import fsspec

    try:
        stream = fsspec.open(str(path), "rb", compression=COMPRESSED[path.suffix]).open()
    except ValueError as error:  # a codec that is not installed
        raise MachineError(f"{path}: cannot be uncompressed here: {error}; uncompress it, or use gzip") from None
    return io.BufferedReader(_Unpacking(path, stream), CHUNK_BYTES)


class _Unpacking(io.RawIOBase):
    """A compressed file; one that breaks off is named with the line that was the last to come out of it."""

    def __init__(self, path: Path, stream: Any) -> None:
        self.path, self.stream, self.line = path, stream, 1

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            block = self.stream.read1(len(buffer))  # `read` would lose what it has when it fails
        except Exception as error:  # each codec has its own
            raise DataError(f"{self.path}:{self.line}: the file ends mid-row or is damaged here: {error}") from None
        self.line += block.count(b"\n")
        buffer[: len(block)] = block
        return len(block)

    def close(self) -> None:
        self.stream.close()
        super().close()


def _json_chunks(file: DataFile) -> Iterator[Chunk]:
    """JSON lines, or one JSON array of rows."""
    with _opened(file) as stream:
        array = stream.peek(1 << 12).lstrip()[:1] == b"["
        yield from _array_chunks(file.path, stream) if array else _line_chunks(file.path, stream)


def _line_chunks(path: Path, stream: io.BufferedReader) -> Iterator[Chunk]:
    first, rest = 1, b""
    while block := stream.read(CHUNK_BYTES):
        cut = block.rfind(b"\n") + 1
        if not cut:
            rest += block
            if len(rest) > LONGEST_ROW:
                raise DataError(f"{path}:{first}: the line is longer than {LONGEST_ROW >> 20} MiB")
            continue
        lines, rest = rest + block[:cut], block[cut:]
        yield Chunk(str(path), "line", first, lines=lines)
        first += lines.count(b"\n")
    if rest.strip():
        yield Chunk(str(path), "line", first, lines=rest)


def _array_chunks(path: Path, stream: io.BufferedReader) -> Iterator[Chunk]:
    rows = _array_rows(path, stream)
    while batch := list(islice(rows, CHUNK_ROWS)):
        yield Chunk(str(path), "line", batch[0][0], texts=batch)


def _array_rows(path: Path, stream: io.BufferedReader) -> Iterator[tuple[int, str]]:
    """(line, row as JSON text) of one JSON array: text travels faster than objects, and however deep it is nested."""
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

    def __init__(self, path: Path, stream: io.BufferedReader) -> None:
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

    def value(self) -> tuple[int, str]:
        """(line, text) of the JSON value that comes next."""
        if not self.peek():
            raise DataError(f"{self.path}:{self.line}: the file ends mid-row: its JSON array is not closed")
        while True:
            try:
                _, end = JSON.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                if len(self.text) - self.at < LONGEST_ROW and self._grow():
                    continue
                raise DataError(self._broken(error)) from None
            except (ValueError, RecursionError) as error:
                raise DataError(f"{self.path}:{self.line}: {_unreadable(error)}") from None
            line, found = self.line, self.text[self.at : end]
            self.line += found.count("\n")
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
            line = self.line + self.text.count("\n", self.at) + error.object.count(b"\n", 0, error.start)
            begin = error.object.rfind(b"\n", 0, error.start) + 1
            told = not_utf8(error.object[begin:].split(b"\n")[0], error.start - begin)
            raise DataError(f"{self.path}:{line}: {told}") from None
        self.at = 0
        return bool(block)

    def _broken(self, error: json.JSONDecodeError) -> str:
        line = self.line + self.text.count("\n", self.at, error.pos)
        if _ends_early(error):
            return f"{self.path}:{line}: the file ends mid-row (the row begins in line {self.line})"
        column = error.pos - self.text.rfind("\n", 0, error.pos)
        return f"{self.path}:{line}:{column}: {_said(error)}"


def _csv_chunks(file: DataFile) -> Iterator[Chunk]:
    """Every cell is text, as it is written. The number is that of the line on which a row begins."""
    csv.field_size_limit(2**31 - 1)
    delimiter = "\t" if ".tsv" in file.path.suffixes else ","
    with _opened(file) as stream:
        rows = _csv_rows(file.path, stream, delimiter)
        while batch := list(islice(rows, CHUNK_ROWS)):
            yield Chunk(str(file.path), "line", batch[0][0], rows=batch)


def _csv_rows(path: Path, stream: io.BufferedReader, delimiter: str) -> Iterator[tuple[int, Any]]:
    foreign: list[str] = []  # what is wrong with lines that are no UTF-8, until their row is known

    def lines() -> Iterator[str]:
        for line in stream:
            try:
                yield line.decode()
            except UnicodeDecodeError as error:
                foreign.append(not_utf8(line, error.start))
                yield _raw(line)

    names: list[str] = []
    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            ends = "unexpected end" in str(error)
            what = (
                "the file ends mid-row: a quote that this row opens is never closed" if ends else f"broken CSV: {error}"
            )
            raise DataError(
                f"{path}:{number}: {what}; mend it: from here on rows cannot be told apart, so `bad_rows: skip` cannot "
                "skip it"
            ) from None
        if not cells:
            continue  # a blank line
        if not names:
            names = cells
            twice = [name for name in names if name and names.count(name) > 1]
            if foreign or twice:
                raise DataError(
                    f"{path}:{number}: {foreign[0] if foreign else f'the column `{twice[0]}` is there twice'}"
                )
        elif foreign:
            yield number, BadRow("encoding", "", foreign[0], delimiter.join(cells))
            foreign.clear()
        elif len(cells) == len(names):
            yield number, dict(zip(names, cells, strict=True))
        else:
            yield (
                number,
                BadRow("columns", "", f"has {len(cells)} cells for {len(names)} columns", delimiter.join(cells)),
            )


def _text_chunks(file: DataFile) -> Iterator[Chunk]:
    """One row a line, as the field `text`."""
    with _opened(file) as stream:
        rows = (
            (number, _text_row(line.rstrip(b"\r\n"))) for number, line in enumerate(stream, start=1) if line.strip()
        )
        while batch := list(islice(rows, CHUNK_ROWS)):
            yield Chunk(str(file.path), "line", batch[0][0], rows=batch)


def _text_row(line: bytes) -> Any:
    try:
        return {"text": line.removeprefix(BOM_UTF8).decode()}
    except UnicodeDecodeError as error:
        return BadRow("encoding", "", not_utf8(error.object, error.start), _raw(line))


def _table_chunks(file: DataFile) -> Iterator[Chunk]:
    """Parquet and Arrow, which `datasets` would read no differently but with torch imported."""
    import pyarrow

    try:
        yield from _chunked(_table_rows(file), str(file.path))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, PermissionError):
            raise
        raise DataError(
            f"{file.path}: is no whole {file.kind} file (cut off, damaged or of another kind): {error}"
        ) from None


def _table_rows(file: DataFile) -> Iterator[dict[str, Any]]:
    for batch in _parquet_batches(file.path) if file.kind == "parquet" else _arrow_batches(file.path):
        columns = [(name, _with_json(batch.schema.field(name).type)) for name in batch.schema.names]
        for start in range(0, len(batch), CHUNK_ROWS):
            for row in batch.slice(start, CHUNK_ROWS).to_pylist():
                yield {name: _cell(row[name], kind) for name, kind in columns}


def _parquet_batches(path: Path) -> Iterator[Any]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as table:
        yield from table.iter_batches(CHUNK_ROWS)


def _arrow_batches(path: Path) -> Iterator[Any]:
    import pyarrow

    with pyarrow.memory_map(str(path)) as mapped:
        if mapped.read(len(ARROW_FILE)) == ARROW_FILE:
            table = pyarrow.ipc.open_file(mapped)
            yield from (table.get_batch(number) for number in range(table.num_record_batches))
        else:
            mapped.seek(0)
            yield from pyarrow.ipc.open_stream(mapped)


def _with_json(kind: Any) -> Any:
    """A column's Arrow type where JSON text lies in it, as `datasets` stores objects of many shapes; else None."""
    return kind if "arrow.json" in str(kind) else None


def _cell(value: Any, kind: Any = None) -> Any:
    """A value without nulls in its mappings: Arrow fills in each key that another row has. JSON text keeps its own."""
    if isinstance(value, dict):
        return {
            name: _cell(child, kind and kind.field(name).type) for name, child in value.items() if child is not None
        }
    if isinstance(value, list):
        return [_cell(child, kind and kind.value_type) for child in value]
    return JSON.decode(value) if isinstance(value, str) and hasattr(kind, "extension_name") else value


def _hub_chunks(source: Source, split: str) -> Iterator[Chunk]:
    rows = ({name: _cell(value) for name, value in row.items()} for row in load_hub(source, split))
    yield from _chunked(rows, f"{source.keys['path']} {split}")


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


def _chunked(rows: Iterator[dict[str, Any]], name: str) -> Iterator[Chunk]:
    numbered = enumerate(rows, start=1)
    while batch := list(islice(numbered, CHUNK_ROWS)):
        yield Chunk(name, "row", batch[0][0], rows=batch)


READERS = {
    "json": _json_chunks,
    "csv": _csv_chunks,
    "text": _text_chunks,
    "parquet": _table_chunks,
    "arrow": _table_chunks,
}
