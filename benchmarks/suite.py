"""The whole suite, or sections of it: figures into benchmarks/results.json, tables into docs/performance.md.

    make bench                                     (our own figures; the job needs DATA=alpaca.json once)
    make bench PEERS=1 DATA=alpaca.json            (and the other tools', each in an environment of its own)
    .venv/bin/python -m benchmarks.suite job --steps 10 --rounds 1 --only-peers lora-recipes trl

Sections: job (LoRA of SmolLM2-135M by every tool), latency, data, merge, attention, memory, scaling. Each replaces its own figures
and leaves the others' alone. A job that broke off goes on with --go-on. Without --with-peers the others' rows are kept
where they were measured on this machine.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import attention, data_preparation, job, latency, memory, merge, peers, results, scaling
from benchmarks.peers.measure import OTHERS, OURS

DATA_WANTED = (
    "the job needs rows: --data FILE (make bench DATA=FILE), JSON in alpaca's form (instruction, input, output) such as "
    "alpaca_en_demo.json of LLaMA-Factory"
)


def main() -> None:
    """Measure what is asked for, section by section."""
    parser = _parser()
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    command = " ".join(["python -m benchmarks.suite", *_words(sys.argv[1:])])
    sections = args.sections or list(SECTIONS)
    unknown = [name for name in sections if name not in SECTIONS]
    if unknown:
        parser.error(f"no section {unknown[0]!r}; there are {', '.join(SECTIONS)}")
    if "job" in sections and not args.tables:
        _ready(parser, args)
    for name in sections:
        section = _options(args).section if name == "job" else name
        print(f"== {section}", flush=True)
        measure, markdown = SECTIONS[name]
        if not args.tables:
            measure(args, command)
        found = results.read().get(section)
        if found is None:
            print("nothing measured yet")
            continue
        lines = markdown(found, args)
        print("\n".join(lines), flush=True)
        if not args.no_page:
            results.publish(section, lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.suite",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}; unset: all")
    parser.add_argument("--tables", action="store_true", help="measure nothing: write the tables of what is measured")
    parser.add_argument("--no-page", action="store_true", help="print the tables, and leave docs/performance.md alone")
    of_job = parser.add_argument_group("job")
    of_job.add_argument("--with-peers", action="store_true", help="install and measure the other tools too")
    of_job.add_argument("--only-peers", nargs="+", metavar="TOOL", help=f"only these, of {', '.join(peers.PEERS)}")
    of_job.add_argument(
        "--pairs",
        nargs="+",
        type=_way,
        default=[],
        metavar="TOOL[:VARIANT]",
        help=f"only these, all in every round, into a table of their own; variants: {', '.join(job.VARIANTS)}",
    )
    of_job.add_argument("--jobs", nargs="+", choices=peers.TARGETS, default=list(peers.TARGETS))
    of_job.add_argument("--steps", type=int, default=40)
    of_job.add_argument("--rounds", type=int, default=3)
    of_job.add_argument("--cores", type=int, default=1)
    of_job.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    of_job.add_argument("--go-on", action="store_true", help="measure only what results.json has not")
    of_job.add_argument("--again", choices=job.PARTS, help="measure this part of the rows that are there, no training")
    of_job.add_argument("--lab", type=Path, default=peers.default_folder(), help="its folder; unset: %(default)s")
    of_job.add_argument("--data", type=Path, help="lay the lab out with the rows of this file")
    others = parser.add_argument_group("other sections")
    others.add_argument("--runs", type=int, default=3, help="of each way to start a run, and each pair of merges (3)")
    others.add_argument("--rows", type=int, default=20_000, help="that are prepared (%(default)s)")
    others.add_argument("--layers", type=int, default=4, help="of the model that is merged (%(default)s)")
    others.add_argument("--only", nargs="+", help="parts of `scaling`")
    return parser


def _way(word: str) -> job.Way:
    name, _, variant = word.partition(":")
    if variant and variant not in job.VARIANTS:
        raise argparse.ArgumentTypeError(f"no variant {variant!r}")
    return name, variant or None


def _words(words: list[str]) -> list[str]:
    """The command line, without this machine's folders."""
    return [Path(word).name if os.sep in word else word for word in words]


def _ready(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Lay the lab out, and install what will be measured."""
    unknown = [name for name in _tools(args) if name not in peers.PEERS]
    if unknown:
        parser.error(f"no tool {unknown[0]!r}; there are {', '.join(peers.PEERS)}")
    if args.data:
        if not args.data.is_file():
            parser.error(f"{args.data}: no such file; {DATA_WANTED}")
        peers.lay_out(args.lab, args.data)
    try:
        lab = peers.opened(args.lab)
    except FileNotFoundError:
        parser.error(f"{args.lab}: no rows there yet; {DATA_WANTED}")
    for name in _tools(args):
        installed = peers.install(peers.PEERS[name], lab)
        if installed["rc"] != 0:  # its rows will say "not installed"
            print(f"{name}: not installed: {installed['error']}", flush=True)


def _tools(args: argparse.Namespace) -> list[str]:
    """What is measured, in the order of the first round."""
    if args.only_peers or args.pairs:
        return list(args.only_peers or dict.fromkeys(name for name, _ in args.pairs))
    if args.device == "gpu":
        return [name for name, tool in OURS.items() if name != "lora-recipes-float32"] + ["trl"]
    return [*job.OURS, *(OTHERS if args.with_peers else ())]


def _options(args: argparse.Namespace) -> job.Options:
    asked = (args.steps, args.rounds, args.cores, args.device, args.go_on, args.pairs)
    return job.Options(args.lab, _tools(args), args.jobs, *asked)


def _measure_job(args: argparse.Namespace, command: str) -> None:
    options = _options(args)
    if args.again:
        job.measure_again(options, args.again, command)
    else:
        job.measure(options, command)


def _measure_latency(args: argparse.Namespace, command: str) -> None:
    _kept("latency", command, lambda: latency.measure(args.runs))


def _measure_data(args: argparse.Namespace, command: str) -> None:
    _kept("data", command, lambda: data_preparation.measure(args.rows, args.rows // 4))


def _measure_merge(args: argparse.Namespace, command: str) -> None:
    _kept("merge", command, lambda: merge.measure(args.layers, args.runs))


def _measure_attention(args: argparse.Namespace, command: str) -> None:
    _kept("attention", command, attention.measure)


def _measure_memory(args: argparse.Namespace, command: str) -> None:
    _kept("memory", command, lambda: list(memory.measure([memory.LARGE])))


def _measure_scaling(args: argparse.Namespace, command: str) -> None:
    def keep(part: dict[str, Any]) -> None:
        facts = results.ended(results.begun(command))
        results.keep(
            "scaling", {"machine": facts, "figures": results.kept_here("scaling", facts).get("figures", {}) | part}
        )

    scaling.measure(args.only, keep)


def _kept(section: str, command: str, measure: Callable[[], Any]) -> None:
    facts = results.begun(command)
    figures = measure()
    results.keep(section, {"machine": results.ended(facts), "figures": figures})


def _of_data(figures: dict[str, Any]) -> list[str]:
    rows = f"{figures['ours']['rows']:,} chat rows with {figures['ours']['tokens']:,} tokens."
    again = f"The second start took {figures['ours']['again']:.2f} s."
    return [rows, "", *results.table(data_preparation.HEADS, data_preparation.cells(figures)), "", again]


def _of_memory(figures: list[dict[str, Any]]) -> list[str]:
    heads = ["setting (rows x tokens)", "weights MB", "planned MB", "measured MB", "measured / planned", "bound met"]
    body = []
    for one in figures:
        planned, real = one["planned"], one["measured"]
        ratio = real["process"] / planned["process"]
        sizes = [f"{size / memory.MIB:,.0f}" for size in (planned["weights"], planned["process"], real["process"])]
        body.append([one["setting"], *sizes, f"{ratio:.2f}", "yes" if ratio <= MOST_OF_PLAN else "no"])
    told = f"The bound is {MOST_OF_PLAN} x all that `plan` predicts, of which the NF4 weights are a part."
    return [*results.table(heads, body), "", told]


def _section(shown: Callable[[Any], list[str]]) -> Callable[[Any, argparse.Namespace], list[str]]:
    return lambda found, args: [results.described(found["machine"]), "", *shown(found["figures"])]


MOST_OF_PLAN = 1.3
SECTIONS: dict[str, tuple[Callable[[argparse.Namespace, str], None], Callable[[Any, argparse.Namespace], list[str]]]]
SECTIONS = {
    "job": (_measure_job, lambda found, args: job.markdown(found, args.device)),
    "latency": (_measure_latency, _section(lambda figures: latency.markdown(figures).splitlines())),
    "data": (_measure_data, _section(_of_data)),
    "merge": (_measure_merge, _section(merge.markdown)),
    "attention": (_measure_attention, _section(attention.markdown)),
    "memory": (_measure_memory, _section(_of_memory)),
    "scaling": (_measure_scaling, _section(scaling.markdown)),
}


if __name__ == "__main__":
    main()
