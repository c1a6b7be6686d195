"""Rules that hold between keys of a recipe: each a small function that names both keys and the way out."""

from collections.abc import Callable, Iterator

from lora_recipes.errors import EXIT_REFUSED
from lora_recipes.recipe.nodes import Node
from lora_recipes.recipe.problem import Origin, Problem
from lora_recipes.recipe.rules import answers, files, method, rows
from lora_recipes.recipe.rules.finding import Finding, Values, sources_of


def rule_problems(root: Node, file: str) -> list[Problem]:
    """Findings of all rules. Runs only on a recipe whose keys and types are right.

    A finding about a key that is not there points at the source in the list it belongs to, else at the file the user
    named.
    """
    values: Values = {name: node.plain() for name, node in root.value.items()}
    problems = []
    for rule in RULES:
        for found in rule(values):
            steps: list[str | int] = [int(step) if step.isdecimal() else step for step in found.key.split(".")]
            node = root.find(steps)
            written = node is not root.find(steps[:-1]) or any(isinstance(step, int) for step in steps)
            origin = node.key if written else Origin(file)
            if found.exit_code == EXIT_REFUSED and not origin.line:
                origin = Origin("command line")  # without the word: a URL in it may hold a password
            problems.append(Problem(origin, *found))
    return problems


def broken_rules(values: Values) -> list[Finding]:
    """What the rules find in the plain values of a recipe."""
    return [found for rule in RULES for found in rule(values)]


def required(values: Values) -> Iterator[Finding]:
    if not values.get("model", {}).get("pretrained_model_name_or_path"):
        yield Finding(
            "model.pretrained_model_name_or_path",
            "is missing",
            "name a hub id, a local folder or package:NAME",
        )
    for prefix, source in sources_of(values):
        if not source.get("path"):
            yield Finding(f"{prefix}.path", "is missing", "name a builder such as `json` with data_files, or a hub id")


RULES: list[Callable[[Values], Iterator[Finding]]] = [
    required,
    method.one_precision,
    method.one_quantization,
    method.lora_targets,
    method.full,
    method.first_weights,
    method.first_weights_together,
    method.adapter_optimizers,
    method.only_b,
    rows.evaluation,
    rows.best,
    rows.workers,
    rows.packing,
    files.remote_code,
    method.merge_base,
    answers.generation,
    files.local_files,
    files.unsafe_files,
    rows.steps,
    rows.streaming,
    rows.row_limits,
    rows.truncation,
    rows.control_tokens,
    answers.checks,
]
