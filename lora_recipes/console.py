"""What the user sees. People read stderr; with `--json` stdout holds one JSON object."""

import json
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lora_recipes.redact import redacted

UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u061c\u200b-\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]"
)
HISTOGRAM_WIDTH = 40  # characters
WORST_SHOWN = 12
ADVICE = {
    "packing": "training.packing: true",
    "group_by_length": "training.train_sampling_strategy: group_by_length",
    "as it comes": "leave it as it is",
}

_stderr = Console(stderr=True, highlight=False, soft_wrap=True)


def say(text: str, style: str | None = None) -> None:
    """A line for people."""
    _stderr.print(Text(_visible(text), style=style or ""))


def error(text: str) -> None:
    """An error a user can act on: one message, no traceback."""
    _stderr.print(Text("error: ", style="bold red") + Text(_visible(text)))


def emit_json(value: dict[str, Any]) -> None:
    """The one JSON object of `--json`."""
    text = redacted(json.dumps(value, ensure_ascii=False))
    # What a terminal would obey, and half of a surrogate pair, which has no UTF-8 form, as the escapes that JSON has for them.
    sys.stdout.write(UNSAFE.sub(lambda match: f"\\u{ord(match.group()):04x}", text) + "\n")


def out(text: str) -> None:
    """Text for a file or a pipe, as it is; a terminal gets it without what it would obey."""
    sys.stdout.write((_visible(text) if sys.stdout.isatty() else text) + "\n")


def facts(title: str, rows: Iterable[tuple[str, str]]) -> None:
    """A titled list of names and values."""
    table = Table(
        title=Text(_visible(title)),
        title_justify="left",
        title_style="bold",
        show_header=False,
        box=None,
        padding=(0, 2, 0, 0),
    )
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(_visible(name)), Text(_visible(value)))
    _stderr.print(table)


def example(title: str, row: Any) -> None:
    """A row (`data.show.ShownRow`) with the text that carries loss in green, the rest dim, control tokens underlined."""
    text = Text(f"{_visible(title)}, ", style="bold")
    text.append("green = trained", style="bold green")
    text.append(f" ({row.trained} of {len(row.input_ids)} tokens)\n", style="bold")
    for piece in row.pieces:
        style = ("green" if piece.trained else "dim") + (" underline" if piece.control else "")
        text.append(_visible(piece.text), style=style)
    _stderr.print(text)


def _visible(text: str) -> str:
    """Escape sequences and characters that reorder text are shown, never obeyed by the terminal; secrets are not shown."""
    marks = UNSAFE.sub(lambda match: "␛" if match.group() == "\x1b" else f"<U+{ord(match.group()):04X}>", text)
    return redacted(marks)


def audit(name: str, report: dict[str, Any]) -> None:
    """The report of `data.audit.audit`: counts, lengths as bars, the worst rows, what is wrong."""
    for source in report["sources"]:
        told = [
            (
                "rows",
                f"{source['rows']:,} read, {source['train_rows']:,} to train on, {source['heldout_rows']:,} held out",
            ),
            ("format", source["format"]),
            ("chat template", source["template"]),
            ("loss", source["masked_by"]),
            ("tokens", f"{source['tokens']:,}, {source['trained_tokens']:,} with loss"),
        ]
        if source["bad_row_kinds"]:
            bad = ", ".join(f"{count:,} {kind.replace('_', ' ')}" for kind, count in source["bad_row_kinds"].items())
            told.append(("bad rows", bad))
        told.append(("repeated", f"{source['duplicates']:,} rows; {source['overlap']:,} held-out rows are trained on"))
        if source["weight"] != 1 or len(report["sources"]) > 1:
            told.append(("an epoch", f"weight {source['weight']:g}: {source['epoch_rows']:,} rows"))
        facts(source["name"], told)
    facts(name, _totals(report))
    if report["lengths"]:
        _histogram(report["lengths"]["histogram"], report["max_length"])
    if report["worst"]:
        rows = [
            [found["place"], found["why"], f"{found['tokens']:,}", f"{found['trained_tokens']:,}"]
            for found in report["worst"]
        ]
        table("Rows to look at", ["where", "why", "tokens", "trained"], rows[:WORST_SHOWN], lines=False)
    for warning in report["warnings"]:
        say(f"note: {warning['text']}", "yellow")
    for problem in report["problems"]:
        say(f"problem: {problem['text']}", "red")
    if not report["problems"]:
        say("Nothing is in the way of training.", "bold green")


def _totals(report: dict[str, Any]) -> list[tuple[str, str]]:
    limit, lengths, padding = report["max_length"], report["lengths"], report["padding"]
    told = [
        (
            "rows",
            f"{report['train_rows']:,} to train on, {report['heldout_rows']:,} held out, {report['bad_rows']:,} bad",
        ),
        ("an epoch", f"{report['epoch_rows']:,} rows, {report['epoch_tokens']:,} tokens"),
        ("tokens with loss", f"{report['trained_tokens']:,} of {report['tokens']:,} ({report['trained_percent']} %)"),
    ]
    if limit:
        told.append(
            (
                f"over {limit} tokens",
                f"{report['rows_truncated']:,} rows, {report['answers_truncated']:,} of them within an answer; "
                f"{report['tokens_truncated']:,} tokens beyond the limit",
            )
        )
    told += [
        ("without loss", f"{report['rows_without_loss']:,} rows"),
        ("without end token", f"{report['rows_without_end']:,} rows"),
        ("duplicates", f"{report['duplicates']:,} rows"),
        ("overlap", f"{report['overlap']:,} held-out rows are trained on"),
    ]
    if lengths:
        told.append(
            ("tokens a row", ", ".join(f"{key} {lengths[key]:,}" for key in ("mean", "p50", "p90", "p99", "max")))
        )
    if padding:
        told.append(
            (
                f"padding, batch {padding['per_device_train_batch_size']}",
                f"{100 * padding['waste']:.1f} % of each batch; {100 * padding['waste_grouped_by_length']:.1f} % grouped by "
                f"length; packed: {padding['packed_rows']:,} rows, {100 * padding['packed_fill']:.1f} % full. "
                f"Suggested: {ADVICE[padding['advice']]}",
            )
        )
    return told


def _histogram(bins: list[dict[str, int]], limit: int | None) -> None:
    """Bars of row counts by length in tokens."""
    most = max(entry["rows"] for entry in bins)
    text = Text("Tokens a row\n", style="bold")
    for entry in bins:
        width = round(HISTOGRAM_WIDTH * entry["rows"] / most) or (1 if entry["rows"] else 0)
        over = limit is not None and entry["up_to"] > limit
        text.append(f"  up to {entry['up_to']:>6,}  ", style="cyan")
        text.append("█" * width, style="red" if over else "green")
        text.append(f" {entry['rows']:,}\n")
    _stderr.print(text)


def table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], styles: Sequence[str] = (), *, lines: bool = True
) -> None:
    """A table of plain texts; whatever a model wrote is shown, never interpreted as markup."""
    drawn = Table(title=Text(_visible(title)), title_justify="left", title_style="bold", show_lines=lines)
    for index, column in enumerate(columns):
        drawn.add_column(Text(_visible(column)), overflow="fold", style=styles[index] if index < len(styles) else None)
    for row in rows:
        drawn.add_row(*(Text(_visible(cell)) for cell in row))
    _stderr.print(drawn)


def scores(by_model: dict[str, dict[str, Any]]) -> None:
    """One row a model: what of the held-out rows is right, and how all answers ended."""

    def percent(share: float | None) -> str:
        return "—" if share is None else f"{100 * share:.1f} %"

    measured = {
        "exact match": "exact_match",
        "fields right": "field_match",
        "token F1": "token_f1",
        "stopped by eos": "stopped_by_eos",
        "ended cleanly": "stops",
    }
    rows = [[who, *(percent(values[key]) for key in measured.values())] for who, values in by_model.items()]
    table("Held-out rows and how answers end", ["model", *measured], rows)


def gates(held: dict[str, bool | None], verdict: str) -> None:
    """The gates of a run, and what follows."""
    marks = {True: "held", False: "FAILED", None: "not measured"}
    facts("Verdict", [*((gate.replace("_", " "), marks[found]) for gate, found in held.items()), ("verdict", verdict)])


def status(name: str, found: dict[str, Any]) -> None:
    """How a run stands: gates, scores, what to type next."""
    steps = f"step {found['step']} of {found['max_steps']}" if found["max_steps"] else "no step"
    told = [("state", f"{found['state']}, {steps}"), ("files", found["folder"])]
    told += [("last checkpoint", found["last_good_checkpoint"])] if found["last_good_checkpoint"] else []
    told += [("why", str(found["reason"]))] if found["state"] in ("failed", "preempted") else []
    facts(name, told)
    if odd := found["diagnosis"]:
        say(f"note: {odd['text']}; likely because {odd['causes'][0]}", "yellow")
    gates(found["gates"], found["verdict"])
    if found["scores"]:
        scores(found["scores"])
    say("Next:", "bold")
    for command in found["next"]:
        say(f"  {command}")


def plan(name: str, found: dict[str, Any]) -> None:
    """What a recipe trains, needs and takes, and what to change when it does not fit."""
    memory, target, step = found["memory"], found["target"], found["micro_batch"]
    on = target["name"] if target["gpus"] == 1 else f"{target['gpus']} x {target['name']}, {target['sharding']}"
    trained = f"{found['trainable']:,} trainable of {found['all']:,} ({found['trainable_percent']:.4f} %)"
    rows = f"{step['rows']} rows x {step['length']:,} tokens, x {step['accumulation']} accumulation"
    facts(
        f"{name} on {on}",
        [
            ("parameters", trained),
            ("adapted", ", ".join(f"{count} x {module}" for module, count in found["hits"].items()) or "everything"),
            ("micro-batch", rows),
        ],
    )
    parts = [[part.replace("_", " "), gib(size)] for part, size in memory["parts"].items() if size]
    table("Peak memory of a device", ["part", "GiB"], [*parts, ["expected", gib(memory["expected"])]], lines=False)
    verdict = "fits" if found["fits"] else "tight: what is expected fits, what it may come to does not"
    if not found["fits"] and not found["tight"]:
        verdict = "does not fit"
    said = [
        ("certain", f"{gib(memory['low'])} GiB, whatever the rows are"),
        ("may come to", f"{gib(memory['high'])} GiB"),
        ("verdict", f"{verdict} in {gib(target['memory'])} GiB"),
    ]
    if "max_micro_batch" in found:
        said.append(("largest micro-batch", f"{found['max_micro_batch']} rows of {step['length']:,} tokens"))
    if found["required"]:
        said.append(("needed here", settings(found["required"])))
    facts("Does it fit?", said)
    if not target["measured"]:
        say("CUDA context, fragmentation and kernels are not measured but assumed: see docs/plan.md.", "yellow")
    for limit in found["extrapolated"]:
        say(f"extrapolated: {limit}", "yellow")
    for note in found.get("notes", []):
        say(f"note: {note}", "yellow")
    for suggestion in found.get("suggestions", []):
        fits = "fits" if suggestion["fits"] else "not yet enough"
        say(f"{settings(suggestion['settings'])}", "bold")
        say(f"  expected {gib(suggestion['expected'])} GiB, {fits}; it costs {suggestion['costs']}")
    if "cost" in found:
        _cost(found["cost"])
    if "applied" in found:
        say(f"wrote {found['applied']}", "bold")


def _cost(cost: dict[str, Any]) -> None:
    unknown = "not known before the rows are counted: lora-recipes audit"
    time = "not known" if cost["seconds"] is None else duration(cost["seconds"])
    rate = cost["rate_is"] if cost["rate"] is None else f"at {cost['rate']:.3g} TFLOP/s, {cost['rate_is']}"
    disk = cost["disk"]
    facts(
        "What it takes",
        [
            ("steps", unknown if cost["steps"] is None else f"{cost['steps']:,}"),
            ("tokens", unknown if cost["tokens"] is None else f"{cost['tokens']:,} ({cost['tokens_are']})"),
            ("computation", unknown if cost["flops"] is None else f"{cost['flops']:.2e} operations"),
            ("time", f"{time} ({rate})"),
            ("disk", f"{gib(disk['checkpoints'])} GiB of checkpoints, {gib(disk['merged'])} GiB merged"),
        ],
    )


def settings(values: dict[str, Any]) -> str:
    """Settings as the words that a command takes."""
    return " ".join(f"{key}={json.dumps(value)}" for key, value in values.items())


def gib(size: float) -> str:
    """Bytes in GiB."""
    return f"{size / 2**30:.2f}"


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"
