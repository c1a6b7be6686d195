"""The commands: `lora-recipes VERB RECIPE [section.key=value ...] [--json]`. What needs no model never imports one."""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_recipes import __version__, process
from lora_recipes.errors import (
    EXIT_DONE,
    EXIT_REFUSED,
    EXIT_USER,
    LoraRecipesError,
    RunError,
    machine_fault,
)
from lora_recipes.recipe import InvalidRecipe, Recipe, load_recipe
from lora_recipes.recipe.vocabulary import COMBINATIONS

Result = dict[str, Any]
# Options that only some verbs have a use for.
ONLY_FOR = {
    "-n": "preview",
    "--row": "preview",
    "--html": "preview",
    "--resume": "train",
    "--fresh": "train reproduce",
    "--accept-changes": "train reproduce",
    "--fit": "train",
    "--config_file": "train plan",
    "--gpu": "plan",
    "--gpus": "plan",
    "--tflops": "plan",
    "--table": "plan",
    "--apply": "plan",
    "--force": "generate chat evaluate merge",
    "--served": "generate",
    "--adapter": "chat",
    "--mix": "evaluate",
    "--tasks": "evaluate",
    "--include_path": "evaluate",
    "--adapters": "merge",
    "--method": "merge",
    "--dry_run": "push",
    "--allow-pickle": "train reproduce generate chat evaluate",
}
EXIT_CODES = (
    "0 done, 2 recipe or data wrong, 3 machine lacks something, 4 refused, 143 stopped and saved, 1 a bug of ours"
)


def main(arguments: list[str] | None = None) -> int:
    """Run one verb and return its exit code."""
    parser = _parser()
    args = parser.parse_intermixed_args(arguments)
    args.alone = arguments is None  # this process does this one thing and ends
    if args.verb is None:
        parser.print_help()
        return EXIT_USER
    process.prepare()
    try:
        _require_own_options(args)
        return VERBS[args.verb](args)
    except LoraRecipesError as error:
        return _failed(error, args)
    except (MemoryError, OSError, RuntimeError) as error:
        if fault := machine_fault(error):
            return _failed(fault, args)
        raise


def _parser() -> argparse.ArgumentParser:
    verbs = "\n".join(f"  {name:<9} {function.__doc__}" for name, function in VERBS.items())
    parser = argparse.ArgumentParser(
        prog="lora-recipes",
        description="Fine-tuning recipes that prove each step.",
        epilog=f"verbs:\n{verbs}\n\nexit codes: {EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("verb", nargs="?", choices=VERBS, metavar="VERB", help="what to do, see below")
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="a file in recipes/")
    parser.add_argument(
        "words",
        nargs="*",
        metavar="section.key=value",
        help="settings that win over the file's; for `new`, first the new name",
    )
    parser.add_argument("--json", action="store_true", help="print exactly one JSON object on stdout")
    parser.add_argument("--resume", action="store_true", help="train: what it does by itself; scripts may say it")
    parser.add_argument(
        "--fresh", action="store_true", help="train, reproduce: start over; what is there is moved aside"
    )
    parser.add_argument(
        "--accept-changes",
        metavar="A,B",
        help="train, reproduce: go on although these are not as when the run was begun",
    )
    parser.add_argument(
        "--fit", action="store_true", help="train: smaller micro-batches when memory runs out, see README"
    )
    parser.add_argument("--config_file", help="train, plan: an accelerate config, such as accelerate_configs/cpu.yaml")
    parser.add_argument("--gpu", help="plan: for this card, such as rtx4090, a100-80 or 24GiB; unset: this machine")
    parser.add_argument("--gpus", type=_count, metavar="N", help="plan: how many of them share the run")
    parser.add_argument("--tflops", type=_rate, metavar="T", help="plan: 1e12 operations a second that one reaches")
    parser.add_argument("--apply", metavar="NAME", help="plan: write what it suggests as a recipe of that name")
    parser.add_argument("--table", action="store_true", help="plan: all recipes against common cards, into the docs")
    parser.add_argument("--force", action="store_true", help="use an adapter on another base than it was trained on")
    parser.add_argument("--served", action="store_true", help="generate: ask the merged model through a server too")
    parser.add_argument("--adapter", action="append", metavar="NAME=PATH", help="chat: one more adapter to swap in")
    parser.add_argument("--mix", metavar="NAME", help="evaluate: write a recipe NAME that mixes in general rows")
    parser.add_argument("--tasks", metavar="A,B", help="evaluate: benchmarks of lm-eval (an extra) to run as well")
    parser.add_argument("--include_path", metavar="DIR", help="evaluate: folder of local task files for --tasks")
    parser.add_argument("--adapters", nargs="+", metavar="NAME=WEIGHT", help="merge: several adapters, weighted")
    parser.add_argument("--method", choices=COMBINATIONS, help="merge: how --adapters are combined (svd)")
    parser.add_argument("--dry_run", action="store_true", help="push: say what would be uploaded, send nothing")
    parser.add_argument(
        "--allow-pickle", action="store_true", help="load a base that is no safetensors: pickles can run code"
    )
    parser.add_argument("-n", type=_count, metavar="N", help="preview: how many rows (5)")
    parser.add_argument("--row", type=_count, metavar="K", help="preview: the training row with this number, from 1")
    parser.add_argument("--html", action="store_true", help="preview: also write the rows to outputs/NAME/preview.html")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--version", action="version", version=__version__)
    return parser


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number from 1 on, found {text!r}")
    return int(text)


def _rate(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found < float("inf"):
        raise argparse.ArgumentTypeError(f"a number above 0, found {text!r}")
    return found


def _require_own_options(args: argparse.Namespace) -> None:
    for option, verbs in ONLY_FOR.items():
        if getattr(args, option.lstrip("-").replace("-", "_")) not in (None, False) and args.verb not in verbs.split():
            owners = " and ".join(f"`{verb}`" for verb in verbs.split())
            raise RunError(f"`{option}` belongs to {owners} and has no meaning for `{args.verb}`; leave it out")


def _recipe(args: argparse.Namespace) -> Recipe:
    if args.recipe is None:
        raise RunError(f"`{args.verb}` needs a recipe: lora-recipes {args.verb} recipes/NAME.yaml")
    return load_recipe(args.recipe, args.words, allow_pickle=args.allow_pickle)


@contextmanager
def _importing(args: argparse.Namespace, recipe: Recipe) -> Iterator[None]:
    """Around the imports of a step that loads a model, of which only what the recipe needs is imported."""
    if args.alone:
        from lora_recipes.model.quantizer import leave_out_unless_needed

        leave_out_unless_needed(recipe)
    with process.importing(alone=args.alone):
        yield


def _failed(error: LoraRecipesError, args: argparse.Namespace) -> int:
    if args.debug:
        import traceback

        traceback.print_exc()
    from lora_recipes import console

    if args.json:
        console.emit_json({"error": {"message": str(error), "exit_code": error.exit_code}})
    else:
        console.error(str(error))
    return error.exit_code


def _emit(args: argparse.Namespace, result: Result) -> None:
    if args.json:
        from lora_recipes import console

        console.emit_json(result)


def check(args: argparse.Namespace) -> int:
    """say everything that is wrong with a recipe"""
    try:
        recipe = _recipe(args)
    except InvalidRecipe as error:
        if not args.json:
            raise
        _emit(args, {"ok": False, "problems": [problem.as_json() for problem in error.problems]})
        return error.exit_code
    if args.json:
        _emit(args, {"ok": True, "problems": []})
    else:
        sys.stderr.write(f"{recipe.path}: ok\n")
    return EXIT_DONE


def show(args: argparse.Namespace) -> int:
    """print the resolved recipe, and what set each value"""
    from lora_recipes.recipe.show import render

    recipe = _recipe(args)
    if args.json:
        _emit(
            args,
            {
                "recipe": recipe.plain(),
                "origins": {key: str(origin) for key, origin in recipe.origins.items() if _is_value(recipe, key)},
            },
        )
    else:
        text = render(recipe)
        if sys.stdout.isatty():  # a terminal gets it without what it would obey
            from lora_recipes import console

            console.out(text)
        else:
            sys.stdout.write(text + "\n")
    return EXIT_DONE


def _is_value(recipe: Recipe, key: str) -> bool:
    """Sections and sources have origins as well, which only messages need."""
    return "." in key and not isinstance(recipe.get(key), dict)


def new(args: argparse.Namespace) -> int:
    """RECIPE NAME: a recipe of your own that extends RECIPE"""
    from lora_recipes.recipe.scaffold import new_recipe

    if args.recipe is None or not args.words or "=" in args.words[0]:
        raise RunError(
            "`new` needs a source and a name: lora-recipes new recipes/NAME.yaml MY-NAME [section.key=value ...]"
        )
    path = new_recipe(Path(args.recipe), args.words[0], args.words[1:])
    _emit(args, {"recipe": str(path)})
    if not args.json:
        sys.stderr.write(f"wrote {path}; edit it, then: lora-recipes check {path}\n")
    return EXIT_DONE


def train(args: argparse.Namespace) -> int:
    """train it: accelerate launch run.py RECIPE"""
    from lora_recipes.launch import trained
    from lora_recipes.run_dir import RunDir, read_json

    recipe = _recipe(args)
    run_dir = RunDir.of(recipe.name)
    command = [sys.executable, *process.launcher(args.config_file), "lora_recipes.train", args.recipe, *args.words]
    flags = ("--fresh", "--fit", "--debug", "--allow-pickle")
    command += [flag for flag in flags if getattr(args, flag[2:].replace("-", "_"))]
    command += ["--accept-changes", args.accept_changes] if args.accept_changes else []
    outcome: Result = trained(command, run_dir)
    if outcome["exit_code"] == EXIT_DONE:
        _emit(args, read_json(run_dir.status))
    else:
        _emit(args, {"error": outcome})
    return outcome["exit_code"]


def reproduce(args: argparse.Namespace) -> int:
    """RUN_FOLDER: train a run again beside it, and compare hashes"""
    if args.recipe is None or args.words:
        raise RunError("`reproduce` needs a run folder and takes no settings: lora-recipes reproduce outputs/NAME")
    from lora_recipes.reproduce import reproduce as run

    found = run(Path(args.recipe), accepted=args.accept_changes, fresh=args.fresh, allow_pickle=args.allow_pickle)
    _emit(args, found)
    return EXIT_DONE if found["reproduced"] else EXIT_REFUSED


def plan(args: argparse.Namespace) -> int:
    """whether it fits, what to change, how long it takes; before any weight is loaded"""
    if args.table:
        return _plan_table(args)
    recipe = _recipe(args)
    from lora_recipes import console
    from lora_recipes.plan import plan as run
    from lora_recipes.plan import settings_to_apply, target_for
    from lora_recipes.recipe.scaffold import new_recipe

    found = run(recipe, target_for(recipe, args.gpu, args.gpus, args.config_file), teraflops=args.tflops)
    if args.apply:
        changes = settings_to_apply(found)
        if not changes:
            raise RunError(f"--apply {args.apply}: there is nothing to change, {recipe.path} fits as it is")
        found["applied"] = str(new_recipe(recipe.path, args.apply, [*recipe.overrides, *changes]))
    _emit(args, found)
    if not args.json:
        console.plan(recipe.name, found)
    return EXIT_DONE


def _plan_table(args: argparse.Namespace) -> int:
    if args.recipe is not None:
        raise RunError("`plan --table` plans every recipe in recipes/; leave the recipe out")
    for option in ("gpu", "gpus", "tflops", "apply", "config_file"):
        if getattr(args, option) is not None:
            raise RunError(f"`--{option}` has no meaning for `plan --table`, whose cards are fixed; leave it out")
    from lora_recipes.plan.table import write_tables

    written = [str(file) for file in write_tables()]
    _emit(args, {"written": written})
    if not args.json:
        sys.stderr.write(f"wrote {', '.join(written)}\n")
    return EXIT_DONE


def audit(args: argparse.Namespace) -> int:
    """look at every row: what will be learnt, what is wrong; no weights, no GPU"""
    recipe = _recipe(args)
    from lora_recipes.audit import audit as run

    report = run(recipe)
    _emit(args, report)
    return EXIT_USER if report["problems"] else EXIT_DONE


def preview(args: argparse.Namespace) -> int:
    """show rows as the model will see them, the worst cases first"""
    recipe = _recipe(args)
    from lora_recipes.audit.preview import ROWS
    from lora_recipes.audit.preview import preview as run

    _emit(args, run(recipe, count=args.n or ROWS, row=args.row, page=args.html))
    return EXIT_DONE


def generate(args: argparse.Namespace) -> int:
    """ask base, adapter and merged model the same questions, score them, hold them against `checks`"""
    recipe = _recipe(args)
    with _importing(args, recipe):
        from lora_recipes.generate import generate as run

    found = run(recipe, force=args.force, served=args.served)
    _emit(args, found)
    return EXIT_REFUSED if found["failed"] else EXIT_DONE


def chat(args: argparse.Namespace) -> int:
    """talk to the trained model in the terminal, and swap adapters while you do"""
    if args.json:
        raise RunError("`chat` is a conversation and has no --json; `generate --json` asks the recipe's prompts")
    recipe = _recipe(args)
    with _importing(args, recipe):
        from lora_recipes.chat import chat as run

    run(recipe, args.adapter or [], force=args.force)
    return EXIT_DONE


def evaluate(args: argparse.Namespace) -> int:
    """loss on held-out rows and on general text, before and after; the verdict"""
    recipe = _recipe(args)
    with _importing(args, recipe):
        from lora_recipes.evaluate import evaluate as run

    tasks = args.tasks.split(",") if args.tasks else []
    found = run(recipe, force=args.force, mix=args.mix, tasks=tasks, include_path=args.include_path)
    _emit(args, found)
    return EXIT_DONE if found["passed"] else EXIT_REFUSED


def merge(args: argparse.Namespace) -> int:
    """merge the adapter into a plain model and prove that it answers the same"""
    recipe = _recipe(args)
    with _importing(args, recipe):
        from lora_recipes.merge import merge as run

    if args.method and not args.adapters:
        raise RunError("`--method` says how `--adapters` are combined; name them: --adapters a=0.7 b=0.3")
    method = {"method": args.method} if args.method else {}
    _emit(args, run(recipe, force=args.force, adapters=args.adapters or [], **method))
    return EXIT_DONE


def export(args: argparse.Namespace) -> int:
    """write the merged model for other engines: GGUF, Ollama, an adapter that vLLM loads"""
    recipe = _recipe(args)
    from lora_recipes.export import export as run

    _emit(args, run(recipe))
    return EXIT_DONE


def push(args: argparse.Namespace) -> int:
    """upload adapter, merged model or exports to the hub, with card and manifest"""
    recipe = _recipe(args)
    from lora_recipes.push import push as run

    _emit(args, run(recipe, dry_run=args.dry_run))
    return EXIT_DONE


def status(args: argparse.Namespace) -> int:
    """how the run stands: state, gates, scores, what to type next"""
    from lora_recipes import console
    from lora_recipes.status import status as read

    recipe = _recipe(args)
    found = read(recipe)
    if args.json:
        _emit(args, found)
    else:
        console.status(recipe.name, found)
    return EXIT_DONE


VERBS: dict[str, Callable[[argparse.Namespace], int]] = {
    verb.__name__: verb
    for verb in (
        check,
        show,
        new,
        plan,
        audit,
        preview,
        train,
        reproduce,
        generate,
        chat,
        evaluate,
        merge,
        export,
        push,
        status,
    )
}
