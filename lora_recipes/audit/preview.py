"""Some rows as the model will see them: in the terminal, as JSON, or as a page."""

from html import escape
from pathlib import Path
from typing import Any

from lora_recipes import console
from lora_recipes.audit import audited
from lora_recipes.data.show import Piece, ShownRow, row_of, worst_rows
from lora_recipes.recipe import Recipe
from lora_recipes.run_dir import RunDir, write_text

ROWS = 5

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #222; background: #fff }
article { border: 1px solid #ccc; border-radius: 6px; margin: 1rem 0; overflow: hidden }
header { background: #f2f2f2; padding: .4rem .8rem; font-size: 13px }
pre { margin: 0; padding: .8rem; white-space: pre-wrap; overflow-wrap: anywhere; color: #777 }
pre b { color: #06620e; background: #e2f6e4; font-weight: normal }
pre i { font-style: normal; border: 1px solid #bbb; border-radius: 3px; padding: 0 2px; font-size: 12px }
@media (prefers-color-scheme: dark) {
  body { color: #ddd; background: #181818 } header { background: #282828 } article { border-color: #444 }
  pre { color: #888 } pre b { color: #7fe08a; background: #16351a } pre i { border-color: #666 }
}
"""


def preview(recipe: Recipe, *, count: int = ROWS, row: int | None = None, page: bool = False) -> dict[str, Any]:
    """Show rows, the worst cases first, or the one with a number.

    Args:
        row: number of a training row, from 1.
        page: also write outputs/<name>/preview.html.

    Returns:
        {"rows": [{"row", "place", "why", "input_ids", "labels", "text", ...}]}

    Raises:
        RunError: there is no such row.
    """
    data, report = audited(recipe)
    rows = [row_of(data, row)] if row is not None else worst_rows(data, report, count)
    for shown in rows:
        console.example(f"{shown.place}, {shown.why}", shown)
    for problem in report["problems"]:
        console.say(f"problem: {problem['text']}", "red")
    found: dict[str, Any] = {"rows": [shown.as_json() for shown in rows]}
    if page:
        run_dir = RunDir.of(recipe.name)
        run_dir.require_writable()
        path = run_dir.root / "preview.html"
        _write_page(path, recipe.name, rows)
        console.say(f"Page: {path}", "bold")
        found["page"] = str(path)
    return found


def _write_page(path: Path, name: str, rows: list[ShownRow]) -> None:
    """One file without scripts; whatever a row holds is text."""
    title = escape(f"{name}: what the model will see")
    body = "\n".join(_article(row) for row in rows)
    head = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style></head>'
    legend = "<p><b>Green</b> is what the loss is on; boxed are control tokens.</p>"
    write_text(path, f"{head}<body><h1>{title}</h1>{legend}\n{body}\n</body></html>\n")


def _article(row: ShownRow) -> str:
    told = f"{row.place} ({row.split}, row {row.row}): {row.why}; {row.trained} of {len(row.input_ids)} tokens trained"
    return f"<article><header>{escape(told)}</header><pre>{''.join(map(_marked, row.pieces))}</pre></article>"


def _marked(piece: Piece) -> str:
    text = escape(piece.text)
    text = f"<i>{text}</i>" if piece.control else text
    return f"<b>{text}</b>" if piece.trained else text
