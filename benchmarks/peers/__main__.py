"""Install and measure other tools doing one LoRA job of SmolLM2-135M; prints a JSON row for each figure, as it is taken.

    .venv/bin/python -m benchmarks.peers --data alpaca.json --install            (lays out, makes the environments)
    .venv/bin/python -m benchmarks.peers axolotl trl --steps 40 --out rows.json  (measures two tools, both jobs)

The data file is JSON in alpaca's form (instruction, input, output); its last 50 rows are held out. Each environment takes
1 to 2 GB. A tool that cannot be installed, run, or do a part has a row that says so.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import peers


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("peers", nargs="*", metavar="PEER", help=f"of {', '.join(peers.PEERS)}; unset: all")
    parser.add_argument("--lab", type=Path, default=peers.default_folder(), help="its folder; unset: %(default)s")
    parser.add_argument("--data", type=Path, help="lay the lab out with the rows of this file")
    parser.add_argument("--install", action="store_true", help="make the environments; nothing is measured")
    parser.add_argument("--jobs", nargs="+", choices=peers.TARGETS, default=list(peers.TARGETS))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1, help="OMP_NUM_THREADS")
    parser.add_argument("--cores", type=int, help="hold each training to so many; unset: all")
    parser.add_argument("--schedule", choices=("constant", "linear"), default="constant")
    parser.add_argument(
        "--checkpointing", choices=("on", "off"), help="of activations; unset: off, and `trl sft` at its default, on"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the other tools (%(default)s)"
    )
    parser.add_argument("--only", nargs="+", choices=("help", "train", "merge", "held-out"), help="unset: all four")
    parser.add_argument("--out", type=Path, help="write the rows there too, as one JSON list")
    args = parser.parse_args()
    unknown = [name for name in args.peers if name not in peers.PEERS]
    if unknown:
        parser.error(f"no peer {unknown[0]!r}; there are {', '.join(peers.PEERS)}")
    if args.data:
        peers.lay_out(args.lab, args.data)
    try:
        peers.opened(args.lab)
    except FileNotFoundError as error:
        parser.error(str(error))
    rows = []
    for row in rows_of(args):
        rows.append(row)
        print(json.dumps(row), flush=True)
        if args.out:
            args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    sys.exit(any(row["rc"] not in (0, None) for row in rows))


def rows_of(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What was asked for, one tool after another."""
    lab, threads = args.lab, args.threads
    wanted = args.only or ("help", "train", "merge", "held-out")
    checkpointing = None if args.checkpointing is None else args.checkpointing == "on"
    for name in args.peers or peers.PEERS:
        if args.install:
            yield {"what": "install"} | peers.install(peers.PEERS[name], peers.opened(lab))
            continue
        if "help" in wanted:
            yield {"what": "help"} | peers.measure_help(name, lab, threads)
        for job in args.jobs:
            if "train" in wanted:
                row = peers.measure(
                    name,
                    job,
                    args.steps,
                    lab,
                    threads,
                    cores=args.cores,
                    schedule=args.schedule,
                    checkpointing=checkpointing,
                    dtype=args.dtype,
                )
                yield {"what": "train"} | row
                if row["rc"] != 0:
                    continue  # there is nothing to merge
            if "merge" in wanted:
                yield {"what": "merge"} | peers.measure_merge(name, job, lab, threads)
            if "held-out" in wanted:
                yield {"what": "held-out"} | peers.held_out_of(name, job, lab, threads)


if __name__ == "__main__":
    main()
