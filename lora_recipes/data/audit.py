"""What all rows of a recipe amount to before anything is trained: counts, lengths, losses, and what is wrong."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy

from lora_recipes.data.files import Source
from lora_recipes.data.load import LoadedData, SourceRows, UsedRows
from lora_recipes.data.prepare import DOUBLE_BOS, ODD_FLAGS, SECRET, THINKING_LEFT_OUT, rejected_rows
from lora_recipes.data.problems import KINDS, SHOWN, said
from lora_recipes.data.select import duplicates, shuffled
from lora_recipes.errors import DataError
from lora_recipes.run_dir import RunDir, write_json, write_jsonl

Report = dict[str, Any]
Finding = dict[str, Any]

ADDED = 200  # characters of what a chat template adds that a warning repeats
WORST = 5  # rows named for each reason
# Keys of a source's report that are added up, as numbers and as counts by kind.
SUMMED = (
    *("rows", "train_rows", "heldout_rows", "bad_rows", "heldout_bad_rows", "tokens", "trained_tokens", "epoch_rows"),
    *("epoch_tokens", "rows_truncated", "answers_truncated", "tokens_truncated", "rows_without_loss"),
    *("rows_without_end", "unknown_roles", "double_bos", "thinking_left_out", "secrets", "duplicates", "overlap"),
)
COUNTED = ("bad_row_kinds", "odd_characters")
BINS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)  # tokens, upper ends
PACKED_AT_A_TIME = 1000  # rows that TRL packs together
BATCHES = 2000  # batches that the padding is estimated from
GROUPED = 50  # batches that transformers sorts together when it groups by length
PAYS = 0.7  # packed batches must hold at most this share of the padded tokens to be worth it


def audit(data: LoadedData, batch_size: int, global_batch: int) -> Report:
    """Counts over all rows, per source and in total, with the thresholds of the recipe held against them.

    Args:
        batch_size: rows a device sees at a time.
        global_batch: rows of one optimizer step.

    Returns:
        The keys of `audit --json`. `problems` is what a run is refused for, `warnings` is not.
    """
    seen = [_Seen(rows, data) for rows in data.sources]
    hashes = numpy.concatenate([one.rows.train.stat("hash") for one in seen])
    repeats = numpy.split(duplicates(hashes), numpy.cumsum([len(one.rows.train.indices) for one in seen])[:-1])
    for one, repeated_rows in zip(seen, repeats, strict=True):
        one.compare(hashes, repeated_rows)
    per_source = [one.report() for one in seen]
    uncut = numpy.concatenate([one.uncut for one in seen])
    cut = numpy.concatenate([one.lengths for one in seen])
    report: Report = {key: sum(source[key] for source in per_source) for key in SUMMED}
    report |= {key: dict(sum((Counter(source[key]) for source in per_source), Counter())) for key in COUNTED}
    report |= {
        "trained_percent": round(100 * report["trained_tokens"] / report["tokens"], 2) if report["tokens"] else 0.0,
        "max_length": data.limit,
        "lengths": _lengths(uncut),
        "padding": _padding(cut, batch_size, data.limit, data.seed) if len(cut) else {},
        "sources": per_source,
        "worst": [found for one in seen for found in _worst(one, data.limit)],
    }
    report["problems"] = [problem for one in seen for problem in _problems(one, data.limit)]
    report["warnings"] = list(_warnings(data, report, global_batch))
    return report


def require_sound(report: Report) -> None:
    """Raises DataError with everything that the audit refuses a run for."""
    if report["problems"]:
        raise DataError("\n".join(problem["text"] for problem in report["problems"]))


def write_evidence(run_dir: RunDir, data: LoadedData, report: Report) -> None:
    """audit.json, and the rows that are left out, each with its reason, in rejected.jsonl (for its owner's eyes only)."""
    write_json(run_dir.audit, report)
    if any(prepared.counts for rows in data.sources for prepared in rows.splits()) or report["rows_truncated"]:
        write_jsonl(run_dir.rejected, _left_out_rows(data), mode=0o600)
    else:
        run_dir.rejected.unlink(missing_ok=True)


def _left_out_rows(data: LoadedData) -> Iterator[Report]:
    for rows in data.sources:
        for prepared in rows.splits():
            for row in rejected_rows(prepared):
                yield {"source": rows.source.name, "split": prepared.split, **row}
        for part in [rows.train, *([rows.heldout] if rows.heldout is not None else [])]:
            for index in part.too_long[~numpy.isin(part.too_long, part.indices)]:
                place = {"source": rows.source.name, "split": part.prepared.split}
                yield {**place, "kind": "too_long", "reason": _left_out(part, index)}


def _left_out(part: UsedRows, index: int) -> str:
    stats = part.prepared.stats
    return f"{part.prepared.place(index)}: {stats['length'][index]:,} tokens, the first with loss is number {stats['first'][index] + 1:,}"


class _Seen:
    """What is known of one source once all sources were read."""

    def __init__(self, rows: SourceRows, data: LoadedData) -> None:
        self.rows, self.data = rows, data
        self.lengths, self.trained = _kept(rows.train, data.limit)
        everything = numpy.union1d(rows.train.indices, rows.train.too_long)
        self.uncut = rows.train.prepared.stats["length"][everything]
        self.repeats = self.overlap = numpy.zeros(0, bool)

    def compare(self, hashes: Any, repeats: Any) -> None:
        """Held against the training rows of all sources: repeated rows, and held-out rows that are trained on."""
        self.repeats = repeats
        if self.rows.heldout is not None:
            self.overlap = numpy.isin(self.rows.heldout.stat("hash"), hashes)

    def report(self) -> Report:
        """The source's own entry, with the keys that are added up over the sources."""
        rows, limit = self.rows, self.data.limit or 0
        part, prepared = rows.train, rows.train.prepared
        stats, long, again = prepared.stats, part.too_long, self.data.again(rows)
        heldout = [split.counts for split in rows.splits()[1:]]
        return {
            "name": rows.source.name,
            "format": prepared.settings.form,
            "template": rows.template if prepared.settings.chat else "none",
            "masked_by": rows.masker.origin if prepared.settings.answers_only else "every token has loss",
            "weight": float(rows.source.get("weight", 1.0)),
            "rows": prepared.rows,
            "train_rows": len(self.lengths),
            "heldout_rows": len(rows.heldout.indices) if rows.heldout is not None else 0,
            "bad_rows": sum(prepared.counts.values()),
            "bad_row_kinds": dict(prepared.counts),
            "heldout_bad_rows": sum(sum(counts.values()) for counts in heldout),
            "tokens": int(self.lengths.sum()),
            "trained_tokens": int(self.trained.sum()),
            "epoch_rows": len(again),
            "epoch_tokens": int(self.lengths[again].sum()),
            "lengths": _lengths(self.uncut),
            "rows_truncated": len(long),
            "answers_truncated": int((stats["last"][long] > limit).sum()),
            "tokens_truncated": int((stats["length"][long] - limit).sum()),
            "rows_cut_empty": len(part.cut_empty),
            "rows_without_loss": prepared.counts["nothing_to_learn"] + len(part.cut_empty),
            "rows_without_end": prepared.counts["end_token"],
            "unknown_roles": prepared.counts["unknown_role"],
            "double_bos": _flagged(part, DOUBLE_BOS),
            "secrets": _flagged(part, SECRET),
            "thinking_left_out": _flagged(part, THINKING_LEFT_OUT),
            "odd_characters": {kind: count for kind, flag in ODD_FLAGS.items() if (count := _flagged(part, flag))},
            "duplicates": int(self.repeats.sum()),
            "overlap": int(self.overlap.sum()),
        }


def _kept(part: UsedRows, limit: int | None) -> tuple[Any, Any]:
    """(length, trained tokens) of each used row as it is trained, cut rows counted as they are cut."""
    lengths, trained = part.stat("length").astype(numpy.int64), part.stat("trained").astype(numpy.int64)
    if limit is None:
        return lengths, trained
    for place in numpy.flatnonzero(part.stat("last") > limit):
        tokens = part.prepared.tokens
        if (
            tokens is None
        ):  # a stream keeps no labels: what lies beyond the limit is counted as the loss of its last tokens
            trained[place] = max(0, trained[place] - (part.stat("last")[place] - limit))
        else:
            labels = tokens[int(part.indices[place])]["labels"][:limit]
            trained[place] = sum(label != -100 for label in labels)
    return numpy.minimum(lengths, limit), trained


def _flagged(part: UsedRows, flag: int) -> int:
    return int(((part.stat("flags") & flag) != 0).sum())


def _lengths(lengths: Any) -> Report:
    """Quantiles and a histogram of row lengths in tokens."""
    if not len(lengths):
        return {}
    bins = [limit for limit in BINS if limit < lengths.max()] + [int(lengths.max())]
    counts = numpy.histogram(lengths, bins=[0, *(limit + 1 for limit in bins)])[0]
    return {
        "mean": round(float(lengths.mean()), 1),
        **{f"p{share}": int(numpy.percentile(lengths, share, method="lower")) for share in (50, 90, 99)},
        "max": int(lengths.max()),
        "histogram": [{"up_to": limit, "rows": int(count)} for limit, count in zip(bins, counts, strict=True)],
    }


def _padding(lengths: Any, batch_size: int, limit: int | None, seed: int) -> Report:
    """Tokens a batch holds for each real token: as it comes, grouped by length, and packed."""
    mixed = lengths[shuffled(len(lengths), seed)][: BATCHES * batch_size]
    real = int(mixed.sum())
    groups = [
        numpy.sort(mixed[start : start + GROUPED * batch_size])[::-1]
        for start in range(0, len(mixed), GROUPED * batch_size)
    ]
    size = limit or int(lengths.max())
    bins = sum(
        _packed_rows(mixed[start : start + PACKED_AT_A_TIME], size) for start in range(0, len(mixed), PACKED_AT_A_TIME)
    )
    padded = _padded(mixed, batch_size)
    grouped = sum(_padded(group, batch_size) for group in groups)
    report: Report = {
        "per_device_train_batch_size": batch_size,
        "waste": round(1 - real / padded, 4),
        "waste_grouped_by_length": round(1 - real / grouped, 4),
        "packed_rows": round(bins * len(lengths) / len(mixed)),
        "packed_fill": round(real / (bins * size), 4),
    }
    # Packed rows are not padded, but attention runs over the whole of them.
    report["advice"] = (
        "packing" if real / padded < PAYS else "group_by_length" if grouped < 0.9 * padded else "as it comes"
    )
    return report


def _padded(lengths: Any, batch_size: int) -> int:
    """Tokens of batches that are padded to their longest row."""
    rows = len(lengths) // batch_size * batch_size
    whole = int(lengths[:rows].reshape(-1, batch_size).max(axis=1).sum()) * batch_size if rows else 0
    rest = lengths[rows:]
    return whole + (int(rest.max()) * len(rest) if len(rest) else 0)


def _packed_rows(lengths: Any, size: int) -> int:
    """Rows of `size` tokens that best fit decreasing fills: each length goes where the least room is left."""
    room: list[int] = []  # sorted
    for length in sorted((min(int(length), size) for length in lengths), reverse=True):
        place = numpy.searchsorted(room, length)
        left = room.pop(int(place)) - length if place < len(room) else size - length
        room.insert(int(numpy.searchsorted(room, left)), left)
    return len(room)


def _worst(one: _Seen, limit: int | None) -> list[Report]:
    """Rows that a person should look at, each with the reason."""
    rows, part, stats = one.rows, one.rows.train, one.rows.train.prepared.stats
    flags = stats["flags"][part.indices]
    odd = sum(ODD_FLAGS.values())
    found = [
        (part, part.cut_empty, f"left out: nothing to learn within {limit} tokens"),
        (part, _first(part.too_long[~numpy.isin(part.too_long, part.cut_empty)], -stats["length"]), _long(part, limit)),
        (part, part.indices[one.repeats], "repeats an earlier row"),
        (part, part.indices[(flags & DOUBLE_BOS) != 0], "begins with two BOS tokens"),
        (part, part.indices[(flags & SECRET) != 0], "holds what looks like a secret"),
        (part, part.indices[(flags & odd) != 0], "holds odd characters"),
        (part, part.indices[(flags & THINKING_LEFT_OUT) != 0], "its thinking is left out"),
        (part, _first(part.indices, stats["trained"]), "among the fewest trained tokens"),
        (part, _first(part.indices, -stats["length"]), "among the longest"),
    ]
    if rows.heldout is not None:
        found.insert(2, (rows.heldout, rows.heldout.indices[one.overlap], "held out, and trained on as well"))
    return [
        {
            "row": int(used.prepared.stats["row"][index]) + 1,
            "place": used.prepared.place(int(index)),
            "source": rows.source.key,
            "split": used.prepared.split,
            "why": why,
            "tokens": int(used.prepared.stats["length"][index]),
            "trained_tokens": int(used.prepared.stats["trained"][index]),
        }
        for used, indices, why in found
        for index in indices[:WORST]
    ]


def _long(part: UsedRows, limit: int | None) -> str:
    what = "cut" if numpy.isin(part.too_long, part.indices).any() else "left out"
    return f"{what}: longer than {limit} tokens"


def _first(indices: Any, by: Any) -> Any:
    """The indices with the lowest values, in file order where those are equal."""
    return indices[numpy.argsort(by[indices], kind="stable")[:WORST]]


def _problems(one: _Seen, limit: int | None) -> Iterator[Finding]:
    rows, source, part = one.rows, one.rows.source, one.rows.train
    yield from _bad_rows(rows)
    yield from _too_long(rows, limit)
    yield from _over(
        source, "max_duplicate_fraction", int(one.repeats.sum()), len(one.repeats), "repeat an earlier row"
    )
    if one.overlap.any() and source.get("overlap", "error") == "error" and rows.heldout is not None:
        count, held = int(one.overlap.sum()), rows.heldout
        places = [held.prepared.place(int(index)) for index in held.indices[one.overlap][:WORST]]
        yield _finding(
            "overlap",
            f"{source.where('eval_split')}: {count:,} of {len(one.overlap):,} held-out rows are also trained on, so their "
            f"score would mean nothing ({', '.join(places)}{', …' if count > WORST else ''}); remove them, or say that it "
            "is meant: dataset.overlap: allow",
        )
    if not len(part.indices):
        yield _finding("no_rows", f"{source.where('data_files')}: no row is left to train on in {source.name}")
    if source.eval_split is not None and (rows.heldout is None or not len(rows.heldout.indices)):
        yield _finding("no_rows", f"{source.where('eval_split')}: no row is left in the held-out split")


def _bad_rows(rows: SourceRows) -> Iterator[Finding]:
    source = rows.source
    for prepared in rows.splits():
        total = sum(prepared.counts.values())
        if not total and not len(rows.train.cut_empty):
            continue
        if source.get("bad_rows", "error") == "error":
            if not total:
                continue
            shown = [problem.as_json() for problem in prepared.problems[:SHOWN]]
            yield _finding("bad_rows", said(prepared.problems, prepared.counts, prepared.rows), rows=shown)
        else:
            # Rows that are cut down to nothing to learn are left out by `skip` as well.
            cut = len(rows.train.cut_empty) if prepared is rows.train.prepared and _cuts(source) else 0
            yield from _over(source, "max_bad_fraction", total + cut, prepared.rows, "cannot be trained on")


def _cuts(source: Source) -> bool:
    return source.get("truncation") == "keep_start"


def _too_long(rows: SourceRows, limit: int | None) -> Iterator[Finding]:
    source, policy = rows.source, rows.source.get("truncation", "error")
    for part in (rows.train, rows.heldout):
        if part is None or not len(part.too_long):
            continue
        count, total = len(part.too_long), len(part.indices) + len(part.too_long)
        place = part.prepared.place(int(part.too_long[0]))
        if policy == "error":
            longest = int(part.prepared.stats["length"][part.too_long].max())
            yield _finding(
                "too_long",
                f"{place}: {count:,} of {total:,} rows are longer than training.max_length = {limit} tokens (this is the "
                f"first; the longest has {longest:,}); raise it, or say what becomes of them: dataset.truncation: drop, or "
                "keep_start",
            )
            continue
        yield from _over(source, "max_truncated_fraction", count, total, f"are longer than {limit} tokens")
        if _cuts(source) and len(part.cut_empty) and source.get("bad_rows", "error") == "error":
            first = part.prepared.place(int(part.cut_empty[0]))
            yield _finding(
                "nothing_to_learn",
                f"{first}: {len(part.cut_empty):,} of {total:,} rows have no trained token within training.max_length = "
                f"{limit} tokens: the prompt alone is longer (this is the first); raise it, or leave them out with "
                "dataset.bad_rows: skip",
            )


def _over(source: Source, key: str, count: int, total: int, what: str) -> Iterator[Finding]:
    most = source.keys.get(key)
    if most is not None and total and count / total > most:
        yield _finding(
            key,
            f"{source.where(key)}: {count:,} of {total:,} rows ({100 * count / total:.1f} %) {what}; `{key}` allows "
            f"{100 * most:.1f} %",
        )


def _warnings(data: LoadedData, report: Report, global_batch: int) -> Iterator[Finding]:
    if 0 < report["train_rows"] < global_batch:
        yield _finding(
            "few_rows",
            f"{report['train_rows']:,} rows are fewer than the {global_batch:,} of one step; lower "
            "training.gradient_accumulation_steps or training.per_device_train_batch_size",
        )
    if report["heldout_bad_rows"] and not any(problem["kind"] == "bad_rows" for problem in report["problems"]):
        yield _finding("bad_rows", f"{report['heldout_bad_rows']:,} held-out rows are left out, see rejected.jsonl")
    if 0 < report["heldout_rows"] < 10:
        yield _finding("few_rows", f"a score over {report['heldout_rows']} held-out rows says little")
    if report["duplicates"]:
        yield _finding("duplicates", f"{report['duplicates']:,} rows repeat an earlier row: they are seen more often")
    if report["overlap"] and not any(problem["kind"] == "overlap" for problem in report["problems"]):
        yield _finding("overlap", f"{report['overlap']:,} held-out rows are also trained on")
    for words in dict.fromkeys(rows.added for rows in data.sources if rows.added):
        shown = words if len(words) <= ADDED else f"{words[:ADDED]} …"
        yield _finding("template_adds", f"the chat template adds words of its own: “{shown}”")
    if report["double_bos"]:
        yield _finding("double_bos", f"{report['double_bos']:,} rows begin with two BOS tokens")
    if report["thinking_left_out"]:
        yield _finding(
            "thinking_left_out",
            f"{report['thinking_left_out']:,} rows have thinking that the chat template leaves out: it is not learnt",
        )
    if report["secrets"]:
        yield _finding(
            "secrets",
            f"{report['secrets']:,} rows hold what looks like a key, a token or a password: a model repeats what it has learnt. "
            "lora-recipes audit names them",
        )
    for kind, count in report["odd_characters"].items():
        yield _finding("odd_characters", f"{count:,} rows hold {kind.replace('_', ' ')} characters")
    skipped = {kind: count for kind, count in report["bad_row_kinds"].items() if count}
    if skipped and not any(problem["kind"] == "bad_rows" for problem in report["problems"]):
        kinds = ", ".join(f"{count:,} {KINDS[kind]}" for kind, count in skipped.items())
        yield _finding("bad_rows", f"{report['bad_rows']:,} rows are left out ({kinds}), see rejected.jsonl")
    if report["rows_truncated"] and not any(problem["kind"] == "too_long" for problem in report["problems"]):
        yield _finding(
            "too_long",
            f"{report['rows_truncated']:,} rows are longer than {data.limit} tokens and are cut or left out; "
            f"{report['answers_truncated']:,} of them lose words of an answer",
        )


def _finding(kind: str, text: str, **more: Any) -> Finding:
    return {"kind": kind, "text": text, **more}
