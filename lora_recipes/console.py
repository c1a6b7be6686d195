"""What the user sees. People read stderr; with `--json` stdout holds one JSON object."""

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

_stderr = Console(stderr=True, highlight=False, soft_wrap=True)


def say(text: str, style: str | None = None) -> None:
    """A line for people."""
    _stderr.print(Text(text, style=style or ""))


def error(text: str) -> None:
    """An error a user can act on: one message, no traceback."""
    _stderr.print(Text("error: ", style="bold red") + Text(text))


def emit_json(value: dict[str, Any]) -> None:
    """The one JSON object of `--json`."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")


def facts(title: str, rows: Iterable[tuple[str, str]]) -> None:
    """A titled list of names and values."""
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        show_header=False,
        box=None,
        padding=(0, 2, 0, 0),
    )
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    _stderr.print(table)


def trained_tokens(pieces: Iterable[tuple[str, bool]], trained_count: int, count: int) -> None:
    """A training example with the text that carries loss in green, the rest dim; the legend counts tokens."""
    text = Text("One training example, ", style="bold")
    text.append("green = trained", style="bold green")
    text.append(f" ({trained_count} of {count} tokens)\n", style="bold")
    for piece, trained in pieces:
        text.append(piece.replace("\x1b", "␛"), style="green" if trained else "dim")
    _stderr.print(text)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], styles: Sequence[str] = ()) -> None:
    """A table of plain texts; whatever a model wrote is shown, never interpreted as markup."""
    drawn = Table(title=title, title_justify="left", title_style="bold", show_lines=True)
    for index, column in enumerate(columns):
        drawn.add_column(column, overflow="fold", style=styles[index] if index < len(styles) else None)
    for row in rows:
        drawn.add_row(*(Text(cell.replace("\x1b", "␛")) for cell in row))
    _stderr.print(drawn)


def scores(by_model: dict[str, dict[str, Any]]) -> None:
    """One row a model: exact match, fields right, ended by itself."""

    def percent(share: float | None) -> str:
        return "—" if share is None else f"{100 * share:.1f} %"

    table(
        "Held-out rows",
        ["model", "exact match", "fields right", "stopped by eos"],
        [
            [
                who,
                percent(values["exact_match"]),
                percent(values["field_match"]),
                percent(values["stopped_by_eos"]),
            ]
            for who, values in by_model.items()
        ],
    )


def status(name: str, found: dict[str, Any]) -> None:
    """How a run stands: gates, scores, what to type next."""
    marks = {True: "held", False: "FAILED", None: "not tried yet"}
    steps = f"step {found['step']} of {found['max_steps']}" if found["max_steps"] else "no step"
    rows = [("state", f"{found['state']}, {steps}")]
    rows += [(gate.replace("_", " "), marks[held]) for gate, held in found["gates"].items()]
    rows += [("verdict", found["verdict"]), ("files", found["folder"])]
    facts(name, rows)
    if found["scores"]:
        scores(found["scores"])
    say("Next:", "bold")
    for command in found["next"]:
        say(f"  {command}")


def plan(name: str, found: dict[str, Any]) -> None:
    """What a recipe trains and what that needs for certain."""
    gib = 2**30
    parts = found["memory"]["parts"]
    facts(
        name,
        [
            (
                "parameters",
                f"{found['trainable']:,} trainable of {found['all']:,} ({found['trainable_percent']:.4f} %)",
            ),
            ("adapted", ", ".join(f"{count} x {module}" for module, count in found["hits"].items())),
            *((part.replace("_", " "), f"{size / gib:.2f} GiB") for part, size in parts.items()),
            ("at least", f"{found['memory']['low'] / gib:.2f} GiB, and activations and logits on top"),
        ],
    )
