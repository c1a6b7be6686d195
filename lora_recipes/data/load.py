"""All sources of a recipe, prepared: which rows are trained on, which are held out, and what was seen of them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import datasets
import numpy
from transformers import PreTrainedTokenizerBase

from lora_recipes.data import chat_templates
from lora_recipes.data.files import Source
from lora_recipes.data.formats import Conversation, convert
from lora_recipes.data.forms import settings_of_all
from lora_recipes.data.frames import added_text
from lora_recipes.data.masks import IGNORED, Masker
from lora_recipes.data.prepare import Prepared, Tokenizing, prepare
from lora_recipes.data.readers import read_split, rows_of
from lora_recipes.data.scan import scan
from lora_recipes.data.select import held_out, repeated, shuffled
from lora_recipes.recipe import Recipe
from lora_recipes.recipe.defaults import MAX_LENGTH

SHUFFLE_BUFFER = 10_000  # rows that a stream is shuffled over
SEED = 42  # TrainingArguments' own default
TOKENS = datasets.Features(
    {"input_ids": datasets.List(datasets.Value("int32")), "labels": datasets.List(datasets.Value("int32"))}
)


@dataclass
class UsedRows:
    """The rows of one split of one source that are used, as indices into its good rows.

    Attributes:
        too_long: indices of the rows over the limit, whether they are used or not.
        cut_empty: those of them that have no trained token before the limit; never used.
    """

    prepared: Prepared
    indices: Any
    too_long: Any
    cut_empty: Any

    def stat(self, name: str) -> Any:
        """A column of the statistics over the rows that are used."""
        return self.prepared.stats[name][self.indices]


@dataclass
class SourceRows:
    """One source: its training rows and its held-out rows; and the words that the chat template adds of its own."""

    source: Source
    masker: Masker
    template: str
    train: UsedRows
    heldout: UsedRows | None
    added: str = ""

    def splits(self) -> list[Prepared]:
        """The splits of the source that were read: one, where the held-out rows are a share of it."""
        held = self.heldout.prepared if self.heldout is not None else self.train.prepared
        return [self.train.prepared] if held is self.train.prepared else [self.train.prepared, held]


@dataclass
class LoadedData:
    """Everything a step needs to know about the recipe's rows."""

    recipe: Recipe
    sources: list[SourceRows]
    limit: int | None
    seed: int

    def train(self) -> datasets.Dataset | datasets.IterableDataset:
        """Rows with `input_ids` and `labels`, weighted and mixed; cut where the recipe cuts."""
        mixed = [(rows, rows.train.indices[self.again(rows)]) for rows in self.sources]
        if self.streams:
            return self._stream([(rows, indices) for rows, indices in mixed if len(indices)])
        parts = [self._cut(rows.train, indices) for rows, indices in mixed if len(indices)]
        whole = datasets.concatenate_datasets(parts)
        # One source keeps its order: the trainer shuffles. Several are mixed here, so that packing mixes them as well.
        return whole if len(parts) == 1 else whole.select(shuffled(len(whole), self.seed))

    def again(self, rows: SourceRows) -> Any:
        """Places among a source's training rows, each as often as its weight says."""
        return repeated(rows.train.stat("hash"), float(rows.source.get("weight", 1.0)), self.seed)

    def heldout(self) -> datasets.Dataset | datasets.IterableDataset | None:
        """The held-out rows of all sources; None without any."""
        held = [(rows, rows.heldout) for rows in self.sources if rows.heldout is not None and len(rows.heldout.indices)]
        if not held:
            return None
        if self.streams:
            return datasets.concatenate_datasets([self._rows(rows, part, part.indices) for rows, part in held])
        return datasets.concatenate_datasets([self._cut(part, part.indices) for _, part in held])

    def longest(self, count: int) -> list[dict[str, list[int]]]:
        """The longest training rows, cut as they are trained, of one that packing splits as much as a piece holds; [] for a
        stream, whose rows lie nowhere."""
        if self.streams:
            return []
        found = [
            (int(length), rows.train, int(index))
            for rows in self.sources
            for index, length in _longest(rows.train, count)
        ]
        best = sorted(found, key=lambda entry: -entry[0])[:count]
        picked = [part.prepared.tokens[index] for _, part, index in best]  # type: ignore[index]
        longest = self.recipe.get("training.max_length", MAX_LENGTH)
        if longest is None or self.limit is not None:
            return [{name: row[name][: self.limit] for name in TOKENS} for row in picked]
        # Up to the last trained token: the first piece of a long question has none, and its loss takes no memory.
        ends = [max(_last_trained(row), longest) for row in picked]
        return [
            {name: row[name][end - longest : end] for name in TOKENS} for row, end in zip(picked, ends, strict=True)
        ]

    def keys(self) -> dict[str, str]:
        """Split → hash of its content, template, tokenizer and settings; "" for a stream that is not pinned."""
        return {
            f"{rows.source.key} {prepared.split}": prepared.key for rows in self.sources for prepared in rows.splits()
        }

    @property
    def streams(self) -> bool:
        """Whether rows are tokenized as they are needed."""
        return any(rows.source.get("streaming") for rows in self.sources)

    def _cut(self, part: UsedRows, indices: Any) -> datasets.Dataset:
        assert part.prepared.tokens is not None, "a source that streams keeps no tokens"
        chosen = part.prepared.tokens.select(indices)
        if self.limit is None or not numpy.isin(part.too_long, indices).any():
            return chosen
        return chosen.map(_cut_rows, batched=True, fn_kwargs={"limit": self.limit}, desc="Cutting long rows")

    def _stream(self, mixed: list[tuple[SourceRows, Any]]) -> datasets.IterableDataset:
        streams = [self._rows(rows, rows.train, indices) for rows, indices in mixed]
        if len(streams) > 1:
            sizes = numpy.array([len(indices) for _, indices in mixed], dtype=float)
            streams = [
                datasets.interleave_datasets(
                    streams,
                    probabilities=(sizes / sizes.sum()).tolist(),
                    seed=self.seed,
                    stopping_strategy="all_exhausted",
                )
            ]
        return streams[0].shuffle(seed=self.seed, buffer_size=SHUFFLE_BUFFER)

    def _rows(self, rows: SourceRows, part: UsedRows, indices: Any) -> datasets.IterableDataset:
        prepared = part.prepared
        # How often each row of the split is seen, by its number.
        times = numpy.zeros(int(prepared.stats["row"].max(initial=-1)) + 1, numpy.uint32)
        numpy.add.at(times, prepared.stats["row"][indices], 1)
        again = _Again(rows.masker, replace(prepared, stats={}), times, self.limit)
        return datasets.IterableDataset.from_generator(_streamed, features=TOKENS, gen_kwargs={"again": again})


@dataclass
class _Again:
    """A split that is read and tokenized once more, each row as often as `times` says."""

    masker: Masker
    prepared: Prepared
    times: Any
    limit: int | None


def _streamed(again: _Again) -> Iterator[dict[str, list[int]]]:
    first, prepared = 0, again.prepared
    work = Tokenizing(again.masker, prepared.settings)
    for _, part in scan(prepared.source, prepared.split.split("[")[0], work, 1):
        for index, row in zip(part.stats["row"], part.each(), strict=True):
            for _ in range(again.times[first + int(index)] if first + int(index) < len(again.times) else 0):
                yield {name: values[: again.limit] for name, values in row.items()}
        first += part.rows


def _cut_rows(rows: dict[str, list[list[int]]], limit: int) -> dict[str, list[list[int]]]:
    return {name: [values[:limit] for values in column] for name, column in rows.items()}


def load_data(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, end_ids: set[int]) -> LoadedData:
    """Read, check, tokenize and mask all rows of a recipe, from the cache where nothing has changed.

    Bad rows are collected, not raised: see `data.audit`.

    Args:
        end_ids: tokens that end an answer (the tokenizer's and the generation config's).

    Raises:
        RecipeError, DataError, MachineError: the data cannot be read at all.
        RefusedError: the chat template drops what is said, or runs without end.
    """
    limit = _limit(recipe)
    seed = recipe.get("training.seed", SEED)
    loaded = LoadedData(recipe, [], limit, seed)
    processes = recipe.get("training.dataset_num_proc")
    found = settings_of_all(recipe)
    template = chat_templates.settle(tokenizer, recipe, [settings.form for _, settings in found if settings.chat])
    for source, settings in found:
        masker = Masker(tokenizer, end_ids, settings.control_tokens)
        added = added_text(masker.plain, template) if settings.chat and masker.template is not None else ""

        def prepared(split: str, source: Source = source, settings: Any = settings, masker: Any = masker) -> Prepared:
            return prepare(source, split, settings, masker, processes, keep=not source.get("streaming"))

        train = prepared(source.split)
        everything = numpy.arange(len(train.stats["row"]))
        heldout = None
        if isinstance(source.eval_split, str):
            held = prepared(source.eval_split)
            heldout = _part(held, numpy.arange(len(held.stats["row"])), source, limit)
        elif source.eval_split is not None and len(everything):
            out = held_out(train.stats["hash"], source.eval_split, seed)
            heldout, everything = _part(train, everything[out], source, limit), everything[~out]
        loaded.sources.append(
            SourceRows(source, masker, template, _part(train, everything, source, limit), heldout, added)
        )
    return loaded


def _last_trained(row: dict[str, list[int]]) -> int:
    """How many tokens of a row lie up to its last trained one."""
    return max((place for place, label in enumerate(row["labels"], start=1) if label != IGNORED), default=0)


def _longest(part: UsedRows, count: int) -> list[tuple[int, int]]:
    """(index, length) of the longest used rows."""
    lengths = part.stat("length")
    order = numpy.argsort(-lengths, kind="stable")[:count]
    return list(zip(part.indices[order].tolist(), lengths[order].tolist(), strict=True))


def _limit(recipe: Recipe) -> int | None:
    """Tokens that a row is cut at; None where none is cut: this way of packing splits long rows instead."""
    if recipe.get("training.packing") and recipe.get("training.packing_strategy") == "bfd_split":
        return None
    return recipe.get("training.max_length", MAX_LENGTH)


def _part(prepared: Prepared, indices: Any, source: Source, limit: int | None) -> UsedRows:
    """Leaves out what the recipe leaves out of the rows that are too long."""
    none = numpy.zeros(0, numpy.int64)
    if limit is None:
        return UsedRows(prepared, indices, none, none)
    too_long = indices[prepared.stats["length"][indices] > limit]
    cut_empty = too_long[prepared.stats["first"][too_long] >= limit]
    gone = cut_empty if source.get("truncation") == "keep_start" else too_long
    return UsedRows(prepared, numpy.setdiff1d(indices, gone), too_long, cut_empty)


def used_rows(part: UsedRows, wanted: int | None) -> Iterator[Conversation]:
    """The first `wanted` used rows of a split as conversations, in file order."""
    prepared = part.prepared
    left = set(part.stat("row")[:wanted].tolist())
    row = 0
    for chunk in read_split(prepared.source, prepared.split):
        for _, value in rows_of(chunk):
            if row in left:
                left.discard(row)
                yield convert(value, prepared.settings)
            if not left:
                return
            row += 1
