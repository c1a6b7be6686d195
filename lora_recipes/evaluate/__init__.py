"""Loss before and after, on rows the run held out and on text it never saw; and from all evidence, the verdict."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import exp
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from lora_recipes import console
from lora_recipes.data.load import LoadedData
from lora_recipes.evaluate.advice import advice, write_mix
from lora_recipes.evaluate.forgetting import MAX_KL, MAX_LOSS_INCREASE, General, general_rows
from lora_recipes.evaluate.tasks import run_tasks
from lora_recipes.model.adapted import attach_adapter
from lora_recipes.model.build import load_base, load_merged
from lora_recipes.model.compare import Difference, Row, logits_at, pieces, trained_row
from lora_recipes.model.machine import choose
from lora_recipes.model.source import locate, materialise
from lora_recipes.recipe import Recipe
from lora_recipes.run_dir import RunDir, write_json
from lora_recipes.trained import as_trained, require_same_adapter, require_same_heldout
from lora_recipes.verdict import verdict

SAME_LOGITS = 1e-4  # of one model read twice


@dataclass(frozen=True)
class Pair:
    """The model before and after training. With an adapter it is one model, loaded once."""

    trained: PreTrainedModel | PeftModel
    base: PreTrainedModel | None

    def difference(self, rows: Iterable[Row]) -> Difference:
        """KL(base ‖ trained) and the loss of both, summed over the tokens of all rows."""
        found = Difference()
        vocabulary = self.trained.config.get_text_config().vocab_size
        for row in (piece for whole in rows for piece in pieces(whole, vocabulary)):
            after = logits_at(self.trained, row)
            with self.before() as base:
                before = logits_at(base, row)
            found.add(before, after, row.targets)
        return found

    @contextmanager
    def before(self) -> Iterator[PreTrainedModel | PeftModel]:
        """A block in which the untrained model is at hand: one of its own, or the trained one with its adapter off."""
        if self.base is not None:
            yield self.base
            return
        with self.trained.disable_adapter():
            yield self.trained


def evaluate(
    recipe: Recipe,
    *,
    force: bool = False,
    mix: str | None = None,
    tasks: list[str] | None = None,
    include_path: str | None = None,
) -> dict[str, Any]:
    """Measure what was learnt and what was forgotten, and write evaluation.json.

    Args:
        force: use the adapter on another base than it was trained on.
        mix: name of a child recipe to write, which mixes general rows into the training data.
        tasks: benchmarks of lm-eval to run on both models.
        include_path: folder of local task files.

    Returns:
        What is written to evaluation.json, with the run's "gates" and "verdict".

    Raises:
        RunError: nothing trained yet, or no general rows.
        RefusedError: the adapter is another's.
        MachineError: the extra `eval` is not installed.
    """
    run_dir = RunDir.of(recipe.name)
    run_dir.require_trained(recipe.path, adapter=bool(recipe.get("lora")))
    run_dir.require_writable()
    choices = choose(recipe, training=False)
    source = materialise(locate(recipe))
    require_same_adapter(recipe, run_dir, source, force=force)
    opened = as_trained(recipe, run_dir, source)
    data = opened.data
    require_same_heldout(recipe, run_dir, data.keys(), data.seed)
    general = general_rows(recipe, opened.tokenizer, opened.ends, data)  # before weights: it may have nothing to read
    base = load_base(recipe, source, choices).eval()
    if recipe.get("lora"):
        pair = _adapted(
            base, run_dir, next(part.rows for part in general if part.rows), lambda: load_base(recipe, source, choices)
        )
    else:
        pair = Pair(load_merged(run_dir.merged, recipe, choices), base)
    report = _task(pair, data) | {"forgetting": _forgetting(pair, recipe, general)}
    report |= run_dir.evidence()
    report["passed"] = bool(report["improved"]) and report["forgetting"]["passed"]
    report["advice"] = [] if report["forgetting"]["passed"] else advice(recipe)
    write_json(run_dir.evaluation, report)  # what was measured is kept, whatever follows
    if tasks:
        report["tasks"] = run_tasks(pair, opened.tokenizer, tasks, include_path)
        write_json(run_dir.evaluation, report)
    if mix is not None:
        report["mixed"] = str(write_mix(recipe, mix, opened, next(part.file for part in general if part.rows)))
    told = verdict(recipe, run_dir)
    report |= {"gates": told["gates"], "verdict": told["verdict"]}
    _show(report, recipe)
    return report


def _adapted(base: PreTrainedModel, run_dir: RunDir, rows: list[Row], again: Callable[[], PreTrainedModel]) -> Pair:
    """The adapter on its base. Where switching it off does not give the base back, that is loaded once more.

    Trained biases and embeddings of its own stay in the base when an adapter is switched off; whether there are any is
    tried on a row.
    """
    before = logits_at(base, rows[0])
    pair = Pair(attach_adapter(base, run_dir.adapter), None)
    with pair.before() as off:
        same = torch.allclose(before, logits_at(off, rows[0]), rtol=0, atol=SAME_LOGITS)
    return pair if same else Pair(pair.trained, again().eval())


def _task(pair: Pair, data: LoadedData) -> dict[str, Any]:
    """Loss on the rows that were held out; every token counts the same, whatever row it stands in."""
    held = data.heldout()
    scored = (trained_row(row["input_ids"], row["labels"]) for row in held or [])
    rows = [row for row in scored if row is not None]
    if not rows:
        console.say(
            "No rows are held out, so what was learnt is not measured and cannot pass; set dataset.eval_split.",
            "yellow",
        )
        return {"eval_loss": {}, "perplexity": {}, "eval_rows": 0, "eval_tokens": 0, "improved": None}
    console.say(f"Reading {len(rows)} held-out rows, before and after …")
    found = pair.difference(rows)
    losses = {"base": found.reference_loss / found.scored, "adapter": found.loss / found.scored}
    return {
        "eval_loss": losses,
        "perplexity": {who: exp(min(loss, 700.0)) for who, loss in losses.items()},  # e^710 is no float
        "eval_rows": len(rows),
        "eval_tokens": found.scored,
        "improved": losses["adapter"] < losses["base"],  # NaN is no improvement
    }


def _forgetting(pair: Pair, recipe: Recipe, general: list[General]) -> dict[str, Any]:
    total, files = Difference(), {}
    for part in general:
        console.say(f"Reading {len(part.rows)} general rows of {part.file}, before and after …")
        found = pair.difference(part.rows)
        total.join(found)
        counts = {"rows": len(part.rows), "trained_on": part.trained_on, "unusable": part.unusable}
        files[part.file] = counts | _before_and_after(found)
    bounds = {
        "max_loss_increase": recipe.get("checks.forgetting.max_loss_increase", MAX_LOSS_INCREASE),
        "max_kl": recipe.get("checks.forgetting.max_kl", MAX_KL),
    }
    told = _before_and_after(total)
    passed = told["loss_after"] - told["loss_before"] <= bounds["max_loss_increase"] and told["kl"] <= bounds["max_kl"]
    return told | bounds | {"files": files, "passed": passed}


def _before_and_after(found: Difference) -> dict[str, Any]:
    return {
        "loss_before": found.reference_loss / max(found.scored, 1),
        "loss_after": found.loss / max(found.scored, 1),
        "kl": found.as_json()["mean_kl"],
        "tokens": found.scored,
    }


def _show(report: dict[str, Any], recipe: Recipe) -> None:
    losses, forgetting = report["eval_loss"], report["forgetting"]
    rows = []
    if losses:
        rows.append(
            [
                "held-out rows",
                f"{report['eval_tokens']:,}",
                f"{losses['base']:.4f}",
                f"{losses['adapter']:.4f}",
                "—",
                "learnt" if report["improved"] else "NOT LEARNT",
            ]
        )
    for file, found in forgetting["files"].items():
        rows.append(_row(file, found, ""))
    rows.append(_row("all general rows", forgetting, "kept" if forgetting["passed"] else "FORGOTTEN"))
    columns = ["rows", "tokens", "loss before", "loss after", "KL", ""]
    console.table("Nats a token, every token counted once", columns, rows, lines=False)
    console.say(
        f"At most {forgetting['max_loss_increase']} more loss and KL {forgetting['max_kl']} on general rows "
        "(checks.forgetting)."
    )
    for line in report["advice"]:
        console.say(f"  {line}", "yellow")
    for name, scores in report.get("tasks", {}).items():
        console.say(f"{name}: {scores}")
    console.gates(report["gates"], report["verdict"])
    if "mixed" in report:
        console.say(f"wrote {report['mixed']}", "bold")


def _row(name: str, found: dict[str, Any], said: str) -> list[str]:
    values = [f"{found['loss_before']:.4f}", f"{found['loss_after']:.4f}", f"{found['kl']:.4f}"]
    return [name, f"{found['tokens']:,}", *values, said]
