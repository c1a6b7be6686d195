"""Rows of a split become tokens on disk, once for each content, template and tokenizer; what was seen is kept beside."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy
import pyarrow

from lora_recipes import console
from lora_recipes.data.content import content_of, settings_key
from lora_recipes.data.files import Source, local_files
from lora_recipes.data.formats import BadRow, Conversation, RowSettings, convert
from lora_recipes.data.masks import (
    IGNORED,
    LITERALS,
    ODD,
    RENDER_BYTES,
    Masker,
    Rendered,
    Tokenized,
    odd_characters,
    require_encodable,
)
from lora_recipes.data.problems import KEPT, Problem, excerpt_of, problem_of
from lora_recipes.data.readers import Chunk, rows_of
from lora_recipes.data.scan import scan
from lora_recipes.data.select import rows_in_slice
from lora_recipes.errors import BrokenFile, DataError
from lora_recipes.limits import watched
from lora_recipes.redact import SECRETS, find_secret
from lora_recipes.run_dir import Locked, cache_folder, published, read_json, require_room, text_sha256, write_json

INT_LIST = pyarrow.list_(pyarrow.int32())
SCHEMA = pyarrow.schema({"input_ids": INT_LIST, "labels": INT_LIST})
# Per good row, in file order. `row` counts the rows of the split from 0, bad ones too; `number` is the line or row of the
# file; `first` and `last` bound the trained tokens; `hash` is the content's.
STATS = {
    "row": numpy.int64,
    "in_file": numpy.int32,
    "number": numpy.int64,
    "length": numpy.int32,
    "trained": numpy.int32,
    "first": numpy.int32,
    "last": numpy.int32,
    "hash": numpy.uint64,
    "flags": numpy.uint16,
}
# Bits of `flags`: these two, one for each kind of odd character, and one for what looks like a secret.
DOUBLE_BOS, THINKING_LEFT_OUT = 1, 2
ODD_FLAGS = {kind: 4 << place for place, kind in enumerate(ODD)}
SECRET = 4 << len(ODD)
DISK_FACTOR = 3  # bytes of tokens a byte of JSON text, at most: 8 bytes a token, a token seldom below 3 characters


@dataclass(frozen=True)
class Prepared:
    """One split of one source.

    Attributes:
        tokens: rows with `input_ids` and `labels`, int32, uncut; None where nothing is kept on disk (streaming).
        stats: column of STATS → array, one entry a good row.
        problems: the first KEPT bad rows; `counts` has all of them by kind.
        rows: rows of the split, good and bad.
        places: file → what its numbers count, in the order of `stats["in_file"]`.
        folder: where it is kept, all bad rows included; None for a stream whose content is not pinned.
        first_row: row of the files that the split begins with (a slice).
    """

    source: Source
    split: str
    settings: RowSettings
    tokens: datasets.Dataset | None
    stats: dict[str, Any]
    problems: list[Problem]
    counts: Counter[str]
    rows: int
    places: list[tuple[str, str]]
    folder: Path | None
    key: str
    first_row: int = 0

    def place(self, index: int) -> str:
        """`file:line` of the good row at `index`."""
        name, unit = self.places[int(self.stats["in_file"][index])]
        number = int(self.stats["number"][index])
        return f"{name}:{number}" if unit == "line" else f"{name} row {number}"


class Tokenizing:
    """The work on one chunk: check, convert, render, tokenize, mask. Picklable, and the same for every chunk."""

    def __init__(self, masker: Masker, settings: RowSettings) -> None:
        self.masker, self.settings = masker, settings
        self.vocabulary = len(masker.tokenizer)

    def __call__(self, chunk: Chunk) -> "Batch":
        with watched(memory=RENDER_BYTES):
            return self._batch(chunk)

    def _batch(self, chunk: Chunk) -> "Batch":
        part, rendered, kept = Batch(), [], []
        for number, row in rows_of(chunk):
            index = part.rows
            part.rows += 1
            try:
                if isinstance(row, BadRow):
                    raise row
                conversation = convert(row, self.settings)
                ready = self._ids(conversation) if conversation.input_ids is not None else self._text(conversation)
            except BadRow as bad:
                part.reject(bad, index, number, chunk, row)
                continue
            except RecursionError:
                part.reject(BadRow("broken_json", "", "is nested too deep"), index, number, chunk, "")
                continue
            rendered.append(ready)
            kept.append((index, number, row))
        texts = [ready for ready in rendered if isinstance(ready, Rendered)]
        made = iter(self.masker.tokenize(texts))
        for ready, (index, number, row) in zip(rendered, kept, strict=True):
            tokens = next(made) if isinstance(ready, Rendered) else ready
            if isinstance(tokens, Tokenized) and not (tokens.labels != IGNORED).any():
                tokens = BadRow("nothing_to_learn", "", "no token of the row carries loss")
            if isinstance(tokens, BadRow):
                part.reject(tokens, index, number, chunk, row)
            else:
                part.add(index, number, tokens, self._flags(ready, tokens))
        part.close()
        return part

    def _text(self, conversation: Conversation) -> Rendered:
        rendered = self.masker.render(conversation)
        require_encodable(rendered.text)
        return rendered

    def _ids(self, conversation: Conversation) -> Tokenized:
        outside = [token for token in conversation.input_ids or [] if not 0 <= token < self.vocabulary] or [
            label for label in conversation.labels or [] if label != IGNORED and not 0 <= label < self.vocabulary
        ]
        if outside:
            raise BadRow(
                "vocabulary",
                "input_ids",
                f"holds the token {outside[0]}; this tokenizer has 0 to {self.vocabulary - 1}",
            )
        return Tokenized(
            numpy.array(conversation.input_ids, numpy.int32), numpy.array(conversation.labels, numpy.int32)
        )

    def _flags(self, ready: Rendered | Tokenized, tokens: Tokenized) -> int:
        bos = self.masker.tokenizer.bos_token_id
        flags = DOUBLE_BOS if bos is not None and list(tokens.input_ids[:2]) == [bos, bos] else 0
        if isinstance(ready, Rendered):
            flags |= THINKING_LEFT_OUT if ready.thinking_left_out else 0
            text = LITERALS.sub("", ready.text)
            flags |= sum(ODD_FLAGS[kind] for kind in odd_characters(text))
        else:
            text = self.masker.tokenizer.decode(tokens.input_ids)
        return flags | (SECRET if find_secret(text) else 0)


class Batch:
    """What one chunk became."""

    def __init__(self) -> None:
        self.rows = 0
        self.problems: list[Problem] = []
        self.rejected: list[dict[str, Any]] = []
        self.counts: Counter[str] = Counter()
        self.ids: Any = []  # arrays of one row each; one flat array once closed
        self.labels: Any = []
        self.rowwise: list[tuple[int, ...]] = []
        self.stats: dict[str, Any] = {}

    def reject(self, bad: BadRow, index: int, number: int, chunk: Chunk, row: Any) -> None:
        problem = problem_of(bad, index, number, chunk)
        self.problems.append(problem)
        self.counts[bad.kind] += 1
        self.rejected.append({**asdict(problem), "raw": excerpt_of(row)})

    def add(self, index: int, number: int, tokens: Tokenized, flags: int) -> None:
        trained = numpy.flatnonzero(tokens.labels != IGNORED)
        content = hashlib.blake2b(tokens.input_ids.tobytes(), digest_size=8)
        content.update(trained[:1].tobytes())  # the same words with loss elsewhere are another lesson
        self.ids.append(tokens.input_ids)
        self.labels.append(tokens.labels)
        self.rowwise.append(
            (
                index,
                0,
                number,
                len(tokens.input_ids),
                len(trained),
                int(trained[0]),
                int(trained[-1]) + 1,
                int.from_bytes(content.digest(), "little"),
                flags,
            )
        )

    def close(self) -> None:
        """Many small arrays become a few large ones, which travel between processes at no cost."""
        columns = zip(*self.rowwise, strict=True) if self.rowwise else [[] for _ in STATS]
        self.stats = {
            name: numpy.array(values, dtype=kind) for (name, kind), values in zip(STATS.items(), columns, strict=True)
        }
        empty = [numpy.zeros(0, numpy.int32)]
        self.ids, self.labels = numpy.concatenate(self.ids or empty), numpy.concatenate(self.labels or empty)
        self.rowwise = []

    def batch(self) -> pyarrow.RecordBatch:
        """The tokens as Arrow lists, without a copy."""
        ends = numpy.concatenate([[0], numpy.cumsum(self.stats["length"])]).astype(numpy.int32)
        columns = [
            pyarrow.ListArray.from_arrays(pyarrow.array(ends), pyarrow.array(flat)) for flat in (self.ids, self.labels)
        ]
        return pyarrow.record_batch(columns, schema=SCHEMA)

    def each(self) -> Iterator[dict[str, list[int]]]:
        """Row by row, as streaming hands them on."""
        ends = numpy.cumsum(self.stats["length"])
        for start, end in zip(ends - self.stats["length"], ends, strict=True):
            yield {"input_ids": self.ids[start:end].tolist(), "labels": self.labels[start:end].tolist()}


def prepare(
    source: Source, split: str, settings: RowSettings, masker: Masker, processes: int | None, *, keep: bool = True
) -> Prepared:
    """Tokens of a split, from the cache where nothing has changed.

    Args:
        split: a split's name, perhaps with a slice in brackets.
        keep: whether tokens are kept on disk; without, only what was seen of the rows is.

    Raises:
        DataError: the files cannot be read, changed while they were read, or hold no row.
        MachineError: no room for the tokens.
    """
    base = split.split("[")[0]
    key = _key(source, base, settings, masker)
    if key is None:
        return _sliced(_scanned(source, base, settings, masker, processes, None, ""), split)
    looked_for = text_sha256("\n".join(["in ids too", *SECRETS]))[:8]  # what `flags` tell of; no token depends on it
    folder = cache_folder("data") / f"{key}-{looked_for}{'' if keep else '-seen'}"
    lock = Locked(folder.with_name(f"{folder.name}.lock"))
    lock.acquire(wait=True, waiting=console.say)  # of several processes that start at once, one does the work
    try:
        if not _is_kept(folder):
            _require_room(source, base, folder.parent, keep)
            with published(folder, private=True) as staging:  # it holds users' rows
                _scanned(source, base, settings, masker, processes, staging, key, keep=keep)
                if _key(source, base, settings, masker) != key:
                    raise DataError(f"{source.where('data_files')}: a data file changed while it was read; start again")
    finally:
        lock.release()
    return _sliced(_loaded(source, base, settings, folder, key), split)


def _is_kept(folder: Path) -> bool:
    """Whether the cache has what was seen of a split; a report that is broken is written again."""
    with suppress(BrokenFile):
        return bool(read_json(folder / "report.json"))
    return False


def _scanned(
    source: Source,
    split: str,
    settings: RowSettings,
    masker: Masker,
    processes: int | None,
    folder: Path | None,
    key: str,
    *,
    keep: bool = False,
) -> Prepared:
    """One pass over the split, written into `folder` where there is one."""
    collected: dict[str, list[Any]] = {name: [] for name in STATS}
    problems: list[Problem] = []
    counts: Counter[str] = Counter()
    places: list[tuple[str, str]] = []
    rows = 0
    rejected = (folder / "rejected.jsonl").open("w", encoding="utf-8", errors="backslashreplace") if folder else None
    sink = pyarrow.ipc.new_stream(str(folder / "tokens.arrow"), SCHEMA) if folder and keep else None
    for chunk, part in scan(source, split, Tokenizing(masker, settings), processes):
        if not places or places[-1] != (chunk.file, chunk.unit):
            places.append((chunk.file, chunk.unit))
        part.stats["row"] += rows
        part.stats["in_file"] += len(places) - 1
        for name, values in part.stats.items():
            collected[name].append(values)
        problems += [replace(problem, row=problem.row + rows) for problem in part.problems[: KEPT - len(problems)]]
        counts.update(part.counts)
        if rejected:
            rejected.writelines(_line(row | {"row": row["row"] + rows}) for row in part.rejected)
        if sink and len(part.stats["row"]):
            sink.write_batch(part.batch())
        rows += part.rows
    stats = {
        name: numpy.concatenate(parts) if parts else numpy.zeros(0, STATS[name]) for name, parts in collected.items()
    }
    for stream in (rejected, sink):
        if stream:
            stream.close()
    if folder:
        numpy.savez(folder / "stats.npz", allow_pickle=False, **stats)
        write_json(
            folder / "report.json",
            {
                "rows": rows,
                "counts": dict(counts),
                "places": places,
            },
        )
    return Prepared(source, split, settings, None, stats, problems, counts, rows, places, None, key)


def _loaded(source: Source, split: str, settings: RowSettings, folder: Path, key: str) -> Prepared:
    report = read_json(folder / "report.json")
    with numpy.load(folder / "stats.npz") as arrays:
        stats = {name: arrays[name] for name in STATS}
    kept = folder / "tokens.arrow"
    tokens = datasets.Dataset.from_file(str(kept)) if kept.is_file() and len(stats["row"]) else None
    counts, places = Counter(report["counts"]), [(name, unit) for name, unit in report["places"]]
    loaded = Prepared(source, split, settings, tokens, stats, [], counts, report["rows"], places, folder, key)
    return replace(loaded, problems=[_problem(row) for row in islice(_bad_rows(loaded), KEPT)])


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def _problem(row: dict[str, Any]) -> Problem:
    return Problem(**{name: value for name, value in row.items() if name != "raw"})


def _sliced(prepared: Prepared, split: str) -> Prepared:
    """Only the rows of `train[:10%]`; a slice counts the rows of the files, bad ones too."""
    if "[" not in split:
        return prepared
    first, last = rows_in_slice(prepared.source, split, prepared.rows)
    kept = numpy.flatnonzero((prepared.stats["row"] >= first) & (prepared.stats["row"] < last))
    sliced = replace(
        prepared,
        split=split,
        tokens=prepared.tokens.select(kept) if prepared.tokens is not None else None,
        stats={name: values[kept] for name, values in prepared.stats.items()},
        rows=last - first,
        first_row=first,
    )
    return replace(
        sliced,
        problems=[_problem(row) for row in islice(_bad_rows(sliced), KEPT)],
        counts=Counter(row["kind"] for row in _bad_rows(sliced)),
    )


def rejected_rows(prepared: Prepared) -> Iterator[dict[str, Any]]:
    """The bad rows of the split, each with its reason and as much of the row as was kept."""
    for row in _bad_rows(prepared):
        yield {"kind": row["kind"], "reason": str(_problem(row)), "row": row["raw"]}


def _bad_rows(prepared: Prepared) -> Iterator[dict[str, Any]]:
    """The bad rows of the split: the fields of a Problem, and the row itself as `raw` where it was kept."""
    here = range(prepared.first_row, prepared.first_row + prepared.rows)
    if prepared.folder is None:
        yield from ({**asdict(problem), "raw": None} for problem in prepared.problems if problem.row in here)
    elif prepared.counts:
        with (prepared.folder / "rejected.jsonl").open(encoding="utf-8") as stream:
            yield from (row for row in map(json.loads, stream) if row["row"] in here)


def _key(source: Source, split: str, settings: RowSettings, masker: Masker) -> str | None:
    content = content_of(source, split)
    if content is None:
        return None
    backend = masker.tokenizer.backend_tokenizer.to_str()
    parts = {
        **settings_key(settings),
        "content": content,
        "template": masker.template,
        "marked": masker.marked,
        "special": masker.special,
        "end_ids": sorted(masker.end_ids),
        "tokenizer": hashlib.sha256(backend.encode()).hexdigest(),
        "versions": [version(name) for name in ("transformers", "tokenizers")],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _require_room(source: Source, split: str, folder: Path, keep: bool) -> None:
    if source.is_hub() or not keep:
        return
    require_room(
        folder,
        DISK_FACTOR * sum(file.path.stat().st_size for file in local_files(source, split)),
        f"the tokens of {source.where('data_files')} may",
        "make room, set XDG_CACHE_HOME to another disk, or keep no tokens: dataset.streaming: true",
    )
