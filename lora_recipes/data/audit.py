"""What all rows of a recipe amount to before anything is trained: counts, lengths, losses, and what is wrong."""

import heapq
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy

from lora_recipes.data.load import LoadedData, Part, SourceRows
from lora_recipes.data.prepare import DOUBLE_BOS, ODD_CHARACTERS, THINKING_LEFT_OUT, rejected_rows
from lora_recipes.data.problems import KINDS, SHOWN, said
from lora_recipes.data.select import duplicates, repeated, shuffled
from lora_recipes.errors import DataError
from lora_recipes.run_dir import RunDir, write_json, write_jsonl

Report = dict[str, Any]
Finding = dict[str, Any]

WORST = 5  # rows named for each reason
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
    parts = [rows.train for rows in data.sources]
    lengths = _joined(parts, "length", data.limit)
    hashes = numpy.concatenate([part.stat("hash") for part in parts])
    repeats = duplicates(hashes)
    per_source = [_of_source(rows, data) for rows in data.sources]
    overlaps = [_overlap(rows, hashes) for rows in data.sources]
    tokens, trained = (sum(source[key] for source in per_source) for key in ("tokens", "trained_tokens"))
    kinds: Counter[str] = sum((Counter(source["bad_rows"]) for source in per_source), Counter())
    report: Report = {
        "rows": sum(source["rows"] for source in per_source),
        "train_rows": len(hashes),
        "heldout_rows": sum(source["heldout_rows"] for source in per_source),
        "tokens": tokens,
        "trained_tokens": trained,
        "trained_percent": round(100 * trained / tokens, 2) if tokens else 0.0,
        "epoch_rows": sum(source["epoch_rows"] for source in per_source),
        "epoch_tokens": sum(source["epoch_tokens"] for source in per_source),
        "max_length": data.limit,
        "lengths": _lengths(lengths),
        "rows_truncated": sum(source["rows_truncated"] for source in per_source),
        "answers_truncated": sum(source["answers_truncated"] for source in per_source),
        "tokens_truncated": sum(source["tokens_truncated"] for source in per_source),
        "rows_without_loss": kinds["nothing_to_learn"] + sum(source["rows_cut_empty"] for source in per_source),
        "rows_without_end": kinds["end_token"],
        "bad_rows": sum(kinds.values()),
        "bad_row_kinds": dict(kinds),
        "unknown_roles": kinds["unknown_role"],
        "double_bos": _flagged(parts, DOUBLE_BOS),
        "thinking_left_out": _flagged(parts, THINKING_LEFT_OUT),
        "odd_characters": dict(sum((rows.train.prepared.odd for rows in data.sources), Counter())),
        "duplicates": int(repeats.sum()),
        "overlap": int(sum(overlap.sum() for overlap in overlaps)),
        "padding": _padding(lengths, batch_size, data.limit, data.seed) if len(lengths) else {},
        "sources": per_source,
        "worst": _worst(data, repeats, overlaps),
        "problems": [],
        "warnings": [],
    }
    report["problems"] = list(_problems(data, report, repeats, overlaps))
    report["warnings"] = list(_warnings(data, report, global_batch))
    return report


def require_sound(report: Report) -> None:
    """Raises DataError with everything that the audit refuses a run for."""
    if report["problems"]:
        raise DataError("\n".join(problem["text"] for problem in report["problems"]))


def write_evidence(run_dir: RunDir, data: LoadedData, report: Report) -> None:
    """audit.json, and the rows that are left out, each with its reason, in rejected.jsonl (for its owner's eyes only)."""
    write_json(run_dir.audit, report)
    rejected = [
        {"source": rows.source.name, "split": prepared.split, **row}
        for rows in data.sources
        for prepared in rows.splits()
        for row in rejected_rows(prepared)
    ]
    rejected += [
        {"source": rows.source.name, "split": part.prepared.split, "kind": "too_long", "reason": _left_out(part, index)}
        for rows in data.sources
        for part in (rows.train, rows.heldout)
        if part is not None
        for index in sorted(set(part.too_long.tolist()) - set(part.indices.tolist()))
    ]
    if rejected:
        write_jsonl(run_dir.rejected, rejected)
        run_dir.rejected.chmod(0o600)
    else:
        run_dir.rejected.unlink(missing_ok=True)


def _left_out(part: Part, index: int) -> str:
    stats = part.prepared.stats
    return f"{part.prepared.place(index)}: {stats['length'][index]:,} tokens, the first with loss is number {stats['first'][index] + 1:,}"


def _joined(parts: list[Part], name: str, limit: int | None) -> Any:
    values = numpy.concatenate([part.stat(name) for part in parts])
    return values if limit is None else numpy.minimum(values, limit)


def _of_source(rows: SourceRows, data: LoadedData) -> Report:
    part, prepared = rows.train, rows.train.prepared
    lengths, trained = _kept(part, data.limit)
    again = repeated(part.stat("hash"), float(rows.source.get("weight", 1.0)), data.seed) if len(lengths) else []
    stats, long = prepared.stats, part.too_long
    counts: Counter[str] = sum((split.counts for split in rows.splits()), Counter())
    return {
        "name": rows.source.name,
        "format": prepared.settings.form,
        "template": rows.template,
        "masked_by": "every token has loss" if not prepared.settings.answers_only else rows.masker.origin,
        "rows": prepared.rows,
        "bad_rows": dict(counts),
        "train_rows": len(lengths),
        "heldout_rows": len(rows.heldout.indices) if rows.heldout is not None else 0,
        "tokens": int(lengths.sum()),
        "trained_tokens": int(trained.sum()),
        "weight": float(rows.source.get("weight", 1.0)),
        "epoch_rows": len(again),
        "epoch_tokens": int(lengths[again].sum()) if len(again) else 0,
        "rows_truncated": len(long),
        "answers_truncated": int((stats["last"][long] > (data.limit or 0)).sum()),
        "tokens_truncated": int((stats["length"][long] - (data.limit or 0)).sum()) if len(long) else 0,
        "rows_cut_empty": len(part.cut_empty),
    }


def _kept(part: Part, limit: int | None) -> tuple[Any, Any]:
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


def _flagged(parts: list[Part], flag: int) -> int:
    return int(sum(((part.stat("flags") & flag) != 0).sum() for part in parts))


def _overlap(rows: SourceRows, hashes: Any) -> Any:
    if rows.heldout is None:
        return numpy.zeros(0, bool)
    return numpy.isin(rows.heldout.stat("hash"), hashes)


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


def _worst(data: LoadedData, repeats: Any, overlaps: list[Any]) -> list[Report]:
    """Rows that a person should look at, each with the reason."""
    found: list[Report] = []

    def add(rows: SourceRows, part: Part, indices: Any, why: str) -> None:
        for index in list(indices)[:WORST]:
            stats = part.prepared.stats
            found.append(
                {
                    "row": int(stats["row"][index]) + 1,
                    "place": part.prepared.place(int(index)),
                    "source": rows.source.name,
                    "split": part.prepared.split,
                    "why": why,
                    "tokens": int(stats["length"][index]),
                    "trained_tokens": int(stats["trained"][index]),
                }
            )

    start = 0
    for rows, overlap in zip(data.sources, overlaps, strict=True):
        part, stats = rows.train, rows.train.prepared.stats
        repeated_here = part.indices[repeats[start : start + len(part.indices)]]
        start += len(part.indices)
        flags = stats["flags"]
        add(rows, part, part.cut_empty, f"nothing to learn within {data.limit} tokens")
        longest = sorted(set(part.too_long.tolist()) - set(part.cut_empty.tolist()), key=lambda i: -stats["length"][i])
        add(rows, part, longest, f"longer than {data.limit} tokens")
        if rows.heldout is not None:
            add(rows, rows.heldout, rows.heldout.indices[overlap], "held out, and trained on as well")
        add(rows, part, repeated_here, "repeats an earlier row")
        add(rows, part, part.indices[(flags[part.indices] & DOUBLE_BOS) != 0], "begins with two BOS tokens")
        add(rows, part, part.indices[(flags[part.indices] & ODD_CHARACTERS) != 0], "holds odd characters")
        add(rows, part, part.indices[(flags[part.indices] & THINKING_LEFT_OUT) != 0], "its thinking is left out")
        fewest = heapq.nsmallest(WORST, part.indices.tolist(), key=lambda i: (stats["trained"][i], i))
        add(rows, part, fewest, "among the fewest trained tokens")
        most = heapq.nlargest(WORST, part.indices.tolist(), key=lambda i: (stats["length"][i], -i))
        add(rows, part, most, "among the longest")
    return found


def _problems(data: LoadedData, report: Report, repeats: Any, overlaps: list[Any]) -> Iterator[Finding]:
    start = 0
    for rows, overlap in zip(data.sources, overlaps, strict=True):
        source, part = rows.source, rows.train
        yield from _bad_rows(rows)
        yield from _too_long(rows, data.limit)
        here = repeats[start : start + len(part.indices)]
        start += len(part.indices)
        yield from _over(source, "max_duplicate_fraction", int(here.sum()), len(here), "repeat an earlier row")
        if overlap.any() and source.get("overlap", "error") == "error":
            places = [rows.heldout.prepared.place(int(index)) for index in rows.heldout.indices[overlap][:WORST]]  # type: ignore[union-attr]
            yield _finding(
                "overlap",
                f"{source.where('eval_split')}: {int(overlap.sum()):,} of {len(overlap):,} held-out rows are also trained "
                f"on, so their score would mean nothing ({', '.join(places)}{', …' if overlap.sum() > WORST else ''}); "
                "remove them, or say that it is meant: dataset.overlap: allow",
            )
    if not report["train_rows"]:
        yield _finding("no_rows", f"{data.recipe.path}: no row is left to train on")
    for rows in data.sources:
        if rows.source.eval_split is not None and (rows.heldout is None or not len(rows.heldout.indices)):
            yield _finding("no_rows", f"{rows.source.where('eval_split')}: no row is left in the held-out split")


def _bad_rows(rows: SourceRows) -> Iterator[Finding]:
    source = rows.source
    for prepared in rows.splits():
        total = sum(prepared.counts.values())
        if not total:
            continue
        if source.get("bad_rows", "error") == "error":
            shown = [problem.as_json() for problem in prepared.problems[:SHOWN]]
            yield _finding("bad_rows", said(prepared.problems, prepared.counts, prepared.rows), rows=shown)
        else:
            yield from _over(source, "max_bad_fraction", total, prepared.rows, "cannot be trained on")


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
        if policy == "keep_start" and len(part.cut_empty) and source.get("bad_rows", "error") == "error":
            first = part.prepared.place(int(part.cut_empty[0]))
            yield _finding(
                "nothing_to_learn",
                f"{first}: {len(part.cut_empty):,} of {total:,} rows have no trained token within training.max_length = "
                f"{limit} tokens: the prompt alone is longer (this is the first); raise it, or leave them out with "
                "dataset.bad_rows: skip",
            )


def _over(source: Any, key: str, count: int, total: int, what: str) -> Iterator[Finding]:
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
    if 0 < report["heldout_rows"] < 10:
        yield _finding("few_rows", f"a score over {report['heldout_rows']} held-out rows says little")
    if report["duplicates"]:
        yield _finding("duplicates", f"{report['duplicates']:,} rows repeat an earlier row: they are seen more often")
    if report["overlap"] and not any(problem["kind"] == "overlap" for problem in report["problems"]):
        yield _finding("overlap", f"{report['overlap']:,} held-out rows are also trained on")
    if report["double_bos"]:
        yield _finding("double_bos", f"{report['double_bos']:,} rows begin with two BOS tokens")
    if report["thinking_left_out"]:
        yield _finding(
            "thinking_left_out",
            f"{report['thinking_left_out']:,} rows have thinking that the chat template leaves out: it is not learnt",
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
            f"{report['answers_truncated']:,} of them in the middle of an answer",
        )


def _finding(kind: str, text: str, **more: Any) -> Finding:
    return {"kind": kind, "text": text, **more}
