"""Rules that hold between keys of a recipe: each a small function that names both keys and the way out."""

from collections.abc import Callable, Iterator
from typing import Any

from lora_recipes.recipe.nodes import Node
from lora_recipes.recipe.problem import Origin, Problem

Values = dict[str, dict[str, Any]]
Finding = tuple[str, str, str]  # (dotted key that the finding points at, message, hint)


def rule_problems(root: Node, file: str) -> list[Problem]:
    """Findings of all rules. Runs only on a recipe whose keys and types are right.

    A finding about a key that is not there points at the file the user named.
    """
    values: Values = {name: node.plain() for name, node in root.value.items()}
    problems = []
    for rule in RULES:
        for key, message, hint in rule(values):
            steps: list[str | int] = list(key.split("."))
            node = root.find(steps)
            written = node is not root.find(steps[:-1])
            problems.append(Problem(node.key if written else Origin(file), key, message, hint))
    return problems


def _required(values: Values) -> Iterator[Finding]:
    if not values.get("model", {}).get("pretrained_model_name_or_path"):
        yield (
            "model.pretrained_model_name_or_path",
            "is missing",
            "name a hub id, a local folder or package:NAME",
        )
    if not values.get("dataset", {}).get("path"):
        yield "dataset.path", "is missing", "name a builder such as `json` with data_files, or a hub id"
    if values.get("dataset") and not values["dataset"].get("split"):
        yield "dataset.split", "is missing", "write `split: train`"


def _one_precision(values: Values) -> Iterator[Finding]:
    training = values.get("training", {})
    if training.get("fp16") and training.get("bf16"):
        yield (
            "training.fp16",
            "and `training.bf16` are both true",
            "keep one: bf16 where the GPU has it, fp16 on T4 and V100",
        )


def _one_quantization(values: Values) -> Iterator[Finding]:
    quantization = values.get("quantization")
    if quantization is None:
        return
    if quantization.get("load_in_4bit") and quantization.get("load_in_8bit"):
        yield "quantization.load_in_4bit", "and `quantization.load_in_8bit` are both true", "keep one"
    elif not quantization.get("load_in_4bit") and not quantization.get("load_in_8bit"):
        yield (
            "quantization.load_in_4bit",
            "is not set, so nothing would be quantized",
            "set it, or drop the section: `quantization: null`",
        )


def _lora_targets(values: Values) -> Iterator[Finding]:
    lora = values.get("lora")
    if lora is None:
        yield (
            "lora",
            "is missing: full fine-tuning is not supported yet",
            "extend base/lora.yaml or base/qlora.yaml",
        )
        return
    if not lora.get("target_modules") and not lora.get("target_parameters"):
        yield "lora.target_modules", "is missing", "write `target_modules: all-linear`, or list the layers"
    targets = lora.get("target_modules")
    if "lm_head" in (targets if isinstance(targets, list) else [targets]):
        yield (
            "lora.target_modules",
            "holds `lm_head`, which SFTTrainer's loss reads directly, so its adapter would never train",
            "use `modules_to_save: [lm_head]`",
        )
    if lora.get("init_lora_weights") in ("eva", "corda", "lora_ga", "loftq"):
        yield (
            "lora.init_lora_weights",
            "needs an initialisation step before training, which this runner does not run yet; without it PEFT trains plain LoRA",
            "",
        )
    if lora.get("task_type") not in (None, "CAUSAL_LM"):
        yield "lora.task_type", "must be CAUSAL_LM: recipes fine-tune causal language models", ""


def _evaluation(values: Values) -> Iterator[Finding]:
    training, dataset = values.get("training", {}), values.get("dataset", {})
    wanted = training.get("eval_strategy", "no") != "no" or training.get("eval_on_start")
    if wanted and not dataset.get("eval_split"):
        yield (
            "training.eval_strategy",
            "needs held-out rows",
            "set `dataset.eval_split`, or `eval_strategy: 'no'`",
        )
    if training.get("load_best_model_at_end") and not wanted:
        yield "training.load_best_model_at_end", "needs `training.eval_strategy`", ""
    if dataset.get("eval_split") and dataset.get("eval_split") == dataset.get("split"):
        yield "dataset.eval_split", "is the training split itself", "name a split that is not trained on"


def _packing(values: Values) -> Iterator[Finding]:
    training = values.get("training", {})
    if training.get("eval_packing") and not training.get("packing"):
        yield (
            "training.eval_packing",
            "without `training.packing` lets documents see each other in TRL's evaluation",
            "set both or neither",
        )
    if training.get("packing") and training.get("max_length", 0) is None:
        yield "training.packing", "needs a `training.max_length`, the length of a packed row", ""
    if training.get("padding_free") and not training.get("packing") and training.get("max_length", 0) is not None:
        yield (
            "training.padding_free",
            "does not cut rows at `training.max_length`",
            "set `packing: true`, or `max_length: null`",
        )


def _remote_code(values: Values) -> Iterator[Finding]:
    model = values.get("model", {})
    revision = str(model.get("revision", ""))
    pinned = len(revision) == 40 and all(character in "0123456789abcdef" for character in revision)
    if model.get("trust_remote_code") and not pinned:
        yield (
            "model.trust_remote_code",
            "runs code from the hub, so it needs `model.revision` pinned to a commit (40 hex digits)",
            "",
        )


def _merge_base(values: Values) -> Iterator[Finding]:
    if values.get("merge", {}).get("base") == "dequantized" and not values.get("quantization", {}).get("load_in_4bit"):
        yield "merge.base", "is `dequantized`, which needs `quantization.load_in_4bit`", "drop the key"


def _generation(values: Values) -> Iterator[Finding]:
    generation = values.get("generation")
    if generation is None:
        return
    if not generation.get("max_new_tokens"):
        yield (
            "generation.max_new_tokens",
            "is missing: an answer that never ends needs a limit",
            "write `max_new_tokens: 128`",
        )
    sampling = [key for key in ("temperature", "top_p", "top_k") if generation.get(key) is not None]
    if sampling and not generation.get("do_sample"):
        yield (
            f"generation.{sampling[0]}",
            "has no effect without `generation.do_sample: true`",
            "set do_sample, or drop it",
        )


RULES: list[Callable[[Values], Iterator[Finding]]] = [
    _required,
    _one_precision,
    _one_quantization,
    _lora_targets,
    _evaluation,
    _packing,
    _remote_code,
    _merge_base,
    _generation,
]
