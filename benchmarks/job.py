"""The job that all tools do, in rounds: figures of each tool, who is best at what, and the tables.

Round 1 measures every tool, and some of them in other ways too. Later rounds measure only ours and, for each paired column,
what was best in round 1, in turned order every other round, so that a busy machine is busy for all of them.
"""

import json
import shutil
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import peers, rate, results
from benchmarks.results import Row

KEYS = ("peer", "job", "variant")
OURS = ("lora-recipes", "lora-recipes-float32")
# Other ways to ask another tool: only its training is measured so, and where that may change the result its held-out loss.
VARIANTS: dict[str, dict[str, Any]] = {"checkpointing": {"checkpointing": True}, "bf16": {"dtype": "bfloat16"}}
LEAN = ("llamafactory", "swift")  # measured with checkpointing too, for their memory
DROPPED = ("learning_rates", "commands", "threads_asked", "schedule")
NO_FIGURE = "–"

Way = tuple[str, str | None]  # a tool, and its variant; None: as its `Peer` says, the others in float32 on a CPU


@dataclass(frozen=True)
class Options:
    """What is asked for."""

    lab: Path
    names: Sequence[str]  # tools, in the order of the first round
    jobs: Sequence[str] = tuple(peers.TARGETS)
    steps: int = 40
    rounds: int = 3
    cores: int = 1
    device: str = "cpu"
    go_on: bool = False  # keep what is measured already
    pairs: Sequence[Way] = ()  # that are measured in every round, and nothing else

    @property
    def section(self) -> str:
        if self.pairs:
            return "job-pairs"
        return "job" if self.device == "cpu" else f"job-{self.device}"

    def card(self) -> Row:
        return {"gpu": results.card()} if self.device == "gpu" else {}


@dataclass(frozen=True)
class Column:
    """A figure of a tool's run."""

    head: str
    of: Callable[[Row], float | None]
    shown: str = "{:,.1f}"
    best: Callable[..., Any] | None = None  # max or min; unset: compared with nobody
    paired: bool = False  # its best peer is measured in every round
    device: str = ""  # only there


def _key(name: str) -> Callable[[Row], float | None]:
    return lambda row: row.get(name)


def _of(part: str, name: str) -> Callable[[Row], float | None]:
    return lambda row: (row.get(part) or {}).get(name)


def _computed(row: Row) -> float | None:
    return row["computed_tokens"] / row["real_tokens"] if row.get("real_tokens") else None


def _merged(name: str) -> Callable[[Row], float | None]:
    def figure(row: Row) -> float | None:
        merge = row.get("merge") or {}
        return merge.get(name) if merge.get("rc") == 0 else None

    return figure


def _loadable(row: Row) -> float | None:
    merge = row.get("merge") or {}
    return merge.get("wall") if merge.get("loadable") else None


REAL = Column("real tokens / CPU s", _key("real_per_cpu_second"), best=max, paired=True, device="cpu")
TRAINING = (
    REAL,
    Column("supervised / CPU s", _key("supervised_per_cpu_second"), best=max, paired=True, device="cpu"),
    Column("real tokens / s", _key("real_per_second"), "{:,.0f}", max, True, "gpu"),
    Column("supervised / s", _key("supervised_per_second"), "{:,.0f}", max, True, "gpu"),
    Column("computed / real", _computed, "{:.2f}"),
    Column("peak GPU MB", _key("gpu_mb"), "{:,.0f}", min, device="gpu"),
    Column("peak RSS MB", _key("rss_mb"), "{:,.0f}", min),
    Column("held-out loss", _of("held_out", "loss"), "{:.4f}"),
    Column("supervised tokens trained", _key("supervised_tokens"), "{:,.0f}"),
)
WAITING = (
    Column("`--help` s", _of("help", "wall"), "{:.2f}", min),
    Column("first step s", _key("first_step"), best=min, paired=True),
    Column("first step CPU s", _key("first_step_cpu"), best=min, paired=True),
    Column("merge s", _merged("wall"), best=min, paired=True),
    Column("merge CPU s", _merged("cpu")),
    Column("merge RSS MB", _merged("rss_mb"), "{:,.0f}"),
)


def measure(options: Options, command: str) -> None:
    """All rounds; every row is kept as soon as it is taken."""
    found: Row = {"machine": results.begun(command) | options.card()}
    found["rows"] = results.kept_here(options.section, found["machine"]).get("rows", [])
    found["asked"] = {"steps": options.steps, "rounds": options.rounds, "cores": options.cores}
    found["rates"] = {dtype: rate.measured(dtype, options.cores) for dtype in ("float32", "bfloat16")}
    found["weights"] = weights_of(peers.opened(options.lab).base)
    found["base_held_out"] = peers.held_out_loss(None, options.lab, options.cores)
    for number in range(1, options.rounds + 1):
        for job in options.jobs:
            if number == 1 and not options.go_on:
                found["rows"] = [row for row in found["rows"] if row["job"] != job or row["peer"] not in options.names]
            for way in order(options, found["rows"], job, number, _fast_at_bf16(found)):
                if options.go_on and _there(found["rows"], way, job, number, options.steps):
                    continue
                row = one(options, way, job, job == options.jobs[0])
                found["rows"] = results.with_row(found["rows"], row | {"round": number}, KEYS)
                _say(row, number)
                results.keep(options.section, found)
        found["rates"] = {
            dtype: max(best, rate.measured(dtype, options.cores)) for dtype, best in found["rates"].items()
        }
    found["machine"] = results.ended(found["machine"])
    found["summary"] = summary(found["rows"], options.device)
    results.keep(options.section, found)


def measure_again(options: Options, part: str, command: str) -> None:
    """A part of the rows that are there, such as their merges, anew; the trainings stay as they were measured."""
    facts = results.begun(command) | options.card()
    found = results.kept_here(options.section, facts)
    if not found:
        raise SystemExit("nothing of the job was measured on this machine yet")
    for number in range(1, options.rounds + 1):
        for job in options.jobs:
            for name, variant in order(options, found["rows"], job, number):
                for row in found["rows"]:
                    same = (row["peer"], row["variant"], row["job"], row["round"]) == (name, variant, job, number)
                    if same and part in row:
                        row[part] = _told(PARTS[part](options, name, job), options.lab)
                        print(f"round {number}, {job}, {name}: {part} {row[part].get('wall', '')}", flush=True)
                        results.keep(options.section, found)
    found["again"] = found.get("again", {}) | {part: results.ended(facts)}
    found["summary"] = summary(found["rows"], options.device)
    results.keep(options.section, found)


def order(options: Options, rows: Sequence[Row], job: str, number: int, bf16: bool = False) -> list[Way]:
    """What is measured of one job in one round.

    Args:
        bf16: the other tools are measured in bf16 too, where this CPU's products are faster in it.
    """
    if options.pairs:
        return list(options.pairs if number % 2 else options.pairs[::-1])
    if number == 1:
        ways: list[Way] = [(name, None) for name in options.names]
        others = [name for name in options.names if not _is_ours(name) and options.device == "cpu"]
        ways += [(name, "checkpointing") for name in others if name in LEAN]
        return ways + [(name, "bf16") for name in others if bf16]
    paired = [column for column in columns(options.device) if column.paired]
    found = (best_peer(rows, job, column, float32) for column in paired for float32 in (False, True))
    best = {(row["peer"], row["variant"]) for row in found if row and row["peer"] in options.names}
    ways = [(name, None) for name in options.names if _is_ours(name) or (name, None) in best]
    ways += sorted(way for way in best if way[1] is not None)
    return ways if number % 2 else ways[::-1]


def _fast_at_bf16(found: Row) -> bool:
    return found["rates"]["bfloat16"] > found["rates"]["float32"]


def one(options: Options, way: Way, job: str, with_help: bool) -> Row:
    """Everything that is measured of one tool in one round; of a variant the training alone, and what it learnt in bf16."""
    name, variant = way
    parts = ["help"] * with_help + ["merge", "held_out"]
    if variant is None:
        asked = {"dtype": "bfloat16"} if options.device == "gpu" else {}
        return _measured(options, way, job, asked, parts)
    with _kept_aside(peers.opened(options.lab).out(name, job)):
        return _measured(options, way, job, VARIANTS[variant], ["held_out"] if variant == "bf16" else [])


def _measured(options: Options, way: Way, job: str, asked: dict[str, Any], parts: Sequence[str]) -> Row:
    name, variant = way
    row = peers.measure(
        name, job, options.steps, options.lab, options.cores, cores=options.cores, device=options.device, **asked
    )
    row["variant"] = variant
    if row["rc"] == 0 and asked.get("dtype", row["dtype"]) != row["dtype"] and not _is_ours(name):
        row |= {"rc": "dtype", "error": f"it computed in {row['dtype']}"}
    row |= {part: PARTS[part](options, name, job) for part in parts if row["rc"] == 0 or part == "help"}
    return _told(row, options.lab)


@contextmanager
def _kept_aside(trained: Path) -> Iterator[None]:
    """What a tool has trained is there again afterwards: `--again` merges it, and not what a variant has trained."""
    aside = trained.with_name(f"{trained.name}.aside")
    if trained.exists():
        trained.rename(aside)
    try:
        yield
    finally:
        shutil.rmtree(trained, ignore_errors=True)
        if aside.exists():
            aside.rename(trained)


def weights_of(base: Path) -> Row:
    """How many weights of the base's linear layers a token passes: {"body", "head"}, and by job "adapter"."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    width = config.get("head_dim") or hidden // config["num_attention_heads"]
    query, key = width * config["num_attention_heads"], width * config["num_key_value_heads"]
    sizes = dict.fromkeys(("q_proj", "o_proj"), (hidden, query)) | dict.fromkeys(("k_proj", "v_proj"), (hidden, key))
    sizes |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), (hidden, inner))
    layers, rank = config["num_hidden_layers"], peers.Job("qv", 1).rank
    return {
        "body": layers * sum(first * second for first, second in sizes.values()),
        "head": hidden * config["vocab_size"],
        "adapter": {
            job: layers * rank * sum(sum(sizes[name]) for name in targets) for job, targets in peers.TARGETS.items()
        },
    }


def share(row: Row, found: Row, dtype: str = "float32") -> float | None:
    """Of the machine's rate of matrix products, what the tool's real tokens need (`rate.flops_per_token`)."""
    if not row.get("real_per_cpu_second"):
        return None
    weights, supervised = found["weights"], row["supervised_tokens"] / row["real_tokens"]
    needed = rate.flops_per_token(weights["body"], weights["head"], weights["adapter"][row["job"]], supervised)
    return row["real_per_cpu_second"] * row["threads"] * needed / found["rates"][dtype]


def columns(device: str) -> list[Column]:
    """Of both tables, those that a device has."""
    return [column for column in (*TRAINING, *WAITING) if column.device in ("", device)]


def median(rows: Sequence[Row], column: Column) -> float | None:
    """Of the rounds that have the figure."""
    figures = [figure for row in rows if (figure := column.of(row)) is not None]
    return statistics.median(figures) if figures else None


def grouped(rows: Sequence[Row], job: str) -> dict[Way, list[Row]]:
    """The rounds of each tool and each of its variants, a job's."""
    found: dict[Way, list[Row]] = {}
    for row in rows:
        if row["job"] == job:
            found.setdefault((row["peer"], row["variant"]), []).append(row)
    return found


def best_peer(rows: Sequence[Row], job: str, column: Column, float32: bool = False) -> Row | None:
    """The row of the other tool, or its variant, that was best in round 1.

    A merge counts where it writes a model that loads; what a user waits for is measured of no variant.

    Args:
        float32: of those that compute in it.
    """
    of = _loadable if column.of is _MERGE_WALL else column.of
    others = [row for row in rows if row["job"] == job and row["round"] == 1 and not _is_ours(row["peer"])]
    others = [row for row in others if row["rc"] == 0 and of(row) is not None]
    if column in WAITING:
        others = [row for row in others if row["variant"] is None]
    if float32:
        others = [row for row in others if row["variant"] != "bf16"]
    return column.best(others, key=of) if others and column.best else None


def ratios(rows: Sequence[Row], job: str, column: Column, name: str) -> list[float]:
    """Ours over the best peer's, of every round that has both; our float32 is held against theirs."""
    best = best_peer(rows, job, column, float32=name == OURS[1])
    if best is None:
        return []
    theirs = {row["round"]: column.of(row) for row in grouped(rows, job)[best["peer"], best["variant"]]}
    ours = {row["round"]: column.of(row) for row in rows if row["job"] == job and row["peer"] == name}
    pairs = [(ours[number], theirs[number]) for number in sorted(ours.keys() & theirs.keys())]
    return [first / second for first, second in pairs if first is not None and second]


def summary(rows: Sequence[Row], device: str) -> list[Row]:
    """Median, least and most of each figure of each tool."""
    found = []
    for job in dict.fromkeys(row["job"] for row in rows):
        for (name, variant), runs in grouped(rows, job).items():
            line: Row = {"peer": name, "job": job, "variant": variant, "rounds": len(runs)}
            for column in columns(device):
                figures = [figure for row in runs if (figure := column.of(row)) is not None]
                if figures:
                    line[column.head] = [statistics.median(figures), min(figures), max(figures)]
            found.append(line)
    return found


def markdown(found: Row, device: str = "cpu") -> list[str]:
    """The section's tables, and why a figure is missing."""
    rows, rates = found["rows"], found["rates"]
    jobs = list(dict.fromkeys(row["job"] for row in rows))
    lines = [results.described(found["machine"]), ""]
    for part, facts in found.get("again", {}).items():
        lines += [f"{part.replace('_', '-').capitalize()}, measured once more: {results.described(facts)}", ""]
    limits = f"{rates['float32'] / 1e9:,.0f} GFLOP/s in float32 and {rates['bfloat16'] / 1e9:,.0f} in bf16"
    base = found["base_held_out"].get("loss")
    alone = f"Matrix products alone: {limits}." if device == "cpu" else f"Card: {found['machine']['gpu']}."
    lines += [f"{_asked(found['asked'])} {alone}", ""]
    lines += [f"Held-out loss of the base: {base:.4f}.", ""] if base else []
    for job in jobs:
        tools = grouped(rows, job)
        lines += [f"**{job}**", "", *_training(tools, found, device), ""]
        lines += [*_waiting(tools, rows, device), ""]
        lines += [*_comparison(rows, job, device), ""]
    return lines + list(_notes(rows))


def _asked(asked: Row) -> str:
    cores = f"{asked['cores']} core" + ("s" if asked["cores"] > 1 else "")
    return f"{asked['steps']} steps, {asked['rounds']} rounds, medians; {cores}."


def _training(tools: dict[Way, list[Row]], found: Row, device: str) -> list[str]:
    shown = [column for column in TRAINING if column.device in ("", device)]
    heads = ["tool", "computes in", *(column.head for column in shown)]
    limits = ("float32", "bfloat16") if device == "cpu" else ()
    heads += [f"of the {'bf16' if dtype == 'bfloat16' else dtype} rate" for dtype in limits]
    body = []
    for runs in tools.values():
        cells = [_named(runs[0]), _type(runs), *(_cell(runs, column) for column in shown)]
        for dtype in limits:
            shares = [figure for row in runs if (figure := share(row, found, dtype)) is not None]
            cells.append(f"{100 * statistics.median(shares):.0f} %" if shares else NO_FIGURE)
        body.append(cells)
    return results.table(heads, body, 2)


def _waiting(tools: dict[Way, list[Row]], rows: Sequence[Row], device: str) -> list[str]:
    heads = ["tool", "version", *(column.head for column in WAITING)]
    body = []
    for (name, variant), runs in tools.items():
        if variant is not None:
            continue
        anywhere = [row for row in rows if row["peer"] == name]
        cells = [_cell(anywhere if column is WAITING[0] else runs, column) for column in WAITING]
        body.append([_named(runs[0]), runs[0]["version"] or NO_FIGURE, *cells])
    return results.table(heads, body, 2)


def _comparison(rows: Sequence[Row], job: str, device: str) -> list[str]:
    ours = [name for name in OURS if any(row["peer"] == name and row["job"] == job for row in rows)]
    body = []
    for column in columns(device):
        cells = [column.head]
        for name in ours:
            best, found = best_peer(rows, job, column, float32=name == OURS[1]), ratios(rows, job, column, name)
            spread = f" ({min(found):.2f}–{max(found):.2f})" if len(found) > 1 else ""
            cells += [
                _named(best) if best else NO_FIGURE,
                f"{statistics.median(found):.2f}{spread}" if found else NO_FIGURE,
            ]
        if column.best and any(cell != NO_FIGURE for cell in cells[1:]):
            body.append(cells)
    heads = ["figure"]
    for name in ours:
        heads += [f"best peer{' in float32' if name == OURS[1] else ''}", f"`{name}` / it"]
    return results.table(heads, body, 2) if body else []


def _notes(rows: Sequence[Row]) -> Iterator[str]:
    """What a tool does another way, and what it failed at, each said once."""
    said: dict[str, None] = {}
    for row in rows:
        name = _named(row)
        if row.get("differs"):
            said[f"- {row['peer']}: {row['differs']}."] = None
        for what, part in (("training", row), *((key, row.get(key) or {}) for key in ("merge", "held_out", "help"))):
            if part.get("rc", 0) != 0:
                why = part.get("reason") or f"failed ({part['rc']}): {part.get('error', 'it said nothing')}"
                said[f"- {name}, {row['job']}, {what.replace('_', '-')}: {why}."] = None
    yield from said


def _named(row: Row) -> str:
    shown = f"**{row['peer']}**" if _is_ours(row["peer"]) else row["peer"]
    asked = [
        word for word, said in (("checkpointing", row["checkpointing"]), ("bf16", row["variant"] == "bf16")) if said
    ]
    return ", ".join([shown, *asked])


def _type(runs: Sequence[Row]) -> str:
    return next((row["dtype"].replace("bfloat16", "bf16") for row in runs if row.get("dtype")), NO_FIGURE)


def _cell(runs: Sequence[Row], column: Column) -> str:
    figure = median(runs, column)
    return column.shown.format(figure) if figure is not None else NO_FIGURE


def _is_ours(name: str) -> bool:
    return name.startswith("lora-recipes")


def _there(rows: Sequence[Row], way: Way, job: str, number: int, steps: int) -> bool:
    wanted = (*way, job, number, steps)
    return any(
        (row["peer"], row["variant"], row["job"], row["round"], row["asked_steps"]) == wanted
        for row in rows
        if row["rc"] in (0, None)
    )


def _told(part: Row, lab: Path) -> Row:
    """A row without what no table needs, and an error in its last line, without this machine's folders."""
    found: Row = {}
    for key, value in part.items():
        if key in DROPPED:
            continue
        if isinstance(value, dict):
            value = _told(value, lab)
        elif key in ("error", "reason") and value:
            last = [line.strip() for line in str(value).splitlines() if line.strip()][-1:]
            value = "".join(last).replace(str(lab.resolve()), "LAB").replace(str(Path.home()), "~").rstrip(".")
        found[key] = value
    return found


def _say(row: Row, number: int) -> None:
    what = row.get("reason") or row.get("error") or f"{row.get('real_per_cpu_second', 0):.0f} real tokens / CPU s"
    print(f"round {number}, {row['job']}, {_named(row)}: {what}", flush=True)


_MERGE_WALL = WAITING[3].of
# What is measured of a tool beside its training.
PARTS: dict[str, Callable[[Options, str, str], Row]] = {
    "help": lambda options, name, job: peers.measure_help(name, options.lab, options.cores),
    "merge": lambda options, name, job: peers.measure_merge(name, job, options.lab, options.cores),
    "held_out": lambda options, name, job: peers.held_out_of(name, job, options.lab, options.cores),
}
